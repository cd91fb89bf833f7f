"""FLUX.1 as a policy: packed latents with positions, and guidance that is an input of the network."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from diffusers.loaders import FluxLoraLoaderMixin
from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock, FluxTransformerBlock
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pixel_shuffle, pixel_unshuffle
from transformers import CLIPTextModel

from lightning_modules.batches import Conditioning
from lightning_modules.errors import ConfigError
from lightning_modules.policies.adaptation import Adaptation
from lightning_modules.policies.flow_transformer import CLIP_CUTS, PATCH, T5_CUTS, FlowTransformer, token_ids
from lightning_modules.weights.pretrained import Pretrained
from lightning_modules.weights.tokenizers import read_tokenizer

OWN_SIZE = 1024  # pixels; no configuration says it


class Flux(FlowTransformer):
    """A diffusers ``FluxPipeline`` taken apart; further arguments as ``FlowTransformer``'s.

    The guidance scale of samplers and objectives is classifier-free guidance by a second pass with the empty prompt; 1
    is what FLUX.1-dev is made for, whose own guidance is ``embedded_guidance``.

    LoRA goes by default where flow_grpo's recipe has it.

    Args:
        embedded_guidance: what a guidance-distilled model (FLUX.1-dev) is told its guidance is; the same for policy,
            reference and sampler. 3.5 in flow_grpo and diffusers; some trainers take 1. Not read by models without it
            (FLUX.1-schnell).
    """

    denoiser_class = FluxTransformer2DModel
    lora_loader = FluxLoraLoaderMixin
    lora_targets = (
        "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out",
        "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0",
        "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2",
    )  # fmt: skip
    blocks = (FluxTransformerBlock, FluxSingleTransformerBlock)
    pipeline_own_levels = True
    pipeline_t5_tokens = 512

    def __init__(self, pretrained: str, adaptation: Adaptation, embedded_guidance: float = 3.5, **options: Any) -> None:
        if embedded_guidance < 0:
            raise ConfigError(
                f"model.policy.embedded_guidance must be 0 or more, got {embedded_guidance}; 3.5 is usual"
            )
        self.embedded_guidance = embedded_guidance
        super().__init__(pretrained, adaptation, **options)

    def _load_text(self, pipeline: Pretrained, variant: str | None, dtype: torch.dtype) -> None:
        self.text_encoder = pipeline.component("text_encoder").load_model(CLIPTextModel, dtype, variant)
        self.tokenizer = read_tokenizer(pipeline, "tokenizer", self.text_encoder)
        self.text_encoder_2, self.tokenizer_2 = self._load_t5(pipeline, 2, dtype, variant)

    def _channels_read(self) -> int:
        return self.denoiser.config.in_channels // PATCH**2

    def _own_size(self) -> int:
        return OWN_SIZE

    def _encode_text(self, prompts: list[str]) -> Conditioning:
        clip, t5 = self.text_encoder, self.text_encoder_2
        words = token_ids(self.tokenizer, prompts, self.tokenizer.model_max_length, CLIP_CUTS).to(clip.device)
        ids = token_ids(self.tokenizer_2, prompts, self.t5_tokens, T5_CUTS).to(t5.device)
        return Conditioning(embeds=t5(ids).last_hidden_state, pooled=clip(words).pooler_output)

    def _denoise(
        self, network: Any, latents: Float[Tensor, "n c h w"], timesteps: Tensor, cond: Conditioning
    ) -> Float[Tensor, "n c h w"]:
        assert cond.pooled is not None, "FLUX: the conditioning comes from a model without a pooled embedding"
        dtype, device = network.x_embedder.weight.dtype, latents.device
        height, width = (side // PATCH for side in latents.shape[-2:])
        guidance = None
        if network.config.guidance_embeds:
            guidance = torch.full((len(latents),), self.embedded_guidance, device=device)
        output = network(
            packed(latents).to(dtype),
            encoder_hidden_states=cond.embeds.to(dtype),
            pooled_projections=cond.pooled.to(dtype),
            timestep=timesteps.float() / self.schedule.num_timesteps,  # the network multiplies by 1000 itself
            img_ids=image_ids(height, width, device),
            txt_ids=torch.zeros(cond.embeds.shape[1], 3, device=device),
            guidance=guidance,
        )
        return unpacked(output.sample.float(), height, width)


def packed(latents: Float[Tensor, "n c h w"]) -> Float[Tensor, "n tokens features"]:
    """Patches of 2 x 2 cells as tokens, row by row; a token's features are channel by channel."""
    return pixel_unshuffle(latents, PATCH).flatten(2).transpose(1, 2)


def unpacked(tokens: Float[Tensor, "n tokens features"], height: int, width: int) -> Float[Tensor, "n c h w"]:
    """The inverse of ``packed``; ``height`` and ``width`` count tokens."""
    return pixel_shuffle(tokens.transpose(1, 2).unflatten(2, (height, width)), PATCH)


def image_ids(height: int, width: int, device: torch.device) -> Float[Tensor, "tokens 3"]:
    """Each token's position: (0, row, column)."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).flatten(0, 1).float().to(device)
