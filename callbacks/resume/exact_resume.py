"""Makes runs resume exactly: corrects what Lightning would not resume exactly, on saving and on resuming."""

from __future__ import annotations

from functools import partial
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.trainer.states import TrainerFn

from callbacks.resume.checkpointing import AfterStep
from datamodules.stream.cursor import CursorDataModule
from lightning_modules.errors import ConfigError
from lightning_modules.lightning_internals import (
    SavedProgress,
    batches_trained,
    begin_and_end,
    count_logged_steps,
    fit_as_lightning,
    run_fit_by,
    run_fit_by_itself,
    validate_now,
    validation_is_due,
)


class ExactResume(AfterStep):
    """Corrects what Lightning would not resume exactly.

    Within an accumulation window a checkpoint holds the weights of the last optimizer step, and the gradients gathered
    since are lost. Data and noise are functions of the batch counters, so that rewinding them to that step recomputes
    what was lost.

    A run that resumes from the end of an epoch never counts the next one as begun; stopped at its end too, it would
    not count it as an epoch at all, and train one more than ``trainer.max_epochs``.

    A validation that was due at the end of the batch with which a checkpoint was written, and is not over in it, is
    made when the run resumes, before it trains. Lightning would leave it out.

    A run that resumes from its last step ends again, which means ``on_train_start`` and ``on_train_end``: what was cut
    short at its end is done. Lightning would do nothing.
    """

    def __init__(self) -> None:
        self._validation_due = False
        self._saved: SavedProgress | None = None  # where the run stands, as long as it trains no batch
        self._begun = False

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit":
            self._validation_due, self._saved, self._begun, self.unsaved = False, None, False, False
            run_fit_by(trainer, partial(self._run, trainer))

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        run_fit_by_itself(trainer)

    def _run(self, trainer: pl.Trainer) -> None:
        fit_as_lightning(trainer)
        at_its_end = trainer.ckpt_path is not None and not trainer.should_stop and trainer.limit_train_batches != 0
        if at_its_end and not self._begun:
            begin_and_end(trainer)

    # Validation

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._begun = True
        if self._validation_due:
            validate_now(trainer)
            self._validation_due = False  # also where this run is to have none

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._saved is not None and pl_module.automatic_optimization:
            count_logged_steps(trainer)
        self._validation_due, self._saved = False, None

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self._validation_due = True

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self._validation_due, self.unsaved = False, True

    # Counters

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if trainer.state.fn == TrainerFn.FITTING:
            _check_position(trainer, checkpoint)
            self._saved = SavedProgress.of(checkpoint)
            self._validation_due = self._saved.validation_due

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if self._saved is None:
            self._saved = self._corrected(trainer, SavedProgress.of(checkpoint))
        # What Lightning counts from a batch's end on, until the next one, is no place to resume from.
        self._saved.put_into(checkpoint)
        # A validation is not due if the batch at whose end it was is to come again.
        rewound = self._saved.batches_trained < batches_trained(trainer)
        SavedProgress(checkpoint["loops"]["fit_loop"]).validation_due = self._validation_due and not rewound

    def _corrected(self, trainer: pl.Trainer, progress: SavedProgress) -> SavedProgress:
        if trainer.validating and self._validation_due:
            progress.give_up_validation()
        if progress.at_batch_end:
            self._validation_due |= validation_is_due(trainer)
            progress.reopen_epoch()
        progress.round_down(trainer.accumulate_grad_batches)
        return progress


def _check_position(trainer: pl.Trainer, checkpoint: dict[str, Any]) -> None:
    """
    Raises:
        ConfigError: the checkpoint is of a run on data of another kind, whose position means nothing to this one's.
    """
    data = getattr(trainer, "datamodule", None)
    if isinstance(data, CursorDataModule) and type(data).__qualname__ not in checkpoint:
        raise ConfigError(
            f"the checkpoint holds no position in {type(data).__name__}'s data: another data module wrote it; resume "
            "with the settings of the run that did, or start a new run from its exported weights"
        )
