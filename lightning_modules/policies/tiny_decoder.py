"""A small decoder in place of the VAE's, for looking at many x0-predictions (``madebyollin/taesd``, ``taesdxl``)."""

from __future__ import annotations

from typing import Any, Literal

import torch
from diffusers import AutoencoderTiny
from jaxtyping import Float
from torch import Tensor, nn

from lightning_modules.errors import ConfigError
from lightning_modules.weights.pretrained import DTYPES, Pretrained


class TinyDecoder(nn.Module):
    """Decodes a policy's latents as ``DiffusionPolicy.decode`` does, roughly and cheaply. Frozen.

    With the full decoder, decoding is the largest part of an SPO iteration: 43% of its multiply-accumulates at
    SD 1.5's size. Whether a scorer still judges alike is what a pool's ``decoder_agreement`` tells.

    Args:
        pretrained: folder or hub id of a diffusers ``AutoencoderTiny`` for the policy's latent space:
            ``madebyollin/taesd`` for SD 1.x and 2.x, ``madebyollin/taesdxl`` for SDXL.
        dtype: number type it computes in, whatever autocast says.
        least_agreement: a pool whose ``decoder_agreement`` is below it ends the run; None demands nothing.

    Raises:
        ConfigError: missing or damaged weights, or an agreement out of range.
    """

    def __init__(
        self, pretrained: str, dtype: Literal["fp32", "bf16", "fp16"] = "fp32", least_agreement: float | None = None
    ) -> None:
        super().__init__()
        if least_agreement is not None and not 0 <= least_agreement <= 1:
            raise ConfigError(f"TinyDecoder: least_agreement is a share from 0 to 1, got {least_agreement}")
        network: Any = Pretrained.find(pretrained).load_model(AutoencoderTiny, DTYPES[dtype])
        # Only its decoder is ever used.
        self.decoder = network.decoder.requires_grad_(False).eval()
        self._least_agreement = least_agreement  # not public: a pool is not named after it, for it shapes none

    @property
    def least_agreement(self) -> float | None:
        return self._least_agreement

    @property
    def latent_channels(self) -> int:
        """c."""
        return next(part.in_channels for part in self.decoder.modules() if isinstance(part, nn.Conv2d))

    @property
    def downscale(self) -> int:
        """Pixels per latent cell, along one side."""
        return 2 ** sum(isinstance(part, nn.Upsample) for part in self.decoder.modules())

    @torch.no_grad()
    def forward(self, latents: Float[Tensor, "n c h w"]) -> Float[Tensor, "n 3 H W"]:
        """RGB in [0, 1], fp32, of latents multiplied by the VAE's scaling factor."""
        weight = next(self.decoder.parameters())
        with torch.autocast(latents.device.type, enabled=False):
            images = self.decoder(latents.to(weight.dtype))
        return (images.float() / 2 + 0.5).clamp(0, 1)
