"""Pictures as people and files have them: eight bits per colour."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

from lightning_modules.errors import UserError


def eight_bit(images: Float[Tensor, "n 3 H W"], prompts: Sequence[str]) -> UInt8[np.ndarray, "n H W 3"]:
    """Bytes of pictures in [0, 1]; what lies outside is cut off, as diffusers does.

    Args:
        images: RGB.
        prompts: what they were drawn from, length n; the message names one.

    Raises:
        UserError: a picture holds numbers that are not finite. As bytes it would be black and look like a picture.
    """
    finite = images.isfinite().flatten(1).all(dim=1).tolist()
    if not all(finite):
        prompt = prompts[finite.index(False)]
        raise UserError(
            f"{finite.count(False)} of {len(finite)} pictures are not finite numbers (the first: {prompt!r}): "
            "autoencoders may overflow in half precision, use fp32 or bf16; or the training has diverged"
        )
    return (images.float().clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def png(picture: UInt8[np.ndarray, "H W 3"]) -> bytes:
    """A PNG file: JPEG's own artefacts would be the largest flaw of small pictures, and rewards see them."""
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(picture)).save(buffer, "PNG")
    return buffer.getvalue()
