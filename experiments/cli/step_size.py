"""Pairs per optimizer step: a setting of the experiment, whatever the machine; how many batches make one follows."""

from __future__ import annotations

import lightning.pytorch as pl

from datamodules.stream.cursor import CursorDataModule
from lightning_modules.errors import ConfigError


def settle_step(trainer: pl.Trainer, data: CursorDataModule) -> str:
    """Let the trainer accumulate as many batches as make ``data.pairs_per_step``, and say how a step comes about.

    Raises:
        ConfigError: no number of batches makes it, or the trainer is told another.
    """
    ranks, batch, wanted = trainer.world_size, data.batch_size, data.pairs_per_step
    per_batch = ranks * batch
    given = int(trainer.accumulate_grad_batches)
    if wanted is not None and wanted % per_batch:
        below, above = wanted // per_batch * per_batch, -(-wanted // per_batch) * per_batch
        near = f"{below} and {above}" if below else f"{above}"
        raise ConfigError(
            f"data.pairs_per_step {wanted} is no multiple of {_devices(ranks)} x data.batch_size {batch} = {per_batch} "
            f"pairs per batch; the nearest that {'are' if below else 'is'}: {near}. Or take other devices or batch_size"
        )
    if wanted is not None:
        accumulated = wanted // per_batch
        if given not in (1, accumulated):
            raise ConfigError(
                f"data.pairs_per_step {wanted} is {_devices(ranks)} x {batch} x {accumulated}, but "
                f"trainer.accumulate_grad_batches is {given}; leave one of the two out"
            )
        trainer.accumulate_grad_batches = accumulated
    batches = int(trainer.accumulate_grad_batches)
    return f"{_devices(ranks)} x {batch} x {batches} = {pairs_per_step(trainer, data)} pairs per step"


def pairs_per_step(trainer: pl.Trainer, data: CursorDataModule) -> int:
    return trainer.world_size * data.batch_size * int(trainer.accumulate_grad_batches)


def _devices(ranks: int) -> str:
    return f"{ranks} device{'s' if ranks > 1 else ''}"
