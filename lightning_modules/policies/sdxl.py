"""Stable Diffusion XL (arXiv 2307.01952) as a policy: two text encoders and micro-conditioning."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL
from diffusers.loaders import StableDiffusionXLLoraLoaderMixin
from jaxtyping import Float
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from lightning_modules.batches import Conditioning
from lightning_modules.policies.stable_diffusion import StableDiffusion, tokenize
from lightning_modules.weights.pretrained import Pretrained
from lightning_modules.weights.tokenizers import read_tokenizer


class StableDiffusionXL(StableDiffusion):
    """A diffusers ``StableDiffusionXLPipeline`` taken apart; arguments as ``StableDiffusion``'s.

    A VAE that overflows in fp16 (``force_upcast`` in its config, as the published one's) stays fp32 whatever
    ``frozen_dtype`` is; ``vae: madebyollin/sdxl-vae-fp16-fix`` follows ``frozen_dtype``.

    Conditioning without time ids is taken as an uncropped picture of the size that is being made.
    """

    lora_loader = StableDiffusionXLLoraLoaderMixin
    added_conditions = "text_time"
    usual_steps_offset = None

    def _load_text(self, pipeline: Pretrained, variant: str | None, dtype: torch.dtype) -> None:
        self.text_encoder = pipeline.component("text_encoder").load_model(CLIPTextModel, dtype, variant)
        second = pipeline.component("text_encoder_2")
        self.text_encoder_2 = second.load_model(CLIPTextModelWithProjection, dtype, variant)
        self.tokenizer = read_tokenizer(pipeline, "tokenizer", self.text_encoder)
        self.tokenizer_2 = read_tokenizer(pipeline, "tokenizer_2", self.text_encoder_2)
        self._check_width()

    def _vae_dtype(self, source: Pretrained) -> torch.dtype:
        config = source.load(AutoencoderKL.load_config)
        return torch.float32 if config.get("force_upcast", True) else self._frozen_dtype

    def _encode_text(self, prompts: list[str]) -> Conditioning:
        first_ids = tokenize(self.tokenizer, prompts).to(self.text_encoder.device)
        second_ids = tokenize(self.tokenizer_2, prompts).to(self.text_encoder_2.device)
        first = self.text_encoder(first_ids, output_hidden_states=True)
        second = self.text_encoder_2(second_ids, output_hidden_states=True)
        embeds = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)
        return Conditioning(embeds=embeds, pooled=second.text_embeds)

    def _encode_negative(self) -> Conditioning:
        empty = super()._encode_negative()
        return empty if self.negative_prompt is not None else empty._map(torch.zeros_like)

    def _completed(self, cond: Conditioning, latents: Float[Tensor, "n c h w"]) -> Conditioning:
        if cond.time_ids is not None:
            return cond
        height, width = (side * self.downscale for side in latents.shape[-2:])
        row = torch.tensor([height, width, 0, 0, height, width], dtype=torch.float32, device=latents.device)
        return cond.with_time_ids(row.expand(len(cond), 6))

    def _added_conditions(self, cond: Conditioning) -> dict[str, Tensor] | None:
        assert cond.pooled is not None, "SDXL: the conditioning comes from a model with one text encoder"
        assert cond.time_ids is not None, "time ids are filled in by _completed"
        return {"text_embeds": cond.pooled, "time_ids": cond.time_ids}
