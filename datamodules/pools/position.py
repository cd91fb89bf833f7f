"""Which pool a run is in."""

from __future__ import annotations

from dataclasses import dataclass

from datamodules.stream.cursor import Segment


@dataclass(frozen=True)
class PoolPosition:
    """Which pool a run is in, and where the run was when that pool began.

    Attributes:
        number: Number of the pool, from 0.
        name: Name of its folder: below ``pools_dir``, or as given in ``reuse``.
        first_batch: Batches that this rank had trained on before it.
        first_sample: Pairs that all ranks had.
        batches: Batches of the pool on each rank.
        batch: Pairs per batch over all ranks.
        accumulated: Batches per optimizer step.
    """

    number: int
    name: str
    first_batch: int
    first_sample: int
    batches: int
    batch: int
    accumulated: int

    @staticmethod
    def ended(batches_seen: int) -> PoolPosition:
        """At the end of a pool of one batch, for a run that shall train on nothing."""
        return PoolPosition(0, "", batches_seen - 1, 0, 1, 1, 1)

    @property
    def segment(self) -> Segment:
        return Segment(self.first_batch, self.first_sample, self.batch)

    @property
    def next_sample(self) -> int:
        """The position of the next pool's first pair in the run's stream of samples."""
        return self.first_sample + self.batches * self.batch
