"""The embedded world's pictures: captioned shapes, drawn deliberately imperfect, as preference pairs.

A model trained on them is visibly imperfect in the same ways, which leaves alignment something to do that the
exact reward can see. Every picture is a pure function of (seed, index).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache, lru_cache
from typing import Any

import lightning as L
import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw, ImageFilter
from torch import Tensor

from lightning_modules.batches import PreferencePairs
from lightning_modules.errors import ConfigError
from lightning_modules.randomness import derive_seed, generator
from lightning_modules.shapes.reward import (
    BACKGROUNDS,
    COLOURS,
    HALF_WIDTHS,
    SCENES,
    SHAPES,
    SIDE,
    SIZES,
    TRIANGLE_HEIGHT,
    Scene,
    ShapesReward,
)

TIME_IDS = (float(SIDE), float(SIDE), 0.0, 0.0, float(SIDE), float(SIDE))  # no crop: the order of PreferencePairs
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


class ShapesPairs:
    """A fixed data set of imperfect pairs, drawn once and kept as bytes, so that drawing never bounds training.

    Pair j is two independent drawings of its prompt, a pure function of (seed, purpose, j, prompt).
    """

    def __init__(self, prompts: Sequence[str], seed: int, ranked: bool, purpose: str = "train") -> None:
        self.prompts = tuple(prompts)
        self.pictures = torch.stack([self._drawn(j, seed, purpose) for j in range(len(self))])  # uint8 [n, 2, 3, h, w]
        if ranked:
            self._rank()

    def _drawn(self, j: int, seed: int, purpose: str) -> UInt8[Tensor, "2 3 h w"]:
        scene = Scene.parse(self.prompts[j])
        return torch.stack(
            [draw_imperfect(scene, random_numbers(seed, "shapes", purpose, "drawing", j, k)) for k in (0, 1)]
        )

    def _rank(self) -> None:
        """Puts the picture with the higher exact reward first."""
        reward = ShapesReward()
        for start in range(0, len(self), 1024):
            block, prompts = self.pictures[start : start + 1024], self.prompts[start : start + 1024]
            first, second = (reward.score(block[:, k].float() / 255, prompts) for k in (0, 1))
            worse = first < second
            block[worse] = block[worse].flip(1)

    def __len__(self) -> int:
        return len(self.prompts)

    def batch(self, rows: list[int], indices: list[int]) -> PreferencePairs:
        """The pairs ``rows`` of the data set, as the samples ``indices`` of the run."""
        pictures = self.pictures[rows].float().div_(127.5).sub_(1)
        time_ids = torch.tensor(TIME_IDS).expand(len(rows), 6)
        prompts = tuple(self.prompts[row] for row in rows)
        return PreferencePairs(pictures[:, 0], pictures[:, 1], prompts, time_ids, time_ids, torch.tensor(indices))


class _Epoch:
    """The batches of one rank, from the current position of the run to the end of its epoch.

    A plain iterable: the data lies in memory, and Lightning leaves its sampling alone. Each ``iter`` asks for the
    position anew, so that a resumed run goes on where it stopped and a second ``iter`` does no harm.
    """

    def __init__(self, length: int, position: Callable[[], int], make: Callable[[int], PreferencePairs]) -> None:
        self.length, self.position, self.make = length, position, make

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[PreferencePairs]:
        start = self.position()
        for m in range(start, (start // self.length + 1) * self.length):
            yield self.make(m)

    def state_dict(self) -> dict[str, Any]:
        """Nothing: the position is derived. Its presence tells Lightning that stopping within an epoch is safe."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to restore."""


class ShapesDataModule(L.LightningDataModule):
    """Preference pairs of the embedded world, for pretraining and for quick experiments without files.

    Sample n of the run is pair ``order(epoch)[n mod size]`` of the fixed data set: a pure function of (seed, n),
    whatever the batch size, the number of ranks and the history of the run. Validation gives the pictures of the
    held-out validation prompts, 4 pairs each, in order.

    Args:
        batch_size: pairs a batch and rank.
        batches_per_epoch: batches a rank and epoch.
        size: pairs in the fixed data set; 1,000 take about a second to draw.
        seed: of the data and of its order.
        ranked: whether the picture with the higher exact reward is ``chosen``; False leaves the pairs as drawn,
            for pretraining on the data as it is.
    """

    def __init__(
        self, batch_size: int = 32, batches_per_epoch: int = 100, size: int = 8192, seed: int = 0, ranked: bool = True
    ) -> None:
        super().__init__()
        for name, value in (("batch_size", batch_size), ("batches_per_epoch", batches_per_epoch), ("size", size)):
            if value < 1:
                raise ConfigError(f"data.{name} must be at least 1, got {value}")
        self.batch_size, self.batches_per_epoch, self.size = batch_size, batches_per_epoch, size
        self.seed, self.ranked = seed, ranked
        self._train: ShapesPairs | None = None

    @property
    def train(self) -> ShapesPairs:
        """The data set, drawn at first use."""
        if self._train is None:
            self._train = ShapesPairs(random_prompts("train", self.size, self.seed), self.seed, self.ranked)
        return self._train

    def setup(self, stage: str) -> None:
        if stage == "fit":
            _ = self.train

    def sample_row(self, n: int) -> int:
        """The pair of the data set that sample n of the run is."""
        epoch, place = divmod(n, self.size)
        return _order(self.seed, epoch, self.size)[place]

    def train_batch(self, m: int, rank: int = 0, world: int = 1) -> PreferencePairs:
        """Batch m of a rank: the samples (m world + rank) batch_size ... of the run."""
        first = (m * world + rank) * self.batch_size
        indices = list(range(first, first + self.batch_size))
        return self.train.batch([self.sample_row(n) for n in indices], indices)

    def train_dataloader(self) -> _Epoch:
        trainer = self.trainer
        if trainer is None:
            return _Epoch(self.batches_per_epoch, lambda: 0, self.train_batch)
        rank, world = trainer.global_rank, trainer.world_size
        return _Epoch(
            self.batches_per_epoch,
            lambda: trainer.fit_loop.epoch_loop.batch_progress.total.processed,  # type: ignore[attr-defined]
            lambda m: self.train_batch(m, rank, world),
        )

    def val_dataloader(self) -> _Epoch:
        pairs = _validation_pairs(prompt_splits()["validation"], self.seed)
        blocks = [list(range(start, min(start + 48, len(pairs)))) for start in range(0, len(pairs), 48)]
        return _Epoch(len(blocks), lambda: 0, lambda m: pairs.batch(blocks[m], blocks[m]))


@lru_cache(maxsize=4)
def _order(seed: int, epoch: int, size: int) -> list[int]:
    order: list[int] = torch.randperm(size, generator=generator(seed, "shapes order", epoch)).tolist()
    return order


@lru_cache(maxsize=2)
def _validation_pairs(prompts: tuple[str, ...], seed: int) -> ShapesPairs:
    return ShapesPairs(prompts * 4, seed, ranked=False, purpose="validation")


def as_unit(pictures: UInt8[Tensor, "n 3 h w"]) -> Float[Tensor, "n 3 h w"]:
    """Bytes to [0, 1], the range that rewards read."""
    return pictures.float() / 255
