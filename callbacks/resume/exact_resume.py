"""What Lightning would not go on from exactly, set right in the checkpoint and when a run goes on."""

from __future__ import annotations

from copy import deepcopy
from functools import partial
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.trainer.states import TrainerFn

from callbacks.resume.checkpointing import AfterStep


class ExactResume(AfterStep):
    """Sets right what Lightning would not go on from exactly.

    Within an accumulation window a checkpoint holds the weights of the last optimizer step, and the gradients gathered
    since are lost. Data and noise are functions of the batch counters, so that rewinding them to that step recomputes
    what was lost.

    A run that goes on from the end of an epoch never counts the next one as begun; stopped at its end too, it would
    not count it as an epoch at all, and train one more than ``trainer.max_epochs``.

    A validation that was due at the end of the batch with which a checkpoint was written, and is not over in it, is
    made when the run goes on, before it trains. Lightning would leave it out.

    A run that goes on from its last step ends again, which means ``on_train_start`` and ``on_train_end``: what was cut
    short at its end is done. Lightning would do nothing.
    """

    def __init__(self) -> None:
        self._validation_due = False
        self._loops: dict[str, Any] | None = None  # as saved where the run stands, as long as it trains no batch
        self._begun = False

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit":
            self._validation_due, self._loops, self._begun, self.unsaved = False, None, False, False
            trainer.fit_loop.run = partial(self._run, trainer)  # type: ignore[method-assign]

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        vars(trainer.fit_loop).pop("run", None)

    def _run(self, trainer: pl.Trainer) -> None:
        loop = trainer.fit_loop
        type(loop).run(loop)
        at_its_end = trainer.ckpt_path is not None and not trainer.should_stop and trainer.limit_train_batches != 0
        if at_its_end and not self._begun:
            loop.on_run_start()
            loop.on_run_end()

    # Validation

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._begun = True
        if self._validation_due:
            self._validate(trainer)
            self._validation_due = False  # also where this run is to have none

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._loops is not None and pl_module.automatic_optimization:
            # By which loggers are told the step. Going on from a rewound place, Lightning may count a step twice.
            trainer.fit_loop.epoch_loop._batches_that_stepped = trainer.global_step
        self._validation_due, self._loops = False, None

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self._validation_due = True

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self._validation_due, self.unsaved = False, True

    def _validate(self, trainer: pl.Trainer) -> None:
        """As Lightning does it at the end of a batch."""
        loop, results = trainer.fit_loop.epoch_loop.val_loop, trainer._logger_connector
        first = results._first_loop_iter
        loop.restarting = False
        trainer.validating = True
        loop.run()
        trainer.training = True
        results._first_loop_iter = first

    # Counters

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if trainer.state.fn == TrainerFn.FITTING:
            self._loops = deepcopy(checkpoint["loops"]["fit_loop"])
            self._validation_due = self._loops["epoch_loop.state_dict"].get("validation_due", False)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if self._loops is None:
            self._set_right(trainer, checkpoint["loops"]["fit_loop"])
            self._loops = checkpoint["loops"]["fit_loop"]
        # What Lightning counts from a batch's end on, until the next one, is no place to go on from.
        loops = checkpoint["loops"]["fit_loop"] = deepcopy(self._loops)
        checkpoint["epoch"] = loops["epoch_progress"]["current"]["processed"]
        batches: Any = trainer.fit_loop.epoch_loop.batch_progress.total
        # The batch at whose end it was due is to come again.
        rewound = loops["epoch_loop.batch_progress"]["total"]["processed"] < batches.processed
        loops["epoch_loop.state_dict"]["validation_due"] = self._validation_due and not rewound

    def _set_right(self, trainer: pl.Trainer, loops: dict[str, Any]) -> None:
        progress = loops["epoch_loop.batch_progress"]
        current, total = progress["current"], progress["total"]
        if trainer.validating and self._validation_due:  # it is given up: back to the end of the batch before it
            for counters in (current, total):
                counters["completed"] -= 1
            for counters in loops["epoch_loop.val_loop.batch_progress"].values():
                if isinstance(counters, dict):
                    counters.update(ready=0, started=0, processed=0, completed=0)
        if current["completed"] < current["processed"]:  # at the end of a batch, so that an epoch is under way
            loop = trainer.fit_loop
            assert loop._data_fetcher is not None
            self._validation_due |= loop.epoch_loop._should_check_val_fx(loop._data_fetcher)
            for epochs in loops["epoch_progress"].values():
                done = epochs["processed"]
                epochs.update(ready=done + 1, started=done + 1, completed=done)
        at_epoch_end = progress["is_last_batch"] and current["processed"] == current["ready"]
        lost = 0 if at_epoch_end else current["processed"] % trainer.accumulate_grad_batches
        if lost == 0 and current["ready"] == current["processed"]:
            return
        for counters in (current, total):
            kept = counters["processed"] - lost
            counters.update(ready=kept, started=kept, processed=kept, completed=kept)
        progress["is_last_batch"] = False
