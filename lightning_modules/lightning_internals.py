"""What this framework needs of Lightning beyond its public interface: every use of that is here, with its reason."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from lightning import Trainer


def batches_trained(trainer: Trainer) -> int:
    """Batches that this rank has trained on since the run began.

    ``trainer.global_step`` counts optimizer steps alone; this counter is restored on resume, too.
    """
    loop: Any = trainer.fit_loop.epoch_loop
    return int(loop.batch_progress.total.processed)


def epoch_is_open(trainer: Trainer) -> bool:
    """Whether an epoch has begun that is not closed yet: a resumed run may be between its last batch and its end."""
    epochs = trainer.fit_loop.epoch_progress.current
    return epochs.ready > epochs.completed


def expect_batches(trainer: Trainer, batches: int) -> None:
    """Announce how many batches the epoch that begins has.

    Resuming at an epoch's end, Lightning forgets that epoch's batches only if the new epoch has no more of them than
    it had; else it would leave out as many of the new epoch's.
    """
    loop: Any = trainer.fit_loop.epoch_loop
    current = loop.batch_progress.current
    current.completed = max(current.completed, batches)


def replaces_samplers(trainer: Trainer) -> bool:
    """Whether Lightning puts samplers of its own in the place of ours; no public property tells."""
    connector = trainer._accelerator_connector
    return bool(connector.use_distributed_sampler and connector.is_distributed)


def forget_step_metrics(trainer: Trainer, names: Collection[str]) -> None:
    """Leave metrics out of the logs until a step logs them again.

    Lightning repeats the last value of whatever an epoch has logged once, for every step, also where a step has none.
    """
    for metric in (trainer._results or {}).values():
        if metric.meta.name in names:
            metric.reset()
