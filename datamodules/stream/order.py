"""In which order a run sees the samples of its shards: functions of (seed, n), so that a position is one integer."""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch

from lightning_modules.errors import ConfigError
from lightning_modules.randomness import generator


class StoredOrder:
    """Sample n is the n-th as stored; sample N + n is sample n again."""

    def __init__(self, sizes: Sequence[int]) -> None:
        self._ends = list(accumulate(sizes))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, n: int) -> tuple[int, int]:
        """The shard and the row in it of sample n."""
        return _find(self._ends, n % len(self))


class ShuffledOrder:
    """The order in which a run sees N samples: sample n = e N + p is the p-th of epoch e. Nothing is dropped.

    Epoch e permutes the shards by (seed, e), cuts them into windows of ``shuffle_shards`` and permutes the samples
    of each window together by (seed, e, window). So sample n is a pure function of (seed, n), found without
    visiting the samples before it; a process works on one window of shards at a time, which bounds what it opens.

    Attributes:
        sizes: samples of every shard.
        seed: the run's.
        shuffle_shards: 1 mixes within shards only; the number of shards or more is a full shuffle.
    """

    def __init__(self, sizes: Sequence[int], seed: int, shuffle_shards: int) -> None:
        if shuffle_shards < 1:
            raise ConfigError(f"shuffle_shards is {shuffle_shards}, it must be at least 1")
        self.sizes, self.seed, self.shuffle_shards = tuple(sizes), seed, shuffle_shards
        self._total = sum(sizes)
        # Two of each: batches straddle the border of two windows or epochs.
        self._epochs: OrderedDict[int, tuple[list[list[int]], list[int]]] = OrderedDict()
        self._windows: OrderedDict[tuple[int, int], tuple[list[int], list[int]]] = OrderedDict()

    def __len__(self) -> int:
        return self._total

    def __getitem__(self, n: int) -> tuple[int, int]:
        """The shard and the row in it of sample n, for any n >= 0."""
        epoch, position = divmod(n, self._total)
        windows, ends = self._epoch(epoch)
        window, offset = _find(ends, position)
        permutation, shard_ends = self._window(epoch, window, windows[window])
        place, row = _find(shard_ends, permutation[offset])
        return windows[window][place], row

    def _epoch(self, epoch: int) -> tuple[list[list[int]], list[int]]:
        """The epoch's windows, each a list of shards, and the position after each window's last sample."""
        if epoch not in self._epochs:
            order = torch.randperm(len(self.sizes), generator=generator(self.seed, "shards", epoch)).tolist()
            step = self.shuffle_shards
            windows = [order[start : start + step] for start in range(0, len(order), step)]
            ends = list(accumulate(sum(self.sizes[shard] for shard in window) for window in windows))
            _keep_two(self._epochs, epoch, (windows, ends))
        return self._epochs[epoch]

    def _window(self, epoch: int, window: int, shards: list[int]) -> tuple[list[int], list[int]]:
        """A permutation of the window's samples and the position after each of its shards' last sample."""
        if (epoch, window) not in self._windows:
            ends = list(accumulate(self.sizes[shard] for shard in shards))
            permutation = torch.randperm(ends[-1], generator=generator(self.seed, "window", epoch, window)).tolist()
            _keep_two(self._windows, (epoch, window), (permutation, ends))
        return self._windows[epoch, window]


def _find(ends: Sequence[int], position: int) -> tuple[int, int]:
    """Which of several consecutive ranges, given by their ends, holds a position, and how far into it."""
    index = bisect_right(ends, position)
    return index, position - (ends[index - 1] if index else 0)


def _keep_two(cache: OrderedDict[Any, Any], key: Any, value: Any) -> None:
    cache[key] = value
    if len(cache) > 2:
        cache.popitem(last=False)
