"""When a run is saved, and how many of its checkpoints are kept."""

from __future__ import annotations

import time
import warnings
from pathlib import Path
from typing import Any
from weakref import proxy

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn

from callbacks.resume.checkpoint_files import STEP_NAME, name_twice, newest_checkpoint, writing_order
from lightning_modules.errors import ConfigError, DataError, UserError
from lightning_modules.files import clear_unfinished
from lightning_modules.lightning_internals import at_epochs_last_batch, dump_checkpoint
from lightning_modules.training import log_step


class AfterStep(Callback):
    """Does something after a step, such as an evaluation, and notes in the checkpoint that it is done.

    ``RunCheckpoint`` may have saved that step before; it then saves the step once more, with the note.

    Attributes:
        unsaved: Whether something was done that ``RunCheckpoint`` has not saved.
    """

    unsaved = False


class RunCheckpoint(ModelCheckpoint):
    """The newest few checkpoints and ``last.ckpt``, in the run folder's ``checkpoints``.

    Saves every so many steps or minutes, when a pool is used up (sampling the next may take longer than training on
    it), on a signal (``Preemption``), and at the end of the training. All of them count alike.

    ``last.ckpt`` is a second name (a hard link) of the newest file where the file system has that, else a copy.

    Checkpoints are numbered in the order of writing, which tells the newest one, see ``writing_order``.

    Args:
        every_n_steps: Optimizer steps between checkpoints.
        keep: How many to keep beside ``last.ckpt``, the newest; -1 keeps all.
        every_n_minutes: Also save at the end of the first optimizer step that many minutes after the last save.

    Raises:
        ConfigError: a setting is out of range.
        DataError: a checkpoint cannot be written.
    """

    def __init__(self, every_n_steps: int = 500, keep: int = 2, every_n_minutes: float | None = None) -> None:
        if every_n_steps < 1 or keep < -1 or (every_n_minutes is not None and every_n_minutes <= 0):
            raise ConfigError(
                "RunCheckpoint wants every_n_steps of at least 1, keep of at least -1 (which keeps all) and "
                f"every_n_minutes above 0 or null, got {every_n_steps}, {keep} and {every_n_minutes}"
            )
        super().__init__(
            filename="step={step:07d}",
            auto_insert_metric_name=False,
            save_top_k=-1,  # which to keep is decided by what lies in the folder: a list in memory dies with a process
            save_last=True,  # see _write
            enable_version_counter=False,  # else a resumed run writes last-v1.ckpt beside last.ckpt
            every_n_train_steps=every_n_steps,
        )
        self.every_n_steps, self.keep, self.every_n_minutes = every_n_steps, keep, every_n_minutes
        self._saved_at = 0.0
        self._step = 0
        self._saved_step = 0  # what stands in a checkpoint already; before the first step there is nothing to save
        self._saves = 0

    @property
    def state_key(self) -> str:
        return type(self).__qualname__  # other settings don't make it another callback

    def state_dict(self) -> dict[str, Any]:
        return {"saves": self._saves}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._saves = state_dict.get("saves", 0)  # earlier versions did not count

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.dirpath = str(Path(trainer.default_root_dir) / "checkpoints")
        with warnings.catch_warnings():
            # It is when a run is resumed; the command line refuses to start another run there.
            warnings.filterwarnings("ignore", message="Checkpoint directory .* exists and is not empty")
            super().setup(trainer, pl_module, stage)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._saved_at, self._step = time.monotonic(), trainer.global_step
        newest = newest_checkpoint(self._folder) if trainer.is_global_zero else None
        from_newest = newest is not None and trainer.ckpt_path is not None and newest.samefile(str(trainer.ckpt_path))
        # Where a step has a file and last.ckpt is older, the run was killed between the two.
        if trainer.strategy.broadcast(from_newest and newest == self._folder / "last.ckpt"):
            self._saved_step = trainer.global_step
        orders = map(writing_order, self._folder.glob("*.ckpt")) if trainer.is_global_zero else ()
        self._saves = trainer.strategy.broadcast(max((order[0] for order in orders if order), default=self._saves))

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if step == self._step:
            return  # gradients are being accumulated
        self._step = step
        pools = trainer.reload_dataloaders_every_n_epochs == 1  # type: ignore[attr-defined]  # put there by a connector
        pool_used_up = pools and at_epochs_last_batch(trainer)
        if step % self.every_n_steps == 0 or pool_used_up or self._minutes_are_over(trainer):
            log_step(trainer)
            self.save_now(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.save_now(trainer)

    def save_now(self, trainer: pl.Trainer) -> bool:
        """Write what the run stands at, unless it is saved already; all ranks must call it.

        Returns:
            Whether it was written.

        Raises:
            DataError: this rank, or another one, cannot write it.
        """
        tries = trainer.fast_dev_run  # type: ignore[attr-defined]  # put there by a connector
        if tries or trainer.state.fn != TrainerFn.FITTING or trainer.sanity_checking:
            return False
        later = [callback for callback in callbacks_of(trainer) if isinstance(callback, AfterStep)]
        changed = trainer.global_step > 0 and any(callback.unsaved for callback in later)
        if trainer.global_step == self._saved_step and not changed:
            return False
        self._write(trainer)
        self._saved_step, self._saved_at = trainer.global_step, time.monotonic()
        for callback in later:
            callback.unsaved = False
        if trainer.is_global_zero:
            self._clear_away(trainer)
            for logger in trainer.loggers:
                logger.after_save_checkpoint(proxy(self))
        return True

    @property
    def _folder(self) -> Path:
        return Path(str(self.dirpath))

    def _clear_away(self, trainer: pl.Trainer) -> None:
        """Delete what is too old, and what writers left that were killed: this process is the only one that writes."""
        named = [file for file in self._folder.glob("step=*.ckpt") if STEP_NAME.fullmatch(file.name)]
        old = sorted(named, key=lambda file: writing_order(file) or (-1, -1))[: -self.keep] if self.keep > 0 else []
        for file in old:
            trainer.strategy.remove_checkpoint(file)
        clear_unfinished(self._folder)

    def _minutes_are_over(self, trainer: pl.Trainer) -> bool:
        """By the clock of rank 0."""
        if self.every_n_minutes is None:
            return False
        over = time.monotonic() - self._saved_at >= 60 * self.every_n_minutes
        return trainer.strategy.reduce_boolean_decision(over and trainer.is_global_zero, all=False)

    def _write(self, trainer: pl.Trainer) -> None:
        """The step's file, then ``last.ckpt``. When rank 0 fails, the others don't wait for it in a barrier."""
        names = [f"step={trainer.global_step:07d}.ckpt"] if self.keep != 0 else []
        files = [self._folder / name for name in (*names, "last.ckpt")]
        failure: UserError | None = None
        self._saves += 1
        try:
            checkpoint = dump_checkpoint(trainer)
            for file in files:
                # Written once where the file system lets a file have two names, and the strategy writes files here.
                written = file != files[0] and trainer.is_global_zero and files[0].is_file()
                if not (written and name_twice(files[0], file)):
                    trainer.strategy.save_checkpoint(checkpoint, file)
        except UserError as error:
            failure = error
        fine = trainer.strategy.reduce_boolean_decision(failure is None, all=True)
        if failure is not None:
            raise failure
        if not fine:
            raise DataError("another process of this run could not write the checkpoint; its message says why")
        self.best_model_path, self.last_model_path = str(files[0]), str(files[-1])


def callbacks_of(trainer: pl.Trainer) -> list[Callback]:
    """All callbacks of a trainer, in the order of their calls."""
    return trainer.callbacks  # type: ignore[attr-defined]  # put there by a connector
