"""A small decoder in place of the VAE's, for looking at many x0-predictions (``madebyollin/taesd``, ``taesdxl``)."""

from __future__ import annotations

from typing import Literal

import torch
from diffusers import AutoencoderTiny
from jaxtyping import Float
from torch import Tensor, nn

from lightning_modules.weights.pretrained import DTYPES, Pretrained


class TinyDecoder(nn.Module):
    """Decodes a policy's latents as ``DiffusionPolicy.decode`` does, roughly and cheaply. Frozen.

    With the full decoder, decoding is the largest part of an SPO iteration: 43% of its multiply-accumulates at
    SD 1.5's size. Whether a scorer still judges alike is what a pool's ``decoder_agreement`` tells.

    Args:
        pretrained: folder or hub id of a diffusers ``AutoencoderTiny`` for the policy's latent space:
            ``madebyollin/taesd`` for SD 1.x and 2.x, ``madebyollin/taesdxl`` for SDXL.
        dtype: number type it computes in, whatever autocast says.

    Raises:
        ConfigError: missing or damaged weights.
    """

    def __init__(self, pretrained: str, dtype: Literal["fp32", "bf16", "fp16"] = "fp32") -> None:
        super().__init__()
        # Only its decoder is ever used.
        self.decoder = (
            Pretrained.find(pretrained).load_model(AutoencoderTiny, DTYPES[dtype]).decoder.requires_grad_(False).eval()
        )

    @torch.no_grad()
    def forward(self, latents: Float[Tensor, "n c h w"]) -> Float[Tensor, "n 3 H W"]:
        """RGB in [0, 1], fp32, of latents multiplied by the VAE's scaling factor."""
        weight = next(self.decoder.parameters())
        with torch.autocast(latents.device.type, enabled=False):
            images = self.decoder(latents.to(weight.dtype))
        return (images.float() / 2 + 0.5).clamp(0, 1)
