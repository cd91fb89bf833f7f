"""Samplers: which positions of the run's stream one rank reads, from wherever the run is when they are iterated."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch.utils.data import Sampler


class RunSampler(Sampler[int]):
    """One rank's samples of one Lightning epoch.

    Rank r's batch m' of this epoch holds the samples n = start + (m' world + r) b + i, i < b, of the run's endless
    stream. An epoch has floor(N / (b world a)) a batches on every rank: Lightning steps at an epoch's end whatever it
    has gathered, and would scale down the gradient of a part of an optimizer step. The samples left over open the next
    epoch, so none is dropped.

    Args:
        total: N.
        batch_size: b.
        rank: r.
        world_size: Number of ranks.
        position: Asked each time the sampler is iterated: how many samples all ranks have seen.
        accumulated: a, batches per optimizer step.
    """

    def __init__(
        self,
        total: int,
        batch_size: int,
        rank: int,
        world_size: int,
        position: Callable[[], int],
        accumulated: int = 1,
    ) -> None:
        self.batch_size, self.rank, self.world_size, self.position = batch_size, rank, world_size, position
        self.batches = total // (batch_size * world_size * accumulated) * accumulated

    def __len__(self) -> int:
        return self.batches * self.batch_size

    def __iter__(self) -> Iterator[int]:
        start = self.position() + self.rank * self.batch_size
        step = self.world_size * self.batch_size
        for batch in range(self.batches):
            yield from range(start + batch * step, start + batch * step + self.batch_size)


class PoolSampler(Sampler[int]):
    """One rank's positions in a pool.

    Batch m of rank r holds the positions (m world + r) b + i, i < b.

    Args:
        batches: Batches of the pool on each rank.
        batch_size: b.
        rank: r.
        world_size: Number of ranks.
        seen: Asked each time the sampler is iterated: how many batches of the pool have been trained on.
    """

    def __init__(self, batches: int, batch_size: int, rank: int, world_size: int, seen: Callable[[], int]) -> None:
        self.batches, self.batch_size, self.rank, self.world_size, self.seen = (
            batches,
            batch_size,
            rank,
            world_size,
            seen,
        )

    def __len__(self) -> int:
        return self.batches * self.batch_size  # of the whole pool: Lightning counts what was seen itself

    def __iter__(self) -> Iterator[int]:
        for batch in range(self.seen(), self.batches):
            start = (batch * self.world_size + self.rank) * self.batch_size
            yield from range(start, start + self.batch_size)
