"""Pairs of a preference data set as batches of one: decoded, cropped and flipped alike, or read as latents."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image, ImageOps
from torch import Tensor

from datamodules.shards.pictures import MAX_PICTURE_PIXELS
from datamodules.shards.reader import ShardSet
from datamodules.shards.samples import Sample
from datamodules.stream.loading import ShardSamples
from datamodules.stream.order import ShuffledOrder, StoredOrder
from lightning_modules.batches import Conditioning, LatentPairs, PreferencePairs
from lightning_modules.errors import DataError
from lightning_modules.randomness import generator, rand

MAX_EXAMPLES_PER_PROMPT = 1e9


@dataclass(frozen=True)
class PairTransform:
    """Two pictures of any size -> two squares: resize the short side, crop, flip.

    Chosen and rejected share the flip and the relative position of the crop, so that neither tells them apart.

    Attributes:
        resolution: side of the squares, in pixels; smaller pictures are enlarged.
        random_crop: crop anywhere along the long side; else in its middle.
        horizontal_flip: mirror half of the pairs.
    """

    resolution: int
    random_crop: bool = False
    horizontal_flip: bool = False

    def __call__(
        self, chosen: Image.Image, rejected: Image.Image, source: torch.Generator | None
    ) -> tuple[Float[Tensor, "3 H W"], Float[Tensor, "3 H W"], Float[Tensor, " 6"], Float[Tensor, " 6"]]:
        """Both pictures in [-1, 1] and the time ids of both (see ``PreferencePairs``).

        Args:
            chosen, rejected: RGB pictures.
            source: of the flip and the crop; None for a centre crop without a flip.

        Raises:
            DataError: a picture is so narrow that resizing would make it larger than ``MAX_PICTURE_PIXELS``.
        """
        position, mirror = self._drawn(source)
        first, first_ids = self._square(chosen, position, mirror)
        second, second_ids = self._square(rejected, position, mirror)
        return first, second, first_ids, second_ids

    def single(
        self, image: Image.Image, source: torch.Generator | None
    ) -> tuple[Float[Tensor, "3 H W"], Float[Tensor, " 6"]]:
        """As of a pair, of a picture alone."""
        return self._square(image, *self._drawn(source))

    def _drawn(self, source: torch.Generator | None) -> tuple[tuple[float, float], bool]:
        """Where to crop, and whether to mirror."""
        flip, across, down = (0.0, 0.5, 0.5) if source is None else rand([source] * 3).tolist()
        mirror = source is not None and self.horizontal_flip and flip < 0.5
        return (across, down) if source is not None and self.random_crop else (0.5, 0.5), mirror

    def _square(
        self, image: Image.Image, position: tuple[float, float], mirror: bool
    ) -> tuple[Float[Tensor, "3 H W"], Float[Tensor, " 6"]]:
        side, (width, height) = self.resolution, image.size
        scale = side / min(width, height)
        size = max(side, round(width * scale)), max(side, round(height * scale))
        if size[0] * size[1] > max(MAX_PICTURE_PIXELS, side * side):
            raise DataError(f"a picture of {width}x{height} px is too narrow to be resized to {side} px")
        resized = image if size == image.size else image.resize(size, Image.Resampling.BICUBIC)
        # int() rounds down: 0.5 gives the same centre crop as torchvision and never leaves the picture.
        left = int(position[0] * (resized.width - side))
        top = int(position[1] * (resized.height - side))
        square = resized if size == (side, side) else resized.crop((left, top, left + side, top + side))
        if mirror:
            # The same pixels as flipping the resized picture and cropping there, at the mirrored offset.
            square, left = ImageOps.mirror(square), resized.width - side - left
        pixels = torch.from_numpy(np.array(square)).permute(2, 0, 1).float().div_(127.5).sub_(1.0)
        return pixels, torch.tensor([height, width, top, left, side, side], dtype=torch.float32)


class PixelPairs(ShardSamples):
    """Item n of the run's stream as a batch of one; flip and crop are drawn from (seed, n).

    Raises:
        BadSampleError: a sample is damaged; the message names shard and key.
        DataError: a shard is.
    """

    def __init__(
        self, shards: ShardSet, order: ShuffledOrder | StoredOrder, transform: PairTransform, seed: int | None
    ) -> None:
        self.shards, self.order, self.transform, self.seed = shards, order, transform, seed

    def __len__(self) -> int:
        return len(self.order)

    def item(self, n: int, place: int) -> PreferencePairs:
        sample = self.shards.read(*self.order[place])
        info = sample.info()
        source = None if self.seed is None else generator(self.seed, "augmentation", n)
        images = sample.image("chosen"), sample.image("rejected")
        try:
            chosen, rejected, chosen_ids, rejected_ids = self.transform(*images, source)
        except DataError as error:
            raise sample.bad(str(error)) from error
        return PreferencePairs(
            chosen[None],
            rejected[None],
            (info["caption"],),
            chosen_ids[None],
            rejected_ids[None],
            torch.tensor([n]),
            torch.tensor([sample.number(info, "label", 0.5, 1.0)]),
            1 / torch.tensor([sample.number(info, "num_example_per_prompt", 1.0, MAX_EXAMPLES_PER_PROMPT)]),
        )


class EncodedPairs(ShardSamples):
    """Item n of the run's stream as a batch of one, from shards of latents: crop and flip are as encoded.

    Raises:
        BadSampleError: a sample is damaged; the message names shard and key.
        DataError: a shard is.
    """

    def __init__(self, shards: ShardSet, order: ShuffledOrder | StoredOrder) -> None:
        self.shards, self.order = shards, order

    def __len__(self) -> int:
        return len(self.order)

    def item(self, n: int, place: int) -> LatentPairs:
        shard, row = self.order[place]
        sample = self.shards.read(shard, row)
        info, latents = sample.info(), sample.tensors("latents", chosen=3, rejected=3)
        if latents["chosen"].shape != latents["rejected"].shape:
            raise sample.bad("its two latents have different shapes")
        embeds = self.shards.read_embeds(shard, sample, info)
        pooled = embeds["pooled"].float()[None] if "pooled" in embeds else None
        return LatentPairs(
            latents["chosen"].float()[None],
            latents["rejected"].float()[None],
            (info["caption"],),
            _time_ids(sample, info, "chosen_time_ids"),
            _time_ids(sample, info, "rejected_time_ids"),
            torch.tensor([n]),
            Conditioning(embeds["embeds"].float()[None], pooled),
        )


def _time_ids(sample: Sample, info: dict[str, Any], name: str) -> Float[Tensor, "1 6"]:
    values = info.get(name)
    if (
        not isinstance(values, list)
        or len(values) != 6
        or not all(type(value) in (int, float) and abs(value) <= MAX_PICTURE_PIXELS for value in values)
    ):
        raise sample.bad(f"{name} must be 6 numbers of pixels, got {str(values)[:80]}")
    return torch.tensor([values], dtype=torch.float32)
