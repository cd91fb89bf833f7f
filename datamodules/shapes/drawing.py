"""The embedded world's pictures: a scene drawn clean, or deliberately imperfect. Each is a function of its key alone.

A model trained on the imperfect ones is visibly imperfect in the same ways, which leaves alignment something to do
that the exact reward can see.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw, ImageFilter
from torch import Tensor

from lightning_modules.randomness import derive_seed, generator
from lightning_modules.shapes.world import (
    BACKGROUNDS,
    COLOURS,
    HALF_WIDTHS,
    SCENES,
    SHAPES,
    SIDE,
    SIZES,
    TRIANGLE_HEIGHT,
    Scene,
)

_SUPERSAMPLING = 4  # drawn at 128 x 128 and averaged down: anti-aliased edges
_MARGIN = 0.9  # pixels kept free around every object, so that no two touch


@cache
def prompt_splits() -> dict[str, tuple[str, ...]]:
    """The fixed splits ``train`` (132), ``validation`` (36) and ``test`` (48) of the 216 prompts.

    Validation and test hold combinations that training never shows, of words that it does.
    """
    captions = list(SCENES)
    order = torch.randperm(len(captions), generator=generator("shapes", "prompt splits")).tolist()
    mixed = [captions[i] for i in order]
    return {"train": tuple(mixed[84:]), "validation": tuple(mixed[48:84]), "test": tuple(mixed[:48])}


def random_prompts(split: str, n: int, seed: int) -> list[str]:
    """n prompts of a split, drawn with replacement."""
    prompts = prompt_splits()[split]
    return [prompts[derive_seed(seed, "shapes", split, "prompt", j) % len(prompts)] for j in range(n)]


def random_numbers(*key: int | str) -> np.random.Generator:
    """A numpy generator keyed like ``lightning_modules.randomness``: drawing asks for a few numbers at a time."""
    return np.random.default_rng(derive_seed(*key))


def draw(
    scene: Scene, rng: np.random.Generator, scale: float = 1.0, paint: tuple[float, ...] | None = None
) -> Image.Image:
    """A clean RGB picture of the scene, 32 x 32, at a random layout.

    Args:
        scale: of all sizes, around the proper one.
        paint: the objects' colour in [0, 1]; None for the proper one.
    """
    k = _SUPERSAMPLING
    picture = Image.new("RGB", (SIDE * k, SIDE * k), _bytes(BACKGROUNDS[scene.background]))
    pen = ImageDraw.Draw(picture)
    colour = _bytes(paint or COLOURS[scene.colour])
    for x, y, half in _layout(scene, rng, scale):
        x, y, half = x * k, y * k, half * k
        if scene.shape == "circle":
            pen.ellipse((x - half, y - half, x + half, y + half), fill=colour)
        elif scene.shape == "square":
            pen.rectangle((x - half, y - half, x + half, y + half), fill=colour)
        else:
            tall = TRIANGLE_HEIGHT * half / 2
            pen.polygon([(x, y - tall), (x + half, y + tall), (x - half, y + tall)], fill=colour)
    return picture.resize((SIDE, SIDE), Image.Resampling.BOX)


def _layout(scene: Scene, rng: np.random.Generator, scale: float) -> Iterator[tuple[float, float, float]]:
    """Centre and half width of each object: one anywhere, several in different quarters of the picture."""
    cell = SIDE / 2 if scene.count > 1 else float(SIDE)
    quarters = rng.permutation(4)[: scene.count] if scene.count > 1 else [0]
    for quarter in quarters:
        half = HALF_WIDTHS[scene.shape, scene.size] * scale * rng.uniform(0.96, 1.04)
        play = max(cell / 2 - half - _MARGIN, 0.0)
        x, y = rng.uniform(-play, play, 2) + cell / 2
        yield x + cell * (quarter % 2), y + cell * (quarter // 2), half


def _bytes(colour: tuple[float, ...]) -> tuple[int, ...]:
    return tuple(round(255 * channel) for channel in colour)


def draw_imperfect(scene: Scene, rng: np.random.Generator, misread: float = 1 / 12) -> UInt8[Tensor, "3 h w"]:
    """A picture of the scene as a careless artist makes it.

    Washed out, blurred, grainy, off-colour, of a wrong size: each with its own random strength, from not at
    all to plainly visible. With probability ``misread`` one word of the content itself is wrong.
    """
    drawn = _misread(scene, rng) if rng.random() < misread else scene
    paint = np.clip(np.array(COLOURS[drawn.colour]) + rng.normal(0, 0.10, 3) * rng.random(), 0, 1)
    picture = draw(drawn, rng, scale=1 + 0.12 * rng.normal() * rng.random(), paint=tuple(paint))
    return degrade(picture, rng)


def _misread(scene: Scene, rng: np.random.Generator) -> Scene:
    """The scene with one word changed."""
    word = rng.integers(5)
    count, size, colour, shape, background = scene.count, scene.size, scene.colour, scene.shape, scene.background
    if word == 0:
        count = int(rng.choice([other for other in (1, 2, 3) if other != count]))
    elif word == 1:
        size = str(rng.choice([other for other in SIZES if other != size]))
    elif word == 2:
        colour = str(rng.choice([other for other in COLOURS if other != colour]))
    elif word == 3:
        shape = str(rng.choice([other for other in SHAPES if other != shape]))
    else:
        background = str(rng.choice([other for other in BACKGROUNDS if other != background]))
    return Scene(count, size, colour, shape, background)


def degrade(picture: Image.Image, rng: np.random.Generator, strength: float = 1.0) -> UInt8[Tensor, "3 h w"]:
    """Blur, wash out, tint, blotch and add grain, each by a random amount whose range ``strength`` multiplies."""
    blur, wash, tint, blotch, grain = strength * rng.random(5) ** 2
    picture = picture.filter(ImageFilter.GaussianBlur(float(1.0 * blur)))
    pixels = np.asarray(picture, dtype=np.float32) / 255
    pixels = pixels + 0.45 * wash * (rng.uniform(0.35, 0.65) - pixels)  # towards a gray: less contrast and colour
    pixels = pixels + 0.10 * tint * rng.normal(size=3)
    # Blotches are coarse enough to survive the autoencoder, so that the model learns them; pixel noise is not.
    coarse = rng.normal(size=(4, 4, 3)).clip(-2, 2)
    coarse = np.stack([_enlarge(coarse[..., channel]) for channel in range(3)], axis=-1)
    pixels = pixels + 0.05 * blotch * coarse + 0.015 * grain * rng.normal(size=pixels.shape)
    pixels = np.rint(pixels.clip(0, 1) * 255).astype(np.uint8)
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def _enlarge(coarse: np.ndarray) -> np.ndarray:
    return np.asarray(Image.fromarray(coarse.astype(np.float32)).resize((SIDE, SIDE), Image.Resampling.BICUBIC))


def as_unit(pictures: UInt8[Tensor, "n 3 h w"]) -> Float[Tensor, "n 3 h w"]:
    """Bytes to [0, 1], the range that rewards read."""
    return pictures.float() / 255
