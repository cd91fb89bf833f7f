"""Stable Diffusion 3 and 3.5 (arXiv 2403.03206) as a policy: three text encoders, a transformer of joint attention."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import SD3Transformer2DModel
from diffusers.loaders import SD3LoraLoaderMixin
from diffusers.models.attention import JointTransformerBlock
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad
from transformers import CLIPTextModelWithProjection

from lightning_modules.batches import Conditioning
from lightning_modules.policies.flow_transformer import CLIP_CUTS, T5_CUTS, FlowTransformer, token_ids
from lightning_modules.weights.pretrained import Pretrained
from lightning_modules.weights.tokenizers import read_tokenizer


class StableDiffusion3(FlowTransformer):
    """A diffusers ``StableDiffusion3Pipeline`` taken apart; arguments as ``FlowTransformer``'s.

    Guidance contrasts with the empty prompt of all three text encoders. A prompt's embeddings are the two CLIPs' last
    hidden states but one side by side, filled up with zeros to T5's width, and then T5's tokens.

    LoRA goes by default where flow_grpo's recipe has it; ``to_q``, ``to_k``, ... without ``attn.`` reach the second
    attention of SD3.5 medium as well. The adapter on the last block's ``add_q_proj`` never gets a gradient: that block
    has no text output.
    """

    denoiser_class = SD3Transformer2DModel
    lora_loader = SD3LoraLoaderMixin
    lora_targets = (
        "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out",
        "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0",
    )  # fmt: skip
    blocks = (JointTransformerBlock,)
    pipeline_own_levels = False
    pipeline_t5_tokens = 256

    def _load_text(self, pipeline: Pretrained, variant: str | None, dtype: torch.dtype) -> None:
        first, second = pipeline.component("text_encoder"), pipeline.component("text_encoder_2")
        self.text_encoder = first.load_model(CLIPTextModelWithProjection, dtype, variant)
        self.text_encoder_2 = second.load_model(CLIPTextModelWithProjection, dtype, variant)
        self.tokenizer = read_tokenizer(pipeline, "tokenizer", self.text_encoder)
        self.tokenizer_2 = read_tokenizer(pipeline, "tokenizer_2", self.text_encoder_2)
        self.text_encoder_3, self.tokenizer_3 = self._load_t5(pipeline, 3, dtype, variant)

    def _encode_text(self, prompts: list[str]) -> Conditioning:
        clips = []
        for encoder, tokenizer in ((self.text_encoder, self.tokenizer), (self.text_encoder_2, self.tokenizer_2)):
            words = token_ids(tokenizer, prompts, tokenizer.model_max_length, CLIP_CUTS).to(encoder.device)
            clips.append(encoder(words, output_hidden_states=True))
        ids = token_ids(self.tokenizer_3, prompts, self.t5_tokens, T5_CUTS).to(self.text_encoder_3.device)
        t5 = self.text_encoder_3(ids).last_hidden_state
        beside = torch.cat([clip.hidden_states[-2] for clip in clips], dim=-1)
        return Conditioning(
            embeds=torch.cat([pad(beside, (0, t5.shape[-1] - beside.shape[-1])), t5], dim=1),
            pooled=torch.cat([clip.text_embeds for clip in clips], dim=-1),
        )

    def _denoise(
        self, network: Any, latents: Float[Tensor, "n c h w"], timesteps: Tensor, cond: Conditioning
    ) -> Float[Tensor, "n c h w"]:
        assert cond.pooled is not None, "SD3: the conditioning comes from a model without a pooled embedding"
        dtype = network.context_embedder.weight.dtype
        output = network(
            latents.to(dtype),
            encoder_hidden_states=cond.embeds.to(dtype),
            pooled_projections=cond.pooled.to(dtype),
            timestep=timesteps.float(),
        )
        return output.sample.float()
