"""Stable Diffusion 1.x and 2.x as a policy."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders import StableDiffusionLoraLoaderMixin
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from diffusers.models.resnet import ResnetBlock2D
from jaxtyping import Float
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from lightning_modules.batches import Conditioning
from lightning_modules.policies.adaptation import Adaptation
from lightning_modules.policies.latent_diffusion import LatentDiffusion, load_model
from lightning_modules.weights.pretrained import Pretrained


class StableDiffusion(LatentDiffusion):
    """A diffusers ``StableDiffusionPipeline`` taken apart; further arguments as ``LatentDiffusion``'s.

    Args:
        pretrained: the pipeline: a folder, a folder of the installed ``experiments`` package
            (``embedded/shapes``), or a hub id.
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
        self.tokenizer = pipeline.component("tokenizer").load(CLIPTokenizer.from_pretrained, kind="tokenizer")
        self.text_encoder = load_model(CLIPTextModel, pipeline, "text_encoder", variant, dtype)

    def _encode_text(self, prompts: list[str]) -> Conditioning:
        ids = tokenize(self.tokenizer, prompts).to(self.device)
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
    return tokenizer(prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids
