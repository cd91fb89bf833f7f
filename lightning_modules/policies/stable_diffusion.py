"""Stable Diffusion 1.x and 2.x as a policy, and what SDXL (``sdxl.py``) has in common with it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from diffusers.models.resnet import ResnetBlock2D
from jaxtyping import Float
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from lightning_modules.batches import Conditioning, DenoiserQuery
from lightning_modules.errors import ConfigError
from lightning_modules.policies.adaptation import Adaptation
from lightning_modules.policies.base import DiffusionPolicy
from lightning_modules.randomness import randn
from lightning_modules.schedules.discrete import NoiseSchedule
from lightning_modules.weights.pretrained import DTYPES, Pretrained


class StableDiffusion(DiffusionPolicy):
    """A diffusers ``StableDiffusionPipeline`` taken apart. Networks that don't train stay frozen and in eval mode.

    The VAE and frozen text encoders compute in ``frozen_dtype`` whatever autocast says, so that their results
    are the same in training, in validation and when data is encoded beforehand. The UNet follows autocast.

    Args:
        pretrained: the pipeline: a folder, a folder of the installed ``experiments`` package
            (``embedded/shapes``), or a hub id.
        adaptation: what trains.
        revision: branch, tag or commit of ``pretrained`` on the hub.
        variant: the weights' file variant, such as "fp16".
        unet: another UNet: the folder or ``organisation/name/subfolder`` that holds its config.json, such as
            ``mhdang/dpo-sd1.5-text2image-v1/unet``.
        vae: another VAE, likewise, such as ``madebyollin/sdxl-vae-fp16-fix``.
        frozen_dtype: number type of the VAE, frozen text encoders and the UNet's frozen weights. What trains is
            fp32 always.
        gradient_checkpointing: recompute the UNet's activations in the backward pass: less memory, more time.
        attention: "sdpa" is torch's fused attention; "eager" writes the product out, for comparison and for
            double gradients.
        negative_prompt: what guidance contrasts with. None is what the diffusers pipelines do when none is given:
            the empty prompt for SD, zeros for SDXL.

    Raises:
        ConfigError: missing or damaged weights, or a VAE with normalisation that is not supported.
    """

    # diffusers hides its classes behind a lazy module whose stand-ins the type checker would see.
    unet: Any
    vae: Any

    blocks = (BasicTransformerBlock, ResnetBlock2D)

    def __init__(
        self,
        pretrained: str,
        adaptation: Adaptation,
        revision: str | None = None,
        variant: str | None = None,
        unet: str | None = None,
        vae: str | None = None,
        frozen_dtype: Literal["fp32", "bf16", "fp16"] = "fp32",
        gradient_checkpointing: bool = False,
        attention: Literal["sdpa", "eager"] = "sdpa",
        negative_prompt: str | None = "",
    ) -> None:
        super().__init__()
        self.adaptation = adaptation
        self.negative_prompt = negative_prompt
        self._frozen_dtype = DTYPES[frozen_dtype]
        self._negative_cache: dict[torch.device, Conditioning] = {}
        pipeline = Pretrained.find(pretrained, revision)
        self.unet = load_model(UNet2DConditionModel, pipeline, "unet", variant, self._unet_dtype(), override=unet)
        self.vae = load_model(AutoencoderKL, pipeline, "vae", variant, self._vae_dtype(pipeline, vae), override=vae)
        self._load_text(pipeline, variant)
        config = pipeline.component("scheduler").load(DDIMScheduler.load_config, kind="scheduler")
        self.schedule = NoiseSchedule.from_scheduler_config(config)
        self._read_sizes()
        self.unet.set_attn_processor(AttnProcessor2_0() if attention == "sdpa" else AttnProcessor())
        if gradient_checkpointing:
            self.unet.enable_gradient_checkpointing()
        self.requires_grad_(False)
        adaptation.apply(self._adaptable())
        self.train()

    # What SDXL has otherwise

    def _load_text(self, pipeline: Pretrained, variant: str | None) -> None:
        dtype = self._text_dtype()
        self.tokenizer = pipeline.component("tokenizer").load(CLIPTokenizer.from_pretrained, kind="tokenizer")
        self.text_encoder = load_model(CLIPTextModel, pipeline, "text_encoder", variant, dtype)

    def _read_sizes(self) -> None:
        config = self.vae.config
        if getattr(config, "latents_mean", None) is not None:
            raise ConfigError("VAE: per-channel latents_mean and latents_std are not supported; use another VAE.")
        self.latent_channels = config.latent_channels
        self.downscale = 2 ** (len(config.block_out_channels) - 1)
        self.image_size = self.unet.config.sample_size * self.downscale

    # What runs in which number type

    def _unet_dtype(self) -> torch.dtype:
        return torch.float32 if self.adaptation.trains_unet_weights else self._frozen_dtype

    def _text_dtype(self) -> torch.dtype:
        return torch.float32 if self.adaptation.trains_text_encoders else self._frozen_dtype

    def _vae_dtype(self, pipeline: Pretrained, override: str | None) -> torch.dtype:
        return self._frozen_dtype

    def _without_autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, enabled=False)

    # Networks

    @property
    def denoiser(self) -> nn.Module:
        return self.unet

    @property
    def text_encoders(self) -> list[nn.Module]:
        return [self.text_encoder]

    def _adaptable(self) -> dict[str, nn.Module]:
        return {"unet": self.unet, "text_encoder": self.text_encoder}

    def train(self, mode: bool = True) -> StableDiffusion:
        super().train(mode)
        self.vae.eval()
        for encoder in self.text_encoders:
            encoder.train(mode and self.adaptation.trains_text_encoders)
        return self

    # Text

    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        if self.adaptation.trains_text_encoders:
            return self._encode_text(list(prompts))
        with torch.no_grad(), self._without_autocast():
            return self._encode_text(list(prompts))

    def _encode_text(self, prompts: list[str]) -> Conditioning:
        ids = tokenize(self.tokenizer, prompts).to(self.device)
        return Conditioning(embeds=self.text_encoder(ids).last_hidden_state)

    def _negative(self, n: int) -> Conditioning:
        """The negative prompt's conditioning, n rows."""
        if self.adaptation.trains_text_encoders:
            return self._encode_negative().repeat_interleave(n)
        if self.device not in self._negative_cache:
            # Validation may come first and run in inference mode, whose tensors training could not use later.
            with torch.inference_mode(False):
                self._negative_cache[self.device] = self._encode_negative()
        return self._negative_cache[self.device].repeat_interleave(n)

    def _encode_negative(self) -> Conditioning:
        return self.encode_prompts([self.negative_prompt or ""])

    # Pictures

    @torch.no_grad()
    def encode_images(
        self, images: Float[Tensor, "n 3 H W"], generators: Sequence[torch.Generator] | None = None
    ) -> Float[Tensor, "n c h w"]:
        with self._without_autocast():
            posterior = self.vae.encode(images.to(self.vae.dtype)).latent_dist
        latents = posterior.mean.float()
        if generators is not None:
            latents = latents + posterior.std.float() * randn(latents.shape[1:], generators, latents.device)
        config = self.vae.config
        return (latents - (config.shift_factor or 0.0)) * config.scaling_factor

    @torch.no_grad()
    def decode(self, latents: Float[Tensor, "n c h w"]) -> Float[Tensor, "n 3 H W"]:
        config = self.vae.config
        unscaled = latents.float() / config.scaling_factor + (config.shift_factor or 0.0)
        with self._without_autocast():
            images = self.vae.decode(unscaled.to(self.vae.dtype)).sample
        return (images.float() / 2 + 0.5).clamp(0, 1)

    # Denoising

    def predict_noise(self, query: DenoiserQuery, denoiser: nn.Module | None = None) -> Float[Tensor, "n c h w"]:
        network = self.unet if denoiser is None else denoiser
        cond = self._completed(query.cond, query.latents)
        if query.guidance_scale == 1:
            return self._denoise(network, query.latents, query.timesteps, cond)
        negative = self._completed(self._negative(len(cond)).with_time_ids(cond.time_ids), query.latents)
        both = self._denoise(
            network,
            torch.cat([query.latents, query.latents]),
            torch.cat([query.timesteps, query.timesteps]),
            Conditioning.cat([negative, cond]),
        )
        unguided, conditional = both.chunk(2)
        return unguided + query.guidance_scale * (conditional - unguided)

    def _completed(self, cond: Conditioning, latents: Float[Tensor, "n c h w"]) -> Conditioning:
        """The conditioning reduced or filled up to what this UNet reads: SD has no micro-conditioning."""
        return Conditioning(embeds=cond.embeds)

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

    # Training and export

    def adapters_disabled(self) -> AbstractContextManager[None]:
        return self.adaptation.disabled(self._adaptable())

    def save_pretrained(self, folder: Path) -> None:
        self.adaptation.save(self._adaptable(), Path(folder))


def tokenize(tokenizer: Any, prompts: list[str]) -> Tensor:
    """Token ids ``[n, l]``, padded or cut to the length that the text encoder was trained with (77 for CLIP)."""
    length = tokenizer.model_max_length
    return tokenizer(prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids


def component_source(pipeline: Pretrained, name: str, override: str | None) -> Pretrained:
    """Where a component comes from: the pipeline, or the place that ``override`` names."""
    return pipeline.component(name) if override is None else Pretrained.find(override)


def load_model(
    model_class: Any,
    pipeline: Pretrained,
    name: str,
    variant: str | None,
    dtype: torch.dtype,
    override: str | None = None,
) -> Any:
    """Load a component of the pipeline, or the one that ``override`` names, in the given number type."""
    source = component_source(pipeline, name, override)
    options = {} if variant is None or override is not None else {"variant": variant}
    # Published files may be fp16; diffusers and transformers have different words for the type to load them in.
    word = "torch_dtype" if hasattr(model_class, "load_config") else "dtype"
    return source.load(partial(model_class.from_pretrained, **{word: dtype}, **options))
