"""Seconds of this process, and those among them that went into evaluating and not into training."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True)
class Seconds:
    """A length of time.

    Attributes:
        cpu: processor seconds of this process, all its threads; not those of data workers, which are processes.
        wall: seconds on the clock.
    """

    cpu: float = 0.0
    wall: float = 0.0

    @staticmethod
    def now() -> Seconds:
        return Seconds(time.process_time(), time.perf_counter())

    def __add__(self, other: Seconds) -> Seconds:
        return Seconds(self.cpu + other.cpu, self.wall + other.wall)

    def __sub__(self, other: Seconds) -> Seconds:
        return Seconds(self.cpu - other.cpu, self.wall - other.wall)


class Stopwatch:
    """Adds up the time within ``running()``, which may be nested.

    Attributes:
        total: of all that has ended.
    """

    def __init__(self) -> None:
        self.total = Seconds()
        self._depth = 0

    @property
    def is_running(self) -> bool:
        return self._depth > 0

    @contextmanager
    def running(self) -> Iterator[None]:
        start = Seconds.now()
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
            if not self.is_running:
                self.total += Seconds.now() - start


# One a process, as its processor time is: evaluations happen in many callbacks, and none knows of the others.
EVALUATION = Stopwatch()
