"""How far the whole run is: steps of all steps, pairs per second, time left, loss."""

from __future__ import annotations

from collections.abc import Sized
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ProgressBar
from torch import nn

from lightning_modules.batches import Record
from lightning_modules.progress import Work


class RunProgress(ProgressBar):
    """One line for the whole run, whatever its epochs are: a bar on a terminal, else a plain line every 30 seconds.

    Time left and pairs per second are means since this start, with pools, pictures and evaluations in them.
    """

    def __init__(self) -> None:
        super().__init__()
        self._enabled = True
        self._running: list[Work] = []  # a validation within the training is the last
        self._step = self._samples = 0

    def enable(self) -> None:
        self._enabled = True

    def disable(self) -> None:  # Lightning calls it on all ranks but one
        self._enabled = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._step, self._samples = trainer.global_step, 0
        steps = trainer.estimated_stepping_batches
        self._begin("step", steps, done=self._step, first_line=True, keep=True)
        if self._enabled:
            self.print(trained_share(pl_module))

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if isinstance(batch, Record) and isinstance(batch, Sized):
            self._samples += len(batch) * trainer.world_size
        if trainer.global_step > self._step:
            steps, self._step = trainer.global_step - self._step, trainer.global_step
            self._running[-1].advance(steps, lambda: self._details(trainer, pl_module))

    def _details(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> str:
        speed = [f"{self._samples / self._running[-1].seconds:.3g} pairs/s"] if self._samples else []
        metrics = {name: value for name, value in self.get_metrics(trainer, pl_module).items() if name != "v_num"}
        return ", ".join([*speed, *(f"{name.removeprefix('train/')} {value:.4g}" for name, value in metrics.items())])

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._begin("validation batch", sum(trainer.num_val_batches))

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._running[-1].advance()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._running.pop().close()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._running.pop().close()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        while self._running:
            self._running.pop().close()

    def _begin(self, title: str, total: int | float, **options: Any) -> None:
        known = int(total) if 0 < total < float("inf") else None
        self._running.append(Work(title, known, self._enabled, **options))

    def print(self, *args: Any, **kwargs: Any) -> None:
        """A line beside the bar, not into it."""
        Work.write(" ".join(map(str, args)))


def trained_share(module: nn.Module) -> str:
    """How much of a module is trained, in words."""
    trained = sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
    total = sum(parameter.numel() for parameter in module.parameters())
    return f"trains {trained / 1e6:.3g} million of {total / 1e6:.3g} million numbers"
