"""Ways to do the same work, timed in turn within one run, so that other work on the machine meets all of them."""

from __future__ import annotations

import multiprocessing
import statistics
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import torch

from experiments.cli.freed_memory import keep_freed_memory

Spread = tuple[float, float, float]  # smallest, median, largest


@dataclass(frozen=True)
class Clock:
    """What a round costs.

    Attributes:
        device: on a CPU it is the process's CPU seconds, else wall seconds until the device has finished.
    """

    device: str

    def now(self) -> float:
        if self.device == "cpu":
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()


@dataclass(frozen=True)
class Timings:
    """Seconds of every round, by way, the first (which warms up) left out; and what each way gave last."""

    seconds: Mapping[str, list[float]]
    results: Mapping[str, Any] = field(default_factory=dict)

    def spread(self, way: str) -> Spread:
        return spread(self.seconds[way])

    def ratios(self, slow: str, fast: str) -> Spread:
        """How many times as fast ``fast`` is, from rounds that ran side by side."""
        return spread([one / other for one, other in zip(self.seconds[slow], self.seconds[fast], strict=True)])


def spread(values: list[float]) -> Spread:
    return min(values), statistics.median(values), max(values)


def alternate(ways: Mapping[str, Callable[[], Any]], rounds: int, clock: Clock, peers: Collection[str] = ()) -> Timings:
    """Each way once to warm up, then ``rounds`` times in turn, in the other order every second round.

    Where there are ``peers``, ways that are not ours, each way has a process of its own on a CPU, so that it finds the
    memory as it has left it itself: ours keep what they free, as our commands do, and peers do as their libraries do.
    """
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    results = {}
    with ExitStack() as processes:
        timed = {name: partial(_timed, way, clock) for name, way in ways.items()}
        if peers and clock.device == "cpu":
            timed = {
                name: processes.enter_context(_apart(way, as_command=name not in peers)) for name, way in timed.items()
            }
        for number in range(rounds + 1):
            order = list(ways) if number % 2 else list(reversed(ways))
            for name in order:
                spent, results[name] = timed[name]()
                if number:
                    seconds[name].append(spent)
    return Timings(seconds, results)


def _timed(way: Callable[[], Any], clock: Clock) -> tuple[float, Any]:
    begun = clock.now()
    result = way()
    return clock.now() - begun, result


@contextmanager
def _apart(way: Callable[[], Any], as_command: bool) -> Iterator[Callable[[], Any]]:
    """Calls of it in a process that is forked for it."""
    forking = multiprocessing.get_context("fork")
    here, there = forking.Pipe()
    process = forking.Process(target=_serve, args=(there, way, as_command), daemon=True)
    process.start()
    there.close()

    def call() -> Any:
        here.send(None)
        return here.recv()

    try:
        yield call
    finally:
        process.kill()
        process.join()


def _serve(pipe: Connection, way: Callable[[], Any], as_command: bool) -> None:
    if as_command:
        keep_freed_memory()
    while True:
        pipe.recv()
        pipe.send(way())
