"""Pictures to a vision tower's input, as the published scorers' own code makes it of files of 8 bits per colour.

Pictures are rounded to 8 bits first, so that a score can be repeated from the saved PNG, bit for bit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # CLIP's, of [0, 1]
SIDE = 224
# What all that resize as Pillow does have in common, as they describe themselves.
SHORT_SIDE = {"family": "short_side", "antialias": True, "rounded_to_8_bit": "first and after each pass"}
_PRECISION = 22  # bits of Pillow's weights behind the point


def eight_bit_levels(images: Float[Tensor, "n 3 H W"]) -> Float[Tensor, "n 3 H W"]:
    """0 .. 255, whole numbers: pictures in [0, 1], cut off and rounded half to even, as diffusers saves them."""
    return (images.float().clamp(0, 1) * 255).round()


def pillow_resize(levels: Float[Tensor, "n 3 H W"], height: int, width: int) -> Float[Tensor, "n 3 height width"]:
    """Pillow's bicubic resize of 8-bit pictures, level by level: horizontally, then vertically, rounded after each.

    Its weights are whole numbers, so that their sums are exact in fp64, whatever the device and the order.
    """
    if levels.device.type == "mps":  # has no fp64
        return pillow_resize(levels.cpu(), height, width).to(levels.device)
    found = levels.double()
    if width != levels.shape[3]:
        found = _rounded(found @ _weights(levels.shape[3], width).to(found.device).T)
    if height != levels.shape[2]:
        found = _rounded(_weights(levels.shape[2], height).to(found.device) @ found)
    return found.float()


def _rounded(sums: Tensor) -> Tensor:
    return ((sums + 2 ** (_PRECISION - 1)) / 2**_PRECISION).floor().clamp(0, 255)


@lru_cache(maxsize=64)
def _weights(size: int, target: int) -> Tensor:
    """``[target, size]``: Pillow's antialiased bicubic weights (a = -0.5; src/libImaging/Resample.c)."""
    scale = size / target
    widened = max(scale, 1.0)
    support = 2.0 * widened
    weights = torch.zeros(target, size, dtype=torch.float64)
    for row in range(target):
        centre = (row + 0.5) * scale
        first, last = max(int(centre - support + 0.5), 0), min(int(centre + support + 0.5), size)
        values = [_bicubic((x - centre + 0.5) / widened) for x in range(first, last)]
        total = sum(values)
        whole = [math.floor(value / total * 2**_PRECISION + 0.5) if value > 0 else
                 math.ceil(value / total * 2**_PRECISION - 0.5) for value in values]  # fmt: skip
        weights[row, first:last] = torch.tensor(whole, dtype=torch.float64)
    return weights


def _bicubic(x: float, a: float = -0.5) -> float:
    x = abs(x)
    if x < 1:
        return ((a + 2) * x - (a + 3)) * x * x + 1
    return (((x - 5) * x + 8) * x - 4) * a if x < 2 else 0.0


@dataclass(frozen=True)
class ShortSide:
    """The short side becomes 224, as Pillow resizes, and the middle is cut out: open_clip, OpenAI's clip, ImageReward.

    Attributes:
        even_offset: whether the middle begins at round-half-even((side - 224) / 2) as in torchvision, or at the floor
            as in transformers: one pixel apart where side - 224 is 3 mod 4.
    """

    even_offset: bool = True

    def described(self) -> dict[str, Any]:
        """The family's name and what may differ within it, as plain values."""
        return SHORT_SIDE | {"side": SIDE, "crop_offset": "half to even" if self.even_offset else "floor"}

    def __call__(self, images: Float[Tensor, "n 3 H W"]) -> Float[Tensor, "n 3 224 224"]:
        height, width = images.shape[-2:]
        short = min(height, width)
        levels = pillow_resize(eight_bit_levels(images), SIDE * height // short, SIDE * width // short)
        top, left = (round((side - SIDE) / 2) if self.even_offset else (side - SIDE) // 2 for side in levels.shape[-2:])
        return normalised(levels[..., top : top + SIDE, left : left + SIDE] / 255)


@dataclass(frozen=True)
class Letterbox:
    """The long side becomes 224 in one pass on numbers, and black fills the square: the hpsv2 package's.

    Overshoot of the resize stays; a picture whose long side is 224 and that is no square is padded as well, where the
    package fails.

    Attributes:
        antialias: as with torchvision 0.17 and later; without, as with those before.
    """

    antialias: bool = True

    def described(self) -> dict[str, Any]:
        """As ``ShortSide``'s."""
        return {"family": "letterbox", "side": SIDE, "antialias": self.antialias, "rounded_to_8_bit": "first"}

    def __call__(self, images: Float[Tensor, "n 3 H W"]) -> Float[Tensor, "n 3 224 224"]:
        height, width = images.shape[-2:]
        scale = SIDE / max(height, width)
        size, numbers = (round(height * scale), round(width * scale)), eight_bit_levels(images) / 255
        if size != (height, width):
            numbers = F.interpolate(numbers, size, mode="bicubic", align_corners=False, antialias=self.antialias)
        below, right = (SIDE - side for side in size)
        left, top = right // 2, below // 2
        return normalised(F.pad(numbers, (left, right - left, top, below - top)))


def normalised(images: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n 3 h w"]:
    """Less CLIP's mean, over its standard deviation, by colour."""
    mean, std = (torch.tensor(values, device=images.device).view(3, 1, 1) for values in (MEAN, STD))
    return (images - mean) / std
