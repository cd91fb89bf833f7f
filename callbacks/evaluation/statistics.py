"""Means over pictures and counts of wins, with their uncertainty."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

Z95 = 1.959963984540054  # the standard normal's 97.5% quantile


@dataclass(frozen=True)
class Mean:
    """A mean over pictures and its standard error (sample standard deviation / sqrt n; 0 for one picture)."""

    mean: float
    standard_error: float

    @staticmethod
    def of(values: Sequence[float]) -> Mean:
        n = len(values)
        mean = math.fsum(values) / n
        variance = math.fsum((value - mean) ** 2 for value in values) / (n - 1) if n > 1 else 0.0
        return Mean(mean, math.sqrt(variance / n))


@dataclass(frozen=True)
class WinCount:
    """Paired comparisons of pictures made from the same noise.

    Attributes:
        n: pairs of pictures; wins + ties + losses.
        rate: (wins + ties / 2) / n.
        low, high: Wilson's 95% interval of the rate; it takes the pictures as independent, also those of one prompt.
    """

    n: int
    wins: int
    ties: int
    losses: int
    rate: float
    low: float
    high: float

    @staticmethod
    def of(policy: Sequence[float], reference: Sequence[float]) -> WinCount:
        n = len(policy)
        wins = sum(p > r for p, r in zip(policy, reference, strict=True))
        ties = sum(p == r for p, r in zip(policy, reference, strict=True))
        successes = wins + ties / 2
        return WinCount(n, wins, ties, n - wins - ties, successes / n, *wilson_interval(successes, n))


def wilson_interval(successes: int | float, n: int, z: float = Z95) -> tuple[float, float]:
    """Wilson's score interval of a proportion; ``successes`` may be half-integer, where ties count half."""
    rate = successes / n
    centre = (rate + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)
