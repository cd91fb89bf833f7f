"""Signals that end a run: they are noted, obeyed where a run can be left exactly, and told to SLURM."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from lightning.pytorch.trainer.states import TrainerFn

from callbacks.resume.checkpoint_files import newest_checkpoint
from callbacks.resume.checkpointing import RunCheckpoint, callbacks_of, log_step
from datamodules.step_pool import StepPoolDataModule

SIGNALS = (signal.SIGINT, signal.SIGUSR1, signal.SIGTERM)
SCONTROL_SECONDS = 20.0  # for each call: the time until SLURM kills a job is short, and its controller may be busy


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
    """Leaves a run that is told to end, with a checkpoint from which it goes on exactly.

    SIGTERM, SIGUSR1 and SIGINT are noted, no more: a signal may hit anywhere, also within an optimizer step or a
    checkpoint. At the end of every batch of training or validation, before every batch of an evaluation's pictures, and
    before every chunk of a pool, the ranks agree whether any of them got one. An evaluation is given up then, and made
    anew when the run goes on (``ExactResume``, ``PolicyEvaluation``). They write one checkpoint, a SLURM job that was
    not cancelled is requeued (SIGTERM and SIGUSR1), and all processes leave with 128 + the signal's number, which is
    never 0: a job that was cut short is no finished one.

    The end of any batch will do: a checkpoint within an accumulation window goes back to the last optimizer step, which
    costs less than to wait for the window's end. Between chunks nothing needs to be saved: ``RunCheckpoint`` has
    saved the end of the pool before, and finished chunks are on the disk.

    A second SIGINT ends the run at once, without saving. Other repeated signals change nothing.
    """

    def __init__(self) -> None:
        self._received = 0
        self._interrupts = 0
        self._trained = False
        self._validated, self._common = 0, 0.0  # batches of a validation: done; that every rank has
        self._former: dict[int, Any] = {}
        self._launcher: Any = None

    # Handlers

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        self._received = self._interrupts = 0
        self._trained = False
        self._launcher = trainer.strategy.launcher
        self._install()
        # Lightning's own handlers run collectives and save wherever they hit. It would put them in place after the
        # last hook before the first pool is sampled.
        trainer._signal_connector.register_signal_handlers = self._install  # type: ignore[method-assign]
        data = getattr(trainer, "datamodule", None)
        if isinstance(data, StepPoolDataModule):
            data.between_chunks = lambda: self._between_chunks(trainer)

    def _install(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return  # Python allows handlers there alone
        for number in SIGNALS:
            former = signal.signal(number, self._note)
            if former != self._note:
                self._former[number] = former

    def _restore(self, trainer: pl.Trainer) -> None:
        vars(trainer._signal_connector).pop("register_signal_handlers", None)
        while self._former:
            signal.signal(*self._former.popitem())

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._received = max(self._received, number)  # the scheduler's signals before the keyboard's
        if number == signal.SIGINT:
            self._interrupts += 1
            if self._interrupts > 1:
                for child in _unwatched_children(self._launcher):
                    child.kill()  # it would wait for this process in its next collective
                raise SystemExit(128 + number)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._restore(trainer)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._restore(trainer)

    # Where ranks agree

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._trained = True  # before that the run stands in the checkpoint that it goes on from, if any

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
            _tell(f"gave up {what}; it is made anew when the run goes on")
        if saves:
            _save(trainer)
        if trainer.is_global_zero:
            _tell(f"stopped by {signal.Signals(number).name} {_where(trainer)}")
            if number != signal.SIGINT:
                requeue()
        # Rank 0 first: SLURM may end a job as soon as one of its processes has left.
        children = _unwatched_children(self._launcher)
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


def _save(trainer: pl.Trainer) -> None:
    batches: Any = trainer.fit_loop.epoch_loop.batch_progress.current
    if batches.completed < batches.processed:  # at a batch's end; later Lightning has done it
        log_step(trainer)
    ours = [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, RunCheckpoint)]
    for callback in ours:
        callback.save_now(trainer)
    if trainer.checkpoint_callbacks and not ours:  # of other kinds, which save when they see fit
        trainer.save_checkpoint(_folder(trainer) / "last.ckpt")


def _folder(trainer: pl.Trainer) -> Path:
    return Path(trainer.default_root_dir) / "checkpoints"


def _where(trainer: pl.Trainer) -> str:
    if not trainer.checkpoint_callbacks:
        return f"at step {trainer.global_step}; nothing is saved, as trainer.enable_checkpointing is false"
    newest = newest_checkpoint(_folder(trainer))
    if newest is None:
        return "before there was a checkpoint to write; start again with the same command"
    return f"at step {trainer.global_step}, saved in {newest}; go on with --ckpt_path auto"


def _unwatched_children(launcher: Any) -> list[subprocess.Popen[bytes]]:
    """The ranks that this process has started. Lightning no longer kills it when one of them ends with a code."""
    if not isinstance(launcher, _SubprocessScriptLauncher):
        return []
    children = list(launcher.procs)
    launcher.procs.clear()
    return children


def _tell(line: str) -> None:
    Tqdm.write(line, file=sys.stderr)  # beside a progress bar, not into it
    sys.stderr.flush()


# SLURM


def slurm_job() -> str | None:
    """This process's SLURM job as ``scontrol`` names it, or None outside SLURM."""
    task = os.environ.get("SLURM_ARRAY_TASK_ID")
    if task is not None and "SLURM_ARRAY_JOB_ID" in os.environ:
        return f"{os.environ['SLURM_ARRAY_JOB_ID']}_{task}"
    return os.environ.get("SLURM_JOB_ID")


def requeue() -> None:
    """Give this SLURM job back to the queue, unless it was cancelled; tells what came of it."""
    job = slurm_job()
    if job is None:
        return None
    # scancel, too, sends SIGTERM, and SLURM would requeue even a cancelled job. Until its processes have left it is
    # COMPLETING, as is a job that SLURM has preempted and requeued itself, and one that had no warning of its time
    # limit. A job within its time to leave is RUNNING.
    answer = _scontrol("show", "job", "--oneliner", job)
    state = re.search(r"\bJobState=(COMPLETING|CANCELLED)\b(?! Reason=TimeLimit)", answer.stdout)
    if state is not None:
        return _tell(f"SLURM job {job} was cancelled or preempted ({state[1]}): not requeued by this run")
    answer = _scontrol("requeue", job)
    if answer.returncode == 0:
        return _tell(f"requeued SLURM job {job}")
    reason = " ".join((answer.stderr or answer.stdout).split()) or f"scontrol ended with {answer.returncode}"
    return _tell(f"could not requeue SLURM job {job}: {reason}; submit it again with --ckpt_path auto")


def _scontrol(*words: str) -> subprocess.CompletedProcess[str]:
    command = ["scontrol", *words]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=SCONTROL_SECONDS)
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 1, "", f"no answer in {SCONTROL_SECONDS:.0f} seconds")
    except OSError as error:
        return subprocess.CompletedProcess(command, 1, "", str(error))
