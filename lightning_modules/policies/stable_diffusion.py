"""Stable Diffusion 1.x and 2.x as a policy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders import StableDiffusionLoraLoaderMixin
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from diffusers.models.resnet import ResnetBlock2D
from jaxtyping import Float
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor
from transformers import CLIPTextModel

from lightning_modules.batches import Conditioning
from lightning_modules.errors import ConfigError
from lightning_modules.policies.adaptation import Adaptation
from lightning_modules.policies.latent_diffusion import LatentDiffusion
from lightning_modules.prompt_lengths import CutPrompts
from lightning_modules.weights.pretrained import Pretrained
from lightning_modules.weights.tokenizers import read_tokenizer

CUT_PROMPTS = CutPrompts("the policy's text encoder")


class StableDiffusion(LatentDiffusion):
    """A diffusers ``StableDiffusionPipeline`` taken apart; further arguments as ``LatentDiffusion``'s.

    Args:
        pretrained: the pipeline: a folder, a folder of the installed ``experiments`` package
            (``embedded/shapes``), or a hub id; or a single ``.safetensors`` file, with ``layout``.
        adaptation: what trains.
        unet: another UNet: the folder or ``organisation/name/subfolder`` that holds its config.json, such as
            ``mhdang/dpo-sd1.5-text2image-v1/unet``.
        attention: "sdpa" is torch's fused attention; "eager" writes the product out, for comparison and for
            double gradients.
    """

    denoiser_class = UNet2DConditionModel
    denoiser_name = "unet"
    lora_loader: ClassVar[Any] = StableDiffusionLoraLoaderMixin
    blocks = (BasicTransformerBlock, ResnetBlock2D)

    added_conditions: ClassVar[str | None] = None  # the UNet's addition_embed_type
    usual_steps_offset: ClassVar[int | None] = 1  # what diffusers' pipeline sets; None where it takes the scheduler's

    unet: Any

    def __init__(
        self,
        pretrained: str,
        adaptation: Adaptation,
        unet: str | None = None,
        attention: Literal["sdpa", "eager"] = "sdpa",
        **options: Any,
    ) -> None:
        super().__init__(pretrained, adaptation, denoiser=unet, **options)
        self.unet.set_attn_processor(AttnProcessor2_0() if attention == "sdpa" else AttnProcessor())

    def _load_text(self, pipeline: Pretrained, variant: str | None, dtype: torch.dtype) -> None:
        self.text_encoder = pipeline.component("text_encoder").load_model(CLIPTextModel, dtype, variant)
        self.tokenizer = read_tokenizer(pipeline, "tokenizer", self.text_encoder)
        self._check_width()

    def _read_scheduler_config(self, pipeline: Pretrained) -> Mapping[str, Any]:
        config = super()._read_scheduler_config(pipeline)
        offset = config.get("steps_offset", 0)
        if self.usual_steps_offset is not None and offset != self.usual_steps_offset:
            # StableDiffusionPipeline of diffusers does so, from which the papers' code starts.
            rank_zero_info(f"the scheduler's steps_offset {offset} is taken as 1, as diffusers' pipeline does")
            config = {**config, "steps_offset": self.usual_steps_offset}
        return config

    def _check_denoiser(self, config: Mapping[str, Any]) -> None:
        found = config.get("addition_embed_type")
        if found != self.added_conditions:
            kind = "is that of an SDXL model" if found == "text_time" else f"has addition_embed_type {found!r}"
            raise ConfigError(
                f"base model: its UNet {kind}, which {type(self).__name__} does not run; set model.policy to "
                f"{'StableDiffusionXL' if found == 'text_time' else 'StableDiffusion'}, or give another base model"
            )
        if config.get("class_embed_type") is not None or config.get("num_class_embeds") is not None:
            raise ConfigError("base model: its UNet reads classes besides prompts; give a model for text to image")

    def _check_width(self) -> None:
        encoders: list[Any] = list(self._text_encoders().values())
        width, wanted = sum(encoder.config.hidden_size for encoder in encoders), self.unet.config.cross_attention_dim
        if wanted != width:
            raise ConfigError(
                f"base model: its UNet reads text of width {wanted} and its text encoders give {width}; give a UNet "
                "and text encoders of one kind"
            )

    def _encode_text(self, prompts: list[str]) -> Conditioning:
        ids = tokenize(self.tokenizer, prompts).to(self.text_encoder.device)
        return Conditioning(embeds=self.text_encoder(ids).last_hidden_state)

    def _completed(self, cond: Conditioning, latents: Float[Tensor, "n c h w"]) -> Conditioning:
        return Conditioning(embeds=cond.embeds)  # SD has no micro-conditioning

    def _denoise(
        self,
        network: Any,
        latents: Float[Tensor, "n c h w"],
        timesteps: Tensor,
        cond: Conditioning,
    ) -> Float[Tensor, "n c h w"]:
        # Timesteps keep their type: in bf16 most would be other integers.
        dtype = network.conv_in.weight.dtype
        added = self._added_conditions(cond)
        output = network(
            latents.to(dtype), timesteps, encoder_hidden_states=cond.embeds.to(dtype), added_cond_kwargs=added
        )
        return output.sample.float()

    def _added_conditions(self, cond: Conditioning) -> dict[str, Tensor] | None:
        """The UNet's further inputs besides the text tokens."""
        return None


def tokenize(tokenizer: Any, prompts: list[str]) -> Tensor:
    """Token ids ``[n, l]``, padded or cut to the length that the text encoder was trained with (77 for CLIP)."""
    length = tokenizer.model_max_length
    batch = tokenizer(prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    CUT_PROMPTS.look(tokenizer, prompts, batch.attention_mask)
    return batch.input_ids
