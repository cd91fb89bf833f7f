"""Ways to do the same work, timed in turn within one process, so that other work on the machine meets all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

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


def alternate(ways: Mapping[str, Callable[[], Any]], rounds: int, clock: Clock) -> Timings:
    """Each way once to warm up, then ``rounds`` times in turn, in the other order every second round."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    results = {}
    for number in range(rounds + 1):
        order = list(ways) if number % 2 else list(reversed(ways))
        for name in order:
            begun = clock.now()
            results[name] = ways[name]()
            spent = clock.now() - begun
            if number:
                seconds[name].append(spent)
    return Timings(seconds, results)
