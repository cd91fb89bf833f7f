"""The embedded world's exact reward: what a picture shows and how well, measured on the pixels.

Because every word of a prompt can be measured in a 32 x 32 picture, the world has a ground-truth reward: no labels,
no trained judge, no noise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from lightning_modules.errors import DataError
from lightning_modules.rewards.base import RewardModel
from lightning_modules.shapes.world import BACKGROUNDS, COLOURS, SHAPES, SIDE, TRIANGLE_HEIGHT, UNIT_AREAS, Scene


@dataclass(frozen=True)
class Measurement:
    """What is seen in n pictures, before anything is asked of it.

    Attributes:
        background: the border's median colour.
        alpha: each pixel's distance from the background colour, 1 at the strongest objects.
        mask: pixels of objects: connected, and more than specks.
        owner: the picture of each of the c objects.
        objects: each object's soft mask.
    """

    background: Float[Tensor, "n 3"]
    alpha: Float[Tensor, "n h w"]
    mask: Bool[Tensor, "n h w"]
    owner: Int[Tensor, " c"]
    objects: Float[Tensor, "c h w"]


# A blank or nearly blank picture has no strongest object: its grain must not be blown up into objects.
_FAINTEST = 0.24  # RGB distance; green on gray, the closest two colours of the world, are 0.54 apart
_SPECK = 7  # pixels; the smallest object covers 40
# Softness of each judgement, in the unit of what it judges: where the factor has fallen to about a half.
_GROUND_SPREAD = 0.13  # RGB distance, of the choice between backgrounds
_HUE_SPREAD = 0.12  # cosine, of the choice between colours; red and yellow are 0.58 alike
_GRAYNESS = 0.10  # chroma; the palette's is 0.46 and more
_COUNT_SPREAD = 0.35  # objects
_SHAPE_SHARPNESS = 35.0  # per unit of overlap; a circle and a square of one area overlap by 0.83
_SIZE_SPREAD = 0.28  # log area; small and large are 0.8 to 0.9 apart
# The square that objects are compared with has slightly round corners, |x|^5 + |y|^5 <= 1: a few pixels of a corner
# missing make a small square blurred, not a circle.
_ROUNDING = 5.0
_ROUNDED_SQUARE_AREA = 4 * math.gamma(1 + 1 / _ROUNDING) ** 2 / math.gamma(1 + 2 / _ROUNDING)
_TINT = 0.45  # RGB distance from the ideal colours
_BLUR = 1.2  # pixels of edge width beyond a clean drawing's
_GRAIN = 0.10  # standard deviation within plain regions
_CLEAN_EDGE = 0.9  # pixels: the edge width of a clean anti-aliased drawing


class ShapesReward(RewardModel):
    """The exact reward of the embedded world, in [0, 1]: correctness x look.

    Correctness is the product of five judgements (background colour, object colour, number of objects, shape,
    size), look the product of three (colours close to the ideal ones, sharp edges, no grain). Multiplied, so that a
    blank picture or a beautiful picture of the wrong thing earns nothing. Each factor is graded.
    """

    name = "shapes"

    def score(self, images: Float[Tensor, "n 3 h w"], prompts: Sequence[str]) -> Float[Tensor, " n"]:
        parts = self.parts(images, prompts)
        return parts["correctness"] * parts["look"]

    def parts(self, images: Float[Tensor, "n 3 h w"], prompts: Sequence[str]) -> dict[str, Float[Tensor, " n"]]:
        if tuple(images.shape[1:]) != (3, SIDE, SIDE):
            raise DataError(
                f"the shapes reward measures 3 x {SIDE} x {SIDE} pictures, got {tuple(images.shape[1:])}; "
                "sample at the embedded pipeline's own size"
            )
        scenes = [Scene.parse(prompt) for prompt in prompts]
        images = images.float().clamp(0, 1)
        seen = measure(images)
        return {"correctness": _correctness(images, seen, scenes), "look": _look(images, seen, scenes)}

    def described(self) -> dict[str, Any]:
        return {**super().described(), "scale": "0 to 1"}


def measure(images: Float[Tensor, "n 3 h w"]) -> Measurement:
    """Finds background and objects in pictures in [0, 1]."""
    border = torch.cat([images[:, :, 0], images[:, :, -1], images[:, :, :, 0], images[:, :, :, -1]], dim=2)
    background = border.median(dim=2).values
    distance = (images - background[:, :, None, None]).norm(dim=1)
    # The 16th largest: half the smallest object, so that neither grain nor ringing decides.
    peak = distance.flatten(1).topk(16, dim=1).values[:, -1].clamp_min(_FAINTEST)
    alpha = (distance / peak[:, None, None]).clamp(0, 1)
    owner, parts = _components(alpha > 0.5)
    mask = torch.zeros_like(alpha).index_add_(0, owner, parts.float()) > 0
    soft = alpha[owner] * _dilate(parts.float())
    return Measurement(background, alpha, mask, owner, soft)


def _components(mask: Bool[Tensor, "n h w"]) -> tuple[Int[Tensor, " c"], Bool[Tensor, "c h w"]]:
    """4-connected regions of more than specks, with their picture's number, in order of pictures."""
    n, h, w = mask.shape
    labels = torch.arange(1, h * w + 1, device=mask.device).float().reshape(1, h, w) * mask
    while True:  # the largest label floods its region; ends because labels only grow
        grown = labels.clone()
        torch.maximum(grown[:, 1:], labels[:, :-1], out=grown[:, 1:])
        torch.maximum(grown[:, :-1], labels[:, 1:], out=grown[:, :-1])
        torch.maximum(grown[:, :, 1:], labels[:, :, :-1], out=grown[:, :, 1:])
        torch.maximum(grown[:, :, :-1], labels[:, :, 1:], out=grown[:, :, :-1])
        grown *= mask
        if torch.equal(grown, labels):
            break
        labels = grown
    flat = labels.reshape(n, h * w).long()
    ones = torch.ones(flat.shape, device=mask.device)
    areas = torch.zeros(n, h * w + 1, device=mask.device).scatter_add_(1, flat, ones)
    areas[:, 0] = 0
    owner, label = (areas >= _SPECK).nonzero(as_tuple=True)
    return owner, labels[owner] == label[:, None, None]


def _dilate(mask: Float[Tensor, "n h w"], by: int = 1) -> Float[Tensor, "n h w"]:
    return F.max_pool2d(mask[:, None], 2 * by + 1, 1, by)[:, 0]


def _templates(objects: Float[Tensor, "c h w"]) -> Float[Tensor, "shapes c h w"]:
    """Every shape drawn with each object's centre and area, in the order of ``SHAPES``."""
    area = objects.sum(dim=(1, 2)).clamp_min(1.0)[:, None, None]
    side = torch.arange(objects.shape[-1], device=objects.device, dtype=torch.float32)
    x = side[None, None, :] - ((objects * side[None, None, :]).sum(dim=(1, 2), keepdim=True) / area)
    y = side[None, :, None] - ((objects * side[None, :, None]).sum(dim=(1, 2), keepdim=True) / area)

    def inside(distance: Tensor) -> Tensor:
        return (distance + 0.5).clamp(0, 1)  # distance to the outline in pixels, positive within

    circle = inside((area / UNIT_AREAS["circle"]).sqrt() - (x.square() + y.square()).sqrt())
    half = (area / _ROUNDED_SQUARE_AREA).sqrt()
    square = inside(half - (x.abs().pow(_ROUNDING) + y.abs().pow(_ROUNDING)).pow(1 / _ROUNDING))
    half = (area / UNIT_AREAS["triangle"]).sqrt()
    height = TRIANGLE_HEIGHT * half  # the centre lies at a third of it
    slant = (half * (y + height * 2 / 3) - height * x.abs()) / (half.square() + height.square()).sqrt()
    triangle = inside(height / 3 - y) * inside(slant)
    return torch.stack([circle, square, triangle])


def _mean_over_objects(values: Float[Tensor, " c"], owner: Int[Tensor, " c"], n: int) -> Float[Tensor, " n"]:
    """0 for a picture without objects."""
    total = torch.zeros(n, device=values.device).index_add_(0, owner, values)
    return total / torch.bincount(owner, minlength=n).clamp_min(1)


def _ground_choice(colours: Float[Tensor, "m 3"], palette: Tensor, asked: Int[Tensor, " m"]) -> Float[Tensor, " m"]:
    """Probability that each background is the asked one."""
    distance = torch.cdist(colours, palette)
    chosen = F.softmax(-distance.square() / (2 * _GROUND_SPREAD**2), dim=1)
    return chosen.gather(1, asked[:, None])[:, 0]


def _hue_choice(colours: Float[Tensor, "m 3"], palette: Tensor, asked: Int[Tensor, " m"]) -> Float[Tensor, " m"]:
    """Probability that each colour is the asked one by its hue alone; a gray is none of them.

    Pale or dark is a matter of look: by distance alone a pale green would be nearer to gray than to green.
    """

    def chroma(colour: Tensor) -> Tensor:
        return colour - colour.mean(dim=1, keepdim=True)

    alike = F.cosine_similarity(chroma(colours)[:, None], chroma(palette)[None], dim=2)
    strength = (chroma(colours).norm(dim=1) / _GRAYNESS).pow(4)
    return strength / (1 + strength) * F.softmax(alike / _HUE_SPREAD, dim=1).gather(1, asked[:, None])[:, 0]


def _ask(words: Sequence[str], table: Sequence[str], device: torch.device) -> Int[Tensor, " n"]:
    return torch.tensor([table.index(word) for word in words], device=device)


def _object_colours(images: Tensor, objects: Float[Tensor, "c h w"], owner: Int[Tensor, " c"]) -> Float[Tensor, "c 3"]:
    """Mean colour of each object, its edge left out by weighting."""
    weight = objects.pow(4)
    return torch.einsum("chw,cdhw->cd", weight, images[owner]) / weight.sum(dim=(1, 2)).clamp_min(1e-6)[:, None]


def _correctness(images: Tensor, seen: Measurement, scenes: Sequence[Scene]) -> Float[Tensor, " n"]:
    device, n, owner = images.device, len(scenes), seen.owner
    grounds = torch.tensor(list(BACKGROUNDS.values()), device=device)
    ground = _ask([scene.background for scene in scenes], list(BACKGROUNDS), device)
    background = _ground_choice(seen.background, grounds, ground)

    palette = torch.tensor(list(COLOURS.values()), device=device)
    asked_colour = _ask([scene.colour for scene in scenes], list(COLOURS), device)[owner]
    colour = _hue_choice(_object_colours(images, seen.objects, owner), palette, asked_colour)

    templates = _templates(seen.objects)
    overlap = torch.minimum(templates, seen.objects).sum(dim=(2, 3)) / torch.maximum(templates, seen.objects).sum(
        dim=(2, 3)
    ).clamp_min(1e-6)
    asked_shape = _ask([scene.shape for scene in scenes], SHAPES, device)[owner]
    shape = F.softmax(_SHAPE_SHARPNESS * overlap, dim=0).gather(0, asked_shape[None])[0]

    area = seen.objects.sum(dim=(1, 2))
    ideal = torch.tensor([scene.area for scene in scenes], device=device)
    off = (area / ideal[owner]).log().abs()
    size = 1 / (1 + ((off - _SIZE_SPREAD / 2).clamp_min(0) / _SIZE_SPREAD).pow(4))

    # An object counts in full from half its proper area: a fragment is neither nothing nor an object.
    found = torch.zeros(n, device=device).index_add_(0, owner, (2 * area / ideal[owner]).clamp(max=1))
    asked = torch.tensor([float(scene.count) for scene in scenes], device=device)
    count = torch.exp(-((found - asked) / _COUNT_SPREAD).square())
    return background * count * _mean_over_objects(colour * shape * size, owner, n)


def _fall(value: Tensor, half: float) -> Tensor:
    """1 at 0, a half at ``half``, never flat beyond."""
    return 1 / (1 + (value / half).square())


def _look(images: Tensor, seen: Measurement, scenes: Sequence[Scene]) -> Float[Tensor, " n"]:
    device = images.device
    mask = seen.mask.float()
    near, core = _dilate(mask, 2), 1 - _dilate(1 - mask)
    ideal_object = torch.tensor([COLOURS[scene.colour] for scene in scenes], device=device)
    ideal_ground = torch.tensor([BACKGROUNDS[scene.background] for scene in scenes], device=device)

    def mean(weight: Tensor, values: Tensor) -> Tensor:
        return torch.einsum("nhw,ndhw->nd", weight, values) / weight.sum(dim=(1, 2)).clamp_min(1)[:, None]

    inner = mean(core, images)
    tint = torch.maximum((inner - ideal_object).norm(dim=1), (seen.background - ideal_ground).norm(dim=1))

    def spread(weight: Tensor, centre: Tensor) -> Tensor:
        return mean(weight, (images - centre[:, :, None, None]).square()).mean(dim=1).sqrt()

    grain = (spread(core, inner) + spread(1 - near, mean(1 - near, images))) / 2

    alpha = seen.alpha * near
    slope_x, slope_y = alpha[:, 1:, :-1] - alpha[:, :-1, :-1], alpha[:, :-1, 1:] - alpha[:, :-1, :-1]
    length = (slope_x.square() + slope_y.square()).sqrt().sum(dim=(1, 2))  # of all outlines, in pixels
    edge = (4 * alpha * (1 - alpha)).sum(dim=(1, 2)) / length.clamp_min(1)
    blur = (edge - _CLEAN_EDGE).clamp_min(0)
    seen_any = (core.sum(dim=(1, 2)) > 0).float()
    return seen_any * _fall(tint, _TINT) * _fall(blur, _BLUR) * _fall(grain, _GRAIN)
