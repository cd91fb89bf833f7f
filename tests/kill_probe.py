"""Within a run that is to be killed: tells the killer where the run stands, and stops at the asked-for instant.

Nothing of the run is replaced. The probe looks on as a callback, through forward hooks, and through Python's audit
events and line tracing, and stops its own process (SIGSTOP) where the killer wants to strike; the killer does the rest.
"""

from __future__ import annotations

import json
import mmap
import os
import signal
import struct
import sys
import time
from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import Callback

from callbacks.clock import EVALUATION

# Places in a run, in the order of time: batches done, then 0 before the next batch and 1 within it, then a counter.
Moment = tuple[int, int, int]

PHASES = ("start-up", "sampling", "step", "between steps", "validation", "pictures", "the end")


class Board:
    """A page that both processes see: the run's phase, and whether the instant to wait for has come."""

    def __init__(self) -> None:
        self._page = mmap.mmap(-1, mmap.PAGESIZE)  # shared with forked children

    def write(self, phase: str, due: bool) -> None:
        self._page[:2] = struct.pack("BB", PHASES.index(phase), due)

    @property
    def phase(self) -> str:
        return PHASES[self._page[0]]

    @property
    def due(self) -> bool:
        return bool(self._page[1])


class Plan:
    """What one process of a run is to do for its killer.

    Args:
        board: shared with the killer.
        run_dir: the run's folder.
        where: "time": tell when ``moment`` has come, the killer waits a while and strikes; "step", "sampling",
            "validation", "pictures": stop in the next forward pass of that kind; "checkpoint", "shard": stop while
            the next one is being written; None: go on to the end.
        moment: from when on.
        depth: how far into the writing: lines of the writer's code, or the end of it if that comes first; how many
            forward passes of that kind to let pass.
        timeline: where to write the moments of an uninterrupted run with their seconds.
    """

    def __init__(
        self, board: Board, run_dir: Path, where: str | None, moment: Moment, depth: int, timeline: Path | None
    ) -> None:
        self.board, self.run_dir, self.where, self.moment, self.depth = board, run_dir, where, moment, depth
        self.timeline, self.began = timeline, time.monotonic()
        self.now: Moment = (-1, 0, 0)
        self.phase = "start-up"
        self.seen: list[tuple[Moment, float]] = []
        self.reach(self.now, self.phase)
        if where in ("checkpoint", "shard"):
            sys.addaudithook(self._audit)

    def reach(self, moment: Moment, phase: str) -> None:
        self.now, self.phase = moment, phase
        self.board.write(phase, self.where == "time" and moment >= self.moment)
        if self.timeline is not None:
            self.seen.append((moment, time.monotonic() - self.began))

    def passing(self, kind: str) -> None:
        """A forward pass of this kind begins."""
        if self.where == kind and self.now >= self.moment:
            self.depth -= 1
            if self.depth < 0:
                self._stop()

    def over(self) -> None:
        if self.timeline is not None:
            self.timeline.write_text(json.dumps(self.seen))

    # Files

    def _audit(self, event: str, args: tuple[Any, ...]) -> None:
        if self.where is None or event not in ("open", "os.rename") or self.now < self.moment:
            return
        if not is_partial(os.fsdecode(args[0]) if not isinstance(args[0], int) else "", self.run_dir, self.where):
            return
        if event == "os.rename":
            self._stop()
        else:
            sys.settrace(self._trace)

    def _trace(self, frame: Any, event: str, arg: Any) -> Any:
        writers = {"checkpoint": "torch/serialization.py", "shard": "webdataset/writer.py"}
        if self.where is None or not frame.f_code.co_filename.endswith(writers[self.where]):
            return None
        if event == "line":
            self.depth -= 1
            if self.depth < 0:
                self._stop()
        return self._trace

    def _stop(self) -> None:
        self.where = None
        sys.settrace(None)
        os.kill(os.getpid(), signal.SIGSTOP)


def is_partial(name: str, run_dir: Path, where: str) -> bool:
    """Whether this is the name of an unfinished checkpoint, or of an unfinished shard of a pool."""
    path = Path(name)
    if where == "checkpoint":
        return ".ckpt-unfinished-" in path.name and path.parent.name == "checkpoints"
    return ".tar-unfinished-" in path.name and run_dir / "pools" in path.parents


PLAN: Plan | None = None  # of this process


class Probe(Callback):
    """Keeps the plan of this process informed."""

    def __init__(self) -> None:
        assert PLAN is not None
        self.plan, self.batches, self.inside, self.count = PLAN, 0, 0, 0

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:  # by now references have made their copies
        self.trainer = trainer
        pl_module.policy.denoiser.register_forward_pre_hook(self._forward)
        judge = getattr(getattr(pl_module, "preference", None), "unet", None)
        if judge is not None:  # a latent reward model, which asks no policy
            judge.mid_block.register_forward_pre_hook(self._forward)

    def _forward(self, network: Any, args: Any) -> None:
        if EVALUATION.is_running:
            kind = "pictures"
        elif self.trainer.validating or self.trainer.sanity_checking:
            kind = "validation"
        else:
            kind = "step" if self.inside else "sampling"
        if kind == "sampling":
            self.batches = self.trainer.fit_loop.epoch_loop.batch_progress.total.processed
        self.count += 1
        self._reach(kind)
        self.plan.passing(kind)

    def _reach(self, phase: str) -> None:
        self.plan.reach((self.batches, self.inside, self.count), phase)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.batches = trainer.fit_loop.epoch_loop.batch_progress.total.processed

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.batches, self.inside, self.count = trainer.fit_loop.epoch_loop.batch_progress.total.processed, 1, 0
        self._reach("step")

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.count += 1
        self._reach("step")

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.inside, self.batches, self.count = 0, self.batches + 1, 0
        self._reach("between steps")

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.count += 1
        self._reach("the end")

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self.plan.over()
