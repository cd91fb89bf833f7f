"""Liked and unliked pictures in one stream: a share of it is liked, and each kind comes in an order of its own."""

from __future__ import annotations

from fractions import Fraction
from math import floor

import torch
from jaxtyping import Bool
from torch import Tensor

from datamodules.stream.order import ShuffledOrder
from lightning_modules.errors import ConfigError
from lightning_modules.randomness import derive_seed, generator

BLOCK = 64  # positions over which the share is exact within one


class MixedOrder:
    """The order in which a run sees liked and unliked pictures, without replacement: a function of (seed, n).

    Every block of 64 positions has its share of liked ones, at drawn places. The k-th liked position of the run has the
    k-th picture of the liked ones' own ``ShuffledOrder``, so that no liked picture comes again before all have come;
    the unliked ones alike.

    Args:
        liked, unliked: samples of every shard of either kind; the shards of the unliked ones count on from the liked.
        seed: the run's.
        shuffle_shards: as of ``ShuffledOrder``.
        share: of positions that are liked.

    Raises:
        ConfigError: a share that is not within (0, 1), or one kind that has no pictures.
    """

    def __init__(
        self, liked: tuple[int, ...], unliked: tuple[int, ...], seed: int, shuffle_shards: int, share: float
    ) -> None:
        if not 0 < share < 1:
            raise ConfigError(f"data.positive_ratio must lie in (0, 1), or be null for the data's own, got {share}")
        self.share, self.seed, self._liked_shards = Fraction(str(share)), seed, len(liked)
        self.liked = ShuffledOrder(liked, derive_seed(seed, "liked"), shuffle_shards)
        self.unliked = ShuffledOrder(unliked, derive_seed(seed, "unliked"), shuffle_shards)
        self._block = -1, torch.zeros(0, dtype=torch.bool)  # the last one asked for

    def __len__(self) -> int:
        """Positions of an epoch: as many as there are pictures."""
        return len(self.liked) + len(self.unliked)

    def at(self, n: int, later: int = 0) -> tuple[int, int]:
        """The shard and the row in it of sample n, or of the one that comes ``later`` in its kind's order."""
        block, offset = divmod(n, BLOCK)
        liked, before = self._liked_places(block), self._liked_before(block)
        if liked[offset]:
            return self.liked[before + int(liked[:offset].sum()) + later]
        shard, row = self.unliked[block * BLOCK - before + int((~liked[:offset]).sum()) + later]
        return self._liked_shards + shard, row

    def _liked_before(self, block: int) -> int:
        return floor(block * BLOCK * self.share)

    def _liked_places(self, block: int) -> Bool[Tensor, " n"]:
        if self._block[0] != block:
            here = self._liked_before(block + 1) - self._liked_before(block)
            drawn = torch.randperm(BLOCK, generator=generator(self.seed, "liked positions", block))
            self._block = block, drawn < here
        return self._block[1]
