"""Signals that end a run: they are noted, obeyed where a run can be left exactly, and passed on to SLURM."""

from __future__ import annotations

import logging
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any, Protocol, runtime_checkable

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm
from lightning.pytorch.trainer.states import TrainerFn

from callbacks.resume.checkpoint_files import newest_checkpoint
from callbacks.resume.checkpointing import RunCheckpoint, callbacks_of
from callbacks.resume.slurm import requeue
from lightning_modules.errors import DivergenceError
from lightning_modules.lightning_internals import (
    amid_batch,
    batch_is_open,
    replace_signal_handlers,
    restore_signal_handlers,
    take_children,
)
from lightning_modules.training import log_step

log = logging.getLogger(__name__)

SIGNALS = (signal.SIGHUP, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM)
OF_TERMINALS = (signal.SIGHUP, signal.SIGINT)  # somebody ended the run; the others come from schedulers


@runtime_checkable
class WorksInChunks(Protocol):
    """A data module that works for minutes within one hook.

    Attributes:
        between_chunks: What it calls on every rank before each chunk of that work; may raise ``SystemExit``.
    """

    between_chunks: Callable[[], None]


class GivenUp(Exception):
    """A rank got a signal while all of them evaluate; it unwinds what the evaluation has put up.

    Args:
        number: the signal.
        what: the evaluation, and how far it had come.
    """

    def __init__(self, number: int, what: str) -> None:
        super().__init__(what)
        self.number, self.what = number, what


class Preemption(Callback):
    """Leaves a run that is told to end, with a checkpoint from which it resumes exactly.

    SIGTERM, SIGUSR1, SIGUSR2, SIGINT and SIGHUP are noted, no more: a signal may hit anywhere, also within an optimizer
    step or a checkpoint. At the end of every batch of training or validation, before every batch of an evaluation's
    pictures, and before every chunk of a pool, the ranks agree whether any of them got one. An evaluation is given up
    then, and made again when the run resumes (``ExactResume``, ``PolicyEvaluation``). They write one checkpoint, a
    SLURM job that was not cancelled is requeued (unless by SIGINT or SIGHUP), and all processes leave with 128 + the
    signal's number, which is never 0: a job that was cut short is no finished one.

    The end of any batch will do: a checkpoint within an accumulation window goes back to the last optimizer step, which
    costs less than to wait for the window's end. Between chunks nothing needs to be saved: ``RunCheckpoint`` has
    saved the end of the pool before, and finished chunks are on the disk.

    A second SIGINT ends the run at once, without saving. Other repeated signals change nothing. A run that was started
    with SIGHUP ignored (``nohup``) goes on when its terminal is closed.

    An error, too, is saved on where it left the state sound: a data worker that was killed, an evaluation that failed,
    a batch that did not fit into memory. Not so in the middle of an update, nor where steps have diverged.
    """

    def __init__(self) -> None:
        self._received = 0
        self._interrupts = 0
        self._trained = self._updating = False
        self._validated, self._common = 0, 0.0  # batches of a validation: done; that every rank has
        self._former: dict[int, Any] = {}
        self._trainer: pl.Trainer | None = None

    # Handlers

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        self._received = self._interrupts = 0
        self._trained = self._updating = False
        self._trainer = trainer
        self._install()
        replace_signal_handlers(trainer, self._install)
        data = getattr(trainer, "datamodule", None)
        if isinstance(data, WorksInChunks):
            data.between_chunks = lambda: self._between_chunks(trainer)

    def _install(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return  # Python allows handlers there alone
        for number in SIGNALS:
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue
            former = signal.signal(number, self._note)
            if former != self._note:
                self._former[number] = former

    def _restore(self, trainer: pl.Trainer) -> None:
        restore_signal_handlers(trainer)
        while self._former:
            signal.signal(*self._former.popitem())

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._received = max(self._received, number)  # the scheduler's signals before the keyboard's
        if number == signal.SIGINT:
            self._interrupts += 1
            if self._interrupts > 1:
                for child in [] if self._trainer is None else take_children(self._trainer):
                    child.kill()  # it would wait for this process in its next collective
                raise SystemExit(128 + number)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._restore(trainer)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        if self._is_sound(trainer, exception):
            self._save_what_is_sound(trainer)
        self._restore(trainer)

    # Errors

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        self._updating = True

    def _is_sound(self, trainer: pl.Trainer, exception: BaseException) -> bool:
        """Whether the run can be resumed exactly from where an error hit: anywhere but in the middle of an update.

        With more than one process the others may wait for this one, and no checkpoint can be written together.
        """
        ours = isinstance(exception, Exception) and not isinstance(exception, DivergenceError)
        updated_in_part = self._updating and amid_batch(trainer)
        return ours and self._trained and trainer.world_size == 1 and not updated_in_part

    def _save_what_is_sound(self, trainer: pl.Trainer) -> None:
        try:
            if _save(trainer):
                newest = newest_checkpoint(_folder(trainer))
                _tell(f"saved step {trainer.global_step} in {newest}; resume with --resume auto")
        except Exception as error:  # the disk or the device may be what failed in the first place
            log.info("what was trained since the last checkpoint could not be saved: %s", error)

    # Where ranks agree

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._updating = False
        self._trained = True  # before that the run is as in the checkpoint that it resumes from, if any

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        number = self._agreed(trainer)
        if number:
            self._leave(trainer, number, saves=True)

    def _between_chunks(self, trainer: pl.Trainer) -> None:
        """All ranks must call it; raises as ``_leave``."""
        number = self._agreed(trainer)
        if number:
            self._leave(trainer, number, saves=False)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._validated, self._common = 0, 0.0
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            batches = torch.tensor(float(sum(trainer.num_val_batches)), device=trainer.strategy.root_device)
            if trainer.world_size > 1:
                torch.distributed.all_reduce(batches, op=torch.distributed.ReduceOp.MIN)
            # Where nobody knows how many there are, one rank's may end first.
            self._common = 0.0 if trainer.world_size > 1 and batches.isinf() else batches.item()

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._validated += 1
        number = self._agreed(trainer) if self._validated < self._common else 0  # after the last one its end is near
        if number:
            what = f"the validation after {self._validated} of {self._common:.0f} batches"
            self._leave(trainer, number, self._trained, what)

    def give_up_if_asked(self, trainer: pl.Trainer, what: str) -> None:
        """All ranks must call it, within ``interruptible``.

        Args:
            what: the evaluation that they are in, and how far it has come.

        Raises:
            GivenUp: a rank got a signal, while the run trains.
        """
        number = self._agreed(trainer) if trainer.state.fn == TrainerFn.FITTING else 0
        if number:
            raise GivenUp(number, what)

    # Leaving

    def leave(self, trainer: pl.Trainer, given_up: GivenUp) -> None:
        """All ranks must call it; raises as ``_leave``."""
        self._leave(trainer, given_up.number, self._trained, given_up.what)

    def _leave(self, trainer: pl.Trainer, number: int, saves: bool, what: str | None = None) -> None:
        """
        Raises:
            SystemExit: always.
            UserError: the checkpoint cannot be written.
        """
        if what is not None and trainer.is_global_zero:
            _tell(f"gave up {what}; it is made again when the run resumes")
        if saves:
            _save(trainer)
        if trainer.is_global_zero:
            _tell(f"stopped by {signal.Signals(number).name} {_where(trainer)}")
            told = requeue() if number not in OF_TERMINALS else None
            if told is not None:
                _tell(told)
        # Rank 0 first: SLURM may end a job as soon as one of its processes has left.
        children = take_children(trainer)
        trainer.strategy.barrier("preemption")
        for child in children:
            with suppress(subprocess.TimeoutExpired):
                child.wait(timeout=10)
        raise SystemExit(128 + number)

    def _agreed(self, trainer: pl.Trainer) -> int:
        """The highest signal that any rank got, or 0. With one process it costs nothing."""
        if trainer.world_size == 1:
            return self._received
        received = torch.tensor(self._received, device=trainer.strategy.root_device)
        torch.distributed.all_reduce(received, op=torch.distributed.ReduceOp.MAX)
        return int(received)


def preemption(trainer: pl.Trainer) -> Preemption | None:
    """The trainer's, if it has one."""
    return next((callback for callback in callbacks_of(trainer) if isinstance(callback, Preemption)), None)


@contextmanager
def interruptible(trainer: pl.Trainer) -> Iterator[None]:
    """Where an evaluation that is given up ends, and the run with it; around everything that it has to undo."""
    try:
        yield
    except GivenUp as given_up:
        leaving = preemption(trainer)
        assert leaving is not None  # it raised this
        leaving.leave(trainer, given_up)


def _save(trainer: pl.Trainer) -> bool:
    """Whether there was something to save."""
    if batch_is_open(trainer):  # later Lightning has done it
        log_step(trainer)
    ours = [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, RunCheckpoint)]
    if trainer.checkpoint_callbacks and not ours:  # of other kinds, which save when they see fit
        trainer.save_checkpoint(_folder(trainer) / "last.ckpt")
        return True
    saved = [callback.save_now(trainer) for callback in ours]
    return any(saved)


def _folder(trainer: pl.Trainer) -> Path:
    return Path(trainer.default_root_dir) / "checkpoints"


def _where(trainer: pl.Trainer) -> str:
    if not trainer.checkpoint_callbacks:
        return f"at step {trainer.global_step}; nothing is saved, as trainer.enable_checkpointing is false"
    newest = newest_checkpoint(_folder(trainer))
    if newest is None:
        return "before there was a checkpoint to write; start again with the same command"
    return f"at step {trainer.global_step}, saved in {newest}; resume with --ckpt_path auto"


def _tell(line: str) -> None:
    Tqdm.write(line, file=sys.stderr)  # beside a progress bar, not into it
    sys.stderr.flush()
