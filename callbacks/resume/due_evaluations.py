"""When the policy is evaluated within a training: at each due step once, however often the run is interrupted."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import lightning.pytorch as pl

from callbacks.resume.checkpointing import AfterStep


class PolicyEvaluation(AfterStep, ABC):
    """Evaluates at the end of every n-th step and at the end of the training.

    The checkpoint says which step was evaluated last. A run that resumes from one that was written at a due step before
    its evaluation was over makes that evaluation first.

    Attributes:
        every_n_steps: Optimizer steps between evaluations; None leaves only the one at the end.
        evaluates_start: Whether the policy is evaluated before its first step, too.
    """

    every_n_steps: int | None
    evaluates_start = False

    def __init__(self) -> None:
        self._evaluated_at: int | None = None

    @abstractmethod
    def evaluate(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Called on all ranks."""

    def mark_evaluated(self, trainer: pl.Trainer) -> None:
        """Note that the step which the run has reached is evaluated."""
        self._evaluated_at, self.unsaved = trainer.global_step, True

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit":
            self._evaluated_at, self.unsaved = None, False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._evaluate_if_due(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._evaluate_if_due(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._evaluate_once(trainer, pl_module)

    def _evaluate_if_due(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.every_n_steps is not None and trainer.global_step % self.every_n_steps == 0:
            self._evaluate_once(trainer, pl_module)

    def _evaluate_once(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # The counter stands still while gradients are accumulated.
        if trainer.global_step != self._evaluated_at and (trainer.global_step > 0 or self.evaluates_start):
            self.evaluate(trainer, pl_module)
            self.mark_evaluated(trainer)

    def state_dict(self) -> dict[str, Any]:
        return {"evaluated_at": self._evaluated_at}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._evaluated_at = state_dict["evaluated_at"]
