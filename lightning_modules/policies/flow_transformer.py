"""What Stable Diffusion 3 and FLUX have in common: a transformer that gives velocities, and T5 as a text encoder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from jaxtyping import Float, Int
from torch import Tensor
from transformers import T5EncoderModel, T5Tokenizer

from lightning_modules.batches import Conditioning
from lightning_modules.errors import ConfigError
from lightning_modules.policies.adaptation import Adaptation
from lightning_modules.policies.latent_diffusion import LatentDiffusion
from lightning_modules.prompt_lengths import CutPrompts
from lightning_modules.schedules.base import Schedule
from lightning_modules.schedules.flow import FlowSchedule
from lightning_modules.schedules.level_draws import LevelDraw
from lightning_modules.schedules.step_rules import StepRule
from lightning_modules.weights.pretrained import Pretrained
from lightning_modules.weights.tokenizers import read_tokenizer

CLIP_CUTS, T5_CUTS = CutPrompts("the policy's CLIP encoder"), CutPrompts("the policy's T5 encoder")
PATCH = 2  # latent cells along one side of a token
MAX_T5_TOKENS = 512  # beyond it the pipelines refuse


class FlowTransformer(LatentDiffusion):
    """A rectified flow's pipeline taken apart; further arguments as ``LatentDiffusion``'s.

    Objectives and samplers see t = 1000 s, velocities n - x_0 and latents ``[n c h w]``, whatever the network is given.

    Args:
        pretrained: the pipeline: a folder, or a hub id. Single files are not supported.
        adaptation: what trains.
        transformer: another transformer: the folder or ``organisation/name/subfolder`` that holds its config.json.
        t5_tokens: length that prompts are padded or cut to for T5, which is given no mask: padding counts, and
            embeddings depend on it. None is the pipeline's, 256 for SD3 and 512 for FLUX, or what T5's tokenizer says
            that it takes, where that is less. It must be the same in training, sampling and cached data.
        image_size: side of the pictures it makes, in pixels; None is the model's own.
        levels: where training asks; None is ``LogitNormal``, as the official recipes have it.
        step_rule: how much noise a step draws that is asked for some; None is ``Ancestral``.
        own_levels: whether a sampler's levels end at 1/N before the shift; None is what the pipeline does, which for
            SD3 ends in a long step to s = 0.0089 and a tiny one (see ``FlowSchedule``). True spaces them evenly, which
            suits SPO.

    Raises:
        ConfigError: as ``LatentDiffusion``; a size that the patches do not divide, or a length beyond T5's.
    """

    denoiser_name = "transformer"
    writes_kohya = False
    pipeline_own_levels: ClassVar[bool]
    pipeline_t5_tokens: ClassVar[int]

    transformer: Any

    def __init__(
        self,
        pretrained: str,
        adaptation: Adaptation,
        transformer: str | None = None,
        t5_tokens: int | None = None,
        image_size: int | None = None,
        levels: LevelDraw | None = None,
        step_rule: StepRule | None = None,
        own_levels: bool | None = None,
        **options: Any,
    ) -> None:
        if options.get("layout") is not None:
            raise ConfigError(
                f"{type(self).__name__}: single files are not supported; give a pipeline's folder or hub id"
            )
        if t5_tokens is not None and not 1 <= t5_tokens <= MAX_T5_TOKENS:
            raise ConfigError(f"model.policy.t5_tokens must lie in 1 .. {MAX_T5_TOKENS}, got {t5_tokens}")
        self._asked_t5_tokens = t5_tokens
        self._asked_size, self._levels, self._step_rule = image_size, levels, step_rule
        self._own_levels = self.pipeline_own_levels if own_levels is None else own_levels
        super().__init__(pretrained, adaptation, denoiser=transformer, **options)

    def encoding_settings(self) -> Mapping[str, Any]:
        return {"t5_tokens": self.t5_tokens}

    def _load_t5(self, pipeline: Pretrained, number: int, dtype: torch.dtype, variant: str | None) -> tuple[Any, Any]:
        """The T5 encoder ``text_encoder_<number>`` and its tokenizer; sets ``t5_tokens``.

        Raises:
            ConfigError: missing or damaged, or a tokenizer that knows more tokens than the encoder.
        """
        encoder = pipeline.component(f"text_encoder_{number}").load_model(T5EncoderModel, dtype, variant)
        tokenizer = read_tokenizer(pipeline, f"tokenizer_{number}", encoder, T5Tokenizer)
        own = min(self.pipeline_t5_tokens, tokenizer.model_max_length)
        self.t5_tokens: int = own if self._asked_t5_tokens is None else self._asked_t5_tokens
        return encoder, tokenizer

    def _load_schedule(self, pipeline: Pretrained) -> Schedule:
        self.scheduler_config = self._read_scheduler_config(pipeline)
        return FlowSchedule.from_scheduler_config(
            self.scheduler_config, self._own_levels, self._levels, self._step_rule
        )

    def _read_scheduler_config(self, pipeline: Pretrained) -> Mapping[str, Any]:
        read = FlowMatchEulerDiscreteScheduler.load_config
        config: Mapping[str, Any] = pipeline.component("scheduler").load(read, kind="scheduler")
        return config

    def _read_sizes(self) -> None:
        super()._read_sizes()
        if self._asked_size is not None:
            self.image_size = self._asked_size
        if self.image_size < 1 or self.image_size % (PATCH * self.downscale):
            raise ConfigError(
                f"model.policy.image_size must be a multiple of {PATCH * self.downscale}, got {self.image_size}: a "
                f"token covers {PATCH} x {PATCH} latent cells of {self.downscale} pixels"
            )

    def _completed(self, cond: Conditioning, latents: Float[Tensor, "n c h w"]) -> Conditioning:
        height, width = latents.shape[-2:]
        if height % PATCH or width % PATCH:
            raise ConfigError(
                f"{type(self).__name__}: latents of {height} x {width} cells don't divide into patches of {PATCH}; "
                f"make the pictures' sides multiples of {PATCH * self.downscale} pixels (data.resolution)"
            )
        return Conditioning(embeds=cond.embeds, pooled=cond.pooled)  # no micro-conditioning


def token_ids(tokenizer: Any, prompts: list[str], length: int, cuts: CutPrompts) -> Int[Tensor, "n {length}"]:
    """Padded or cut to ``length``; ``cuts`` tells of what is cut."""
    batch = tokenizer(prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    cuts.look(tokenizer, prompts, batch.attention_mask)
    ids: Tensor = batch.input_ids
    return ids
