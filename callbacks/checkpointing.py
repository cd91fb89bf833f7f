"""Checkpoints that survive being killed, and from which a run goes on exactly."""

from __future__ import annotations

import os
import pickle
import re
import struct
import time
import warnings
import zipfile
import zlib
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from weakref import proxy

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn

from lightning_modules.errors import ConfigError, DataError, UserError


class AtomicCheckpointIO(TorchCheckpointIO):
    """A checkpoint appears under its name complete or not at all.

    Written beside its target (a rename is atomic only within one file system; a temporary folder may be on
    another), flushed to the disk, renamed. What a killed writer leaves behind ends in ``.part``.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any | None = None
    ) -> None:
        """
        Raises:
            DataError: the disk does not take it; what was there under this name before is whole.
        """
        target = Path(path)
        part = target.with_name(target.name + ".part")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with part.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            part.replace(target)
        except (OSError, RuntimeError) as error:
            # torch's writer follows a failed write with an error of its own.
            reason = error if isinstance(error, OSError) else error.__context__
            if not isinstance(reason, OSError):
                raise
            raise DataError(
                f"cannot write the checkpoint {target}: {reason.strerror or reason}; older checkpoints there are "
                "whole: make room or move the run folder, then go on with --ckpt_path auto"
            ) from error
        finally:
            with suppress(OSError):
                part.unlink(missing_ok=True)


class AfterStep(Callback):
    """Does something after a step, once. The checkpoint of that step may have been written before.

    Attributes:
        unsaved: whether something was done that ``RunCheckpoint`` has not saved.
    """

    unsaved = False


class RunCheckpoint(ModelCheckpoint):
    """The newest few checkpoints and ``last.ckpt``, in the run folder's ``checkpoints``.

    Saves every so many steps or minutes, when a pool is used up (sampling the next may take longer than training on
    it), on a signal (``Preemption``), and at the end of the training. All of them count alike.

    Args:
        every_n_steps: optimizer steps between checkpoints.
        keep: how many to keep beside ``last.ckpt``, the newest; -1 keeps all.
        every_n_minutes: save also at the end of the first optimizer step that many minutes after the last save.

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
            save_last=True,  # a copy; a link can dangle when the process is killed between its two steps
            enable_version_counter=False,  # else a resumed run writes last-v1.ckpt beside last.ckpt
            every_n_train_steps=every_n_steps,
        )
        self.every_n_steps, self.keep, self.every_n_minutes = every_n_steps, keep, every_n_minutes
        self._saved_at = 0.0
        self._step = 0

    @property
    def state_key(self) -> str:
        return type(self).__qualname__  # other settings don't make it another callback

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        pass

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.dirpath = str(Path(trainer.default_root_dir) / "checkpoints")
        with warnings.catch_warnings():
            # It is when a run is resumed; the command line refuses to start another run there.
            warnings.filterwarnings("ignore", message="Checkpoint directory .* exists and is not empty")
            super().setup(trainer, pl_module, stage)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._saved_at, self._step = time.monotonic(), trainer.global_step
        newest = newest_checkpoint(self._folder) if trainer.is_global_zero and trainer.ckpt_path is not None else None
        from_newest = newest is not None and newest.samefile(str(trainer.ckpt_path))
        # Where a step has a file and last.ckpt is older, the run was killed between the two.
        if trainer.strategy.broadcast(from_newest and newest == self._folder / "last.ckpt"):
            self._last_global_step_saved = trainer.global_step

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if step == self._step:
            return  # gradients are being accumulated
        self._step = step
        pools = trainer.reload_dataloaders_every_n_epochs == 1  # type: ignore[attr-defined]  # put there by a connector
        pool_used_up = pools and trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
        if step % self.every_n_steps == 0 or pool_used_up or self._minutes_are_over(trainer):
            log_step(trainer)
            self.save_now(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.save_now(trainer)

    def save_now(self, trainer: pl.Trainer) -> None:
        """Write what the run stands at, unless it is saved already; all ranks must call it."""
        later = [callback for callback in callbacks_of(trainer) if isinstance(callback, AfterStep)]
        if trainer.global_step > 0 and any(callback.unsaved for callback in later):
            self._last_global_step_saved = -1
        if self._should_skip_saving_checkpoint(trainer):
            return
        candidates = self._monitor_candidates(trainer)
        if self.keep != 0:
            self._save_checkpoint(trainer, self.format_checkpoint_name(candidates))
        self._save_last_checkpoint(trainer, candidates)
        self._saved_at = time.monotonic()
        for callback in later:
            callback.unsaved = False
        if trainer.is_global_zero:
            self._clear_away(trainer)

    @property
    def _folder(self) -> Path:
        return Path(str(self.dirpath))

    def _clear_away(self, trainer: pl.Trainer) -> None:
        """Delete what is too old, and what writers left that were killed: this process is the only one that writes."""
        named = [file for file in self._folder.glob("step=*.ckpt") if _STEP_NAME.fullmatch(file.name)]
        old = sorted(named, key=_written)[: -self.keep] if self.keep > 0 else []
        for file in (*old, *self._folder.glob("*.ckpt.part")):
            trainer.strategy.remove_checkpoint(file)

    def _minutes_are_over(self, trainer: pl.Trainer) -> bool:
        """By the clock of rank 0."""
        if self.every_n_minutes is None:
            return False
        over = time.monotonic() - self._saved_at >= 60 * self.every_n_minutes
        return trainer.strategy.reduce_boolean_decision(over and trainer.is_global_zero, all=False)

    def _save_checkpoint(self, trainer: pl.Trainer, filepath: str) -> None:
        """As Lightning's, but when rank 0 fails, the others don't wait for it in a barrier."""
        failure: UserError | None = None
        try:
            checkpoint = trainer._checkpoint_connector.dump_checkpoint(self.save_weights_only)
            trainer.strategy.save_checkpoint(checkpoint, filepath)
        except UserError as error:
            failure = error
        fine = trainer.strategy.reduce_boolean_decision(failure is None, all=True)
        if failure is not None:
            raise failure
        if not fine:
            raise DataError("another process of this run could not write the checkpoint; its message says why")
        self._last_global_step_saved, self._last_checkpoint_saved = trainer.global_step, filepath
        if trainer.is_global_zero:
            for logger in trainer.loggers:
                logger.after_save_checkpoint(proxy(self))


def log_step(trainer: pl.Trainer) -> None:
    """Write the metrics of the step that just ended to the loggers, which Lightning does only after all callbacks.

    What a checkpoint holds is not trained again: a run that ends between the two would lack them for ever. Lightning
    writes them once more, the same.
    """
    trainer._logger_connector.update_train_step_metrics()


def callbacks_of(trainer: pl.Trainer) -> list[Callback]:
    """All callbacks of a trainer, in the order of their calls."""
    return trainer.callbacks  # type: ignore[attr-defined]  # put there by a connector


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


def newest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint in ``folder`` that was written last; ``last.ckpt`` where it is as new as any."""
    return next(iter(_newest_first(folder)), None)


@dataclass(frozen=True)
class Found:
    """What a folder offers to go on from.

    Attributes:
        checkpoint: the newest whole one, or None.
        damaged: what is wrong with the newer ones, by file, newest first.
    """

    checkpoint: Path | None
    damaged: dict[Path, str]


def newest_whole_checkpoint(folder: Path) -> Found:
    """The newest checkpoint that nothing is wrong with."""
    damaged: dict[Path, str] = {}
    for file in _newest_first(folder):
        reason = damage(file)
        if reason is None:
            return Found(file, damaged)
        damaged[file] = reason
    return Found(None, damaged)


def damage(file: Path) -> str | None:
    """What is wrong with a checkpoint file, or None.

    All of it is read and its checksums compared, which finds a file that is empty, cut short anywhere, overwritten, or
    has a changed byte in any weight; then its structure is loaded, without the weights. The folders that sharded
    strategies write are not looked into.
    """
    if file.is_dir():
        return None
    try:
        if file.stat().st_size == 0:
            return "is empty"
        with zipfile.ZipFile(file) as archive:
            broken = archive.testzip()
    except OSError as error:
        return f"cannot be read ({error.strerror or error})"
    except _UNREADABLE:
        return "is cut short or no checkpoint"
    if broken is not None:
        return f"is damaged (checksum of {broken})"
    try:
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except (*_UNREADABLE, pickle.UnpicklingError, OSError):
        return "is no checkpoint that can be loaded"
    if not isinstance(content, dict) or not {"state_dict", "loops", "global_step"} <= content.keys():
        return "holds something other than a run's checkpoint"
    return None


# What zipfile, and torch's reader, raise for bytes that mean nothing.
_UNREADABLE = (zipfile.BadZipFile, zlib.error, struct.error, EOFError, LookupError, ValueError, OverflowError,
               RuntimeError, AttributeError, TypeError)  # fmt: skip
_STEP_NAME = re.compile(r"step=\d+\.ckpt")


def _newest_first(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.ckpt"), key=lambda file: (_written(file), file.name == "last.ckpt"), reverse=True)


def _written(file: Path) -> int:
    return file.stat().st_mtime_ns
