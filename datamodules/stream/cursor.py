"""Where a run is in its endless stream of samples: derived from the count of batches, so that it cannot drift."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from lightning import LightningDataModule

from lightning_modules.errors import ConfigError
from lightning_modules.lightning_internals import batches_trained, replaces_samplers


@dataclass(frozen=True)
class Segment:
    """A stretch of a run whose batches all have one size.

    Attributes:
        first_batch: Batches that this rank had trained on before it.
        first_sample: Samples that all ranks together had.
        batch: Samples per batch over all ranks.
    """

    first_batch: int = 0
    first_sample: int = 0
    batch: int = 0

    def samples_seen(self, batches_seen: int) -> int:
        """Samples that all ranks have trained on when this one has trained on ``batches_seen`` batches."""
        return self.first_sample + (batches_seen - self.first_batch) * self.batch


class CursorDataModule(LightningDataModule, ABC):
    """A data module whose position follows from the trainer's counter of batches.

    Its loaders can be made any number of times, and workers may be ahead of training: what was trained on counts,
    not what was read. A subclass saves what the counter doesn't know: in which segment the run is.

    Args:
        batch_size: Pairs per rank and batch.
        pairs_per_step: Pairs per optimizer step over all ranks, for whoever sets the trainer's accumulation (the
            command does); None leaves it to the trainer's settings.
    """

    def __init__(self, batch_size: int, pairs_per_step: int | None = None) -> None:
        super().__init__()
        if batch_size < 1:
            raise ConfigError(f"data.batch_size must be at least 1, got {batch_size}")
        if pairs_per_step is not None and pairs_per_step < 1:
            raise ConfigError(f"data.pairs_per_step must be at least 1, got {pairs_per_step}")
        self.batch_size, self.pairs_per_step = batch_size, pairs_per_step

    @property
    @abstractmethod
    def segment(self) -> Segment:
        """The one that the run is in."""

    @abstractmethod
    def restore(self, state: dict[str, Any]) -> None:
        """Take the position of a checkpoint that this run resumes from.

        Raises:
            UserError: it is a position in other data, or in another order.
        """

    def setup(self, stage: str) -> None:
        """
        Raises:
            ConfigError: the trainer would replace the sampler, and every rank would read something else.
        """
        if stage == "fit" and self.trainer and replaces_samplers(self.trainer):
            raise ConfigError(
                "each rank's samples follow from the run's position, and Lightning would replace the sampler that "
                "knows it; set trainer.use_distributed_sampler to false"
            )

    @property
    def world_size(self) -> int:
        return self.trainer.world_size if self.trainer else 1

    @property
    def rank(self) -> int:
        return self.trainer.global_rank if self.trainer else 0

    @property
    def pairs_per_batch(self) -> int:
        """Over all ranks."""
        return self.batch_size * self.world_size

    @property
    def accumulated(self) -> int:
        """Batches per optimizer step."""
        return int(self.trainer.accumulate_grad_batches) if self.trainer else 1

    def check_epoch(self, batches: int) -> None:
        """
        Args:
            batches: Batches that the loader gives on each rank: whole optimizer steps.

        Raises:
            ConfigError: the trainer cuts them short within an optimizer step, whose gradient would be scaled down.
        """
        limit = self.trainer.limit_train_batches if self.trainer else 1.0
        trained = min(batches, limit) if isinstance(limit, int) else int(batches * limit)
        if trained % self.accumulated:
            raise ConfigError(
                f"trainer.limit_train_batches {limit} ends an epoch after {trained} batches, within an optimizer step "
                f"of {self.accumulated}, whose gradient would be scaled down; give a multiple of that"
            )

    @property
    def batches_seen(self) -> int:
        """Batches that this rank has trained on since the run began; restored on resume."""
        return batches_trained(self.trainer) if self.trainer else 0

    def samples_seen(self) -> int:
        """Samples that all ranks have trained on since the run began."""
        return self.segment.samples_seen(self.batches_seen)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """
        Raises:
            UserError: as ``restore``.
        """
        if self.trainer is None or self.trainer.state.fn == "fit":  # evaluating a checkpoint needs none of its data
            self.restore(state)
