"""Starts runs as processes of their own, and kills them where asked; ``kill_harness.py`` serves, ``Harness`` asks.

The server imports everything once and forks a process a run, because a fresh interpreter takes 9 seconds to import. A
forked process has its own id, its own process group, default signal handlers and nothing from an earlier run. The
server itself starts no thread, trains nothing and touches no file of a run.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import io
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

LIMIT = 600.0  # seconds for one process of a run; one that hangs is killed and reported


@dataclass(frozen=True)
class Order:
    """One process (or one a rank) of a run, and where to kill it.

    Attributes:
        argv: the words of ``program``.
        log: file for what it prints.
        run_dir: the run's folder.
        program: module with a ``main``, of the project or of its tests.
        ranks: processes.
        where, moment, depth: see ``kill_probe.Plan``.
        delay: seconds between the moment and the strike, where that is "time".
        signal: number of what strikes.
        skew: seconds between the strikes on two ranks; the rank that stopped is struck first if positive.
        timeline: see ``kill_probe.Plan``.
    """

    argv: Sequence[str]
    log: str
    run_dir: str
    program: str = "experiments.run"
    ranks: int = 1
    where: str | None = None
    moment: Sequence[int] = (-1, 0, 0)
    depth: int = 0
    delay: float = 0.0
    signal: int = int(signal.SIGKILL)
    skew: float = 0.0
    timeline: str | None = None


@dataclass(frozen=True)
class Outcome:
    """How it ended.

    Attributes:
        codes: of the ranks' processes; negative numbers are signals, as ``subprocess`` has it.
        hit: what the run was doing when it was struck; None if it ended before that.
        hung: whether it had to be killed because it did not end.
        seconds: from its start to its end.
        after_signal: of these, from the strike on.
        cpu: processor seconds of all its processes, without data workers that outlive it.
    """

    codes: Sequence[int]
    hit: str | None
    hung: bool
    seconds: float
    after_signal: float
    cpu: float


class Harness:
    """Asks the server; use as a context."""

    def __enter__(self) -> Harness:
        quiet = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "HF_HUB_OFFLINE": "1",
                 "OPENBLAS_NUM_THREADS": "1", "JSONARGPARSE_DEPRECATION_WARNINGS": "off"}  # fmt: skip
        self.server = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=os.environ | quiet, cwd=Path(__file__).parents[1],
        )  # fmt: skip
        return self

    def __exit__(self, *error: object) -> None:
        with self.server:  # closes its input, on which it ends
            pass

    def run(self, order: Order) -> Outcome:
        assert self.server.stdin is not None
        assert self.server.stdout is not None
        self.server.stdin.write(json.dumps(asdict(order)) + "\n")
        self.server.stdin.flush()
        return Outcome(**json.loads(self.server.stdout.readline()))


# ------------------------------------------------------------------------------------------- the server


class Forked(BaseException):
    """Unwinds the server's stack in a forked process, so that it ends as any interpreter does."""

    def __init__(self, order: Order, rank: int, board: Any, port: int) -> None:
        self.order, self.rank, self.board, self.port = order, rank, board, port


def serve() -> None:
    for line in sys.stdin:
        outcome = carry_out(Order(**json.loads(line)))
        sys.stdout.write(json.dumps(asdict(outcome)) + "\n")
        sys.stdout.flush()


class Rank:
    """A forked process."""

    def __init__(self, order: Order, rank: int, port: int) -> None:
        from kill_probe import Board

        self.board = Board()
        self.code: int | None = None
        self.cpu = 0.0
        self.pid = os.fork()
        if self.pid == 0:
            raise Forked(order, rank, self.board, port)
        self.stopped = False

    def look(self) -> None:
        """Notice that it has stopped or ended."""
        if self.code is None:
            pid, status, usage = os.wait4(self.pid, os.WNOHANG | os.WUNTRACED)
            if pid and os.WIFSTOPPED(status):
                self.stopped = True
            elif pid:
                self.code, self.cpu = os.waitstatus_to_exitcode(status), usage.ru_utime + usage.ru_stime

    def send(self, number: int) -> None:
        """To the process and its workers, as schedulers do it."""
        if self.code is None:
            os.killpg(self.pid, number)


def carry_out(order: Order) -> Outcome:
    port, began, hit, struck = free_port(), time.monotonic(), None, 0.0
    born = time.time_ns()
    ranks = [Rank(order, rank, port) for rank in range(order.ranks)]
    for rank in ranks:
        wait_for(lambda rank=rank: group_of(rank.pid) == rank.pid)
    due: float | None = None
    while any(rank.code is None for rank in ranks) and time.monotonic() < began + LIMIT:
        for rank in ranks:
            rank.look()
        if due is None and hit is None and any(rank.board.due for rank in ranks):
            due = time.monotonic() + order.delay
        halted = [rank for rank in ranks if rank.stopped]
        if hit is None and (halted or (due is not None and time.monotonic() >= due)):
            hit, struck = strike(order, ranks, halted, born), time.monotonic()
        time.sleep(0.0005 if hit is None else 0.002)
    hung = any(rank.code is None for rank in ranks)
    for rank in ranks:
        rank.send(signal.SIGKILL)
        while rank.code is None:
            rank.look()
            time.sleep(0.001)
        end_group(rank.pid)
    now = time.monotonic()
    return Outcome(
        [rank.code or 0 for rank in ranks],
        hit,
        hung,
        now - began,
        now - struck if hit else 0.0,
        sum(rank.cpu for rank in ranks),
    )


def strike(order: Order, ranks: list[Rank], halted: list[Rank], born: int) -> str | None:
    """Halt all ranks, look where they are, send the signal to each, let them go on to die or to finish."""
    for rank in ranks:
        rank.send(signal.SIGSTOP)
    for rank in ranks:
        wait_for(lambda rank=rank: rank.look() or rank.stopped or rank.code is not None)
    if all(rank.code is not None for rank in ranks):
        return None
    hit = what_is_hit(order, (halted or ranks)[0], born)
    first = halted or ranks[:1]
    turns = [first, [rank for rank in ranks if rank not in first]]
    for number, turn in enumerate(turns if order.skew >= 0 else turns[::-1]):
        if number and turn:
            time.sleep(abs(order.skew))
        for rank in turn:
            rank.stopped = False
            rank.send(order.signal)
            rank.send(signal.SIGCONT)
    return hit


def what_is_hit(order: Order, rank: Rank, born: int) -> str:
    """By what lies on the disk, else by what the run says of itself."""

    def fresh(pattern: str) -> bool:
        return any(path.stat().st_mtime_ns > born for path in Path(order.run_dir).glob(pattern))

    if fresh("checkpoints/.*.ckpt-unfinished-*"):
        return "writing a checkpoint"
    return "writing a shard" if fresh("pools/*/.*.tar-unfinished-*") else rank.board.phase


def wait_for(condition: Any, seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.0005)


def group_of(pid: int) -> int:
    try:
        return os.getpgid(pid)
    except ProcessLookupError:
        return pid


def end_group(group: int) -> None:
    """Data workers that outlived their run."""
    try:
        os.killpg(group, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        return


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# ------------------------------------------------------------------------------------------- the forked process


def become(forked: Forked) -> NoReturn:
    """Everything in which a fresh process differs from a fork of the server, then the command."""
    import numpy
    import torch

    from experiments.cli.command import run_command

    order = forked.order
    os.setpgid(0, 0)
    log, nothing = os.open(order.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), os.open(os.devnull, os.O_RDONLY)
    for number, target in enumerate((nothing, log, log)):
        os.dup2(target, number)
    if order.ranks > 1:  # as a launcher sets them, so that Lightning starts no processes itself
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(forked.port), "WORLD_SIZE": str(order.ranks),
                       "NODE_RANK": "0", "LOCAL_RANK": str(forked.rank)}  # fmt: skip
    # Whatever a run draws without a seed of its own must differ from process to process.
    random.seed()
    numpy.random.seed()
    torch.seed()
    sys.argv = [order.program, *order.argv]
    if order.program == "experiments.run":
        make_plan(forked)
    code = 0
    try:
        run_command(importlib.import_module(order.program).main)
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        code = 1
        traceback.print_exc()
    # As an interpreter ends, but for freeing its memory page by page.
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def make_plan(forked: Forked) -> None:
    """The plan of this rank: one rank alone stops at a place that all of them pass; rank 0 writes the checkpoints."""
    import kill_probe

    order, rank = forked.order, forked.rank
    stops = {"time": rank, "checkpoint": 0}.get(str(order.where), order.depth % order.ranks) == rank
    timeline = Path(order.timeline) if order.timeline and rank == 0 else None
    moment = (order.moment[0], order.moment[1], order.moment[2])
    where = order.where if stops else None
    kill_probe.PLAN = kill_probe.Plan(forked.board, Path(order.run_dir), where, moment, order.depth, timeline)


def import_everything() -> None:
    """What a run imports, some of it late, as classes are looked up by name; and what it computes and keeps once."""
    for name in (
        "callbacks.cost", "callbacks.resume.checkpointing", "datamodules.preference_pairs", "datamodules.step_pool",
        "experiments.cli.experiment_cli", "experiments.prepare_pickapic", "lightning.pytorch.loggers.tensorboard",
        "lightning_modules.alignment", "lightning_modules.preference", "lightning_modules.policies.stable_diffusion",
        "lightning_modules.rewards.latent", "lightning_modules.rewards.step_aware", "peft",
        "torch.utils.tensorboard", "kill_probe",
    ):  # fmt: skip
        importlib.import_module(name)
    run, policies = importlib.import_module("experiments.run"), importlib.import_module("lightning_modules.policies")
    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
        run.main(["--config", "spo_tiny", "--print_config"])
    importlib.import_module("tqdm").tqdm.monitor_interval = 0  # it would start a thread
    policies.StableDiffusion(str(Path(__file__).parent / "pipelines" / "tiny-sd15"), policies.LoRA())
    gc.collect()
    gc.freeze()  # what is never collected is not copied for each process


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    import_everything()
    try:
        serve()
    except Forked as forked:
        child = forked
    else:
        sys.exit(0)
    become(child)
