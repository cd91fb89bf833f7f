"""Numbers as tables show them, with what they are sorted by."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from callbacks.evaluation.statistics import Mean, WinCount

NONE = "–"  # noqa: RUF001  # a cell without a number


@dataclass(frozen=True)
class Cell:
    """What is shown, and what it is sorted by."""

    text: str
    value: int | float | str | None = None


def decimals(means: Sequence[Mean]) -> int:
    """Decimals that show two digits of the smallest standard error; 3 where there is none."""
    errors = [mean.standard_error for mean in means if mean.standard_error]
    return min(7, max(1, 1 - math.floor(math.log10(min(errors))))) if errors else 3


def number_cell(value: int | float) -> Cell:
    return Cell(f"{value:g}", value)


def spread_cell(value: float | None, unit: str = "") -> Cell:
    """A standard deviation of runs, to two digits: of three runs not even the first is sharp."""
    return Cell(NONE) if value is None else Cell(f"{value:.2g}{unit}", value)


def mean_cell(mean: Mean, places: int) -> Cell:
    error = "" if mean.standard_error is None else f" ±{mean.standard_error:.{places}f}"
    return Cell(f"{mean.mean:.{places}f}{error}", mean.mean)


def difference_cell(mean: Mean | None, places: int, unit: int = 1) -> Cell:
    """A difference with its interval, in ``1 / unit``: 100 shows that of rates in points."""
    if mean is None:
        return Cell(NONE)
    interval = ""
    if mean.low is not None and mean.high is not None:
        interval = f" [{unit * mean.low:+.{places}f}, {unit * mean.high:+.{places}f}]"
    return Cell(f"{unit * mean.mean:+.{places}f}{interval}", mean.mean)


def rate_cell(wins: WinCount | None) -> Cell:
    if wins is None:
        return Cell(NONE)
    return Cell(f"{100 * wins.rate:.1f}% [{100 * wins.low:.1f}, {100 * wins.high:.1f}]", wins.rate)


def counts_cell(wins: WinCount | None) -> Cell:
    return Cell(NONE) if wins is None else Cell(f"{wins.wins}/{wins.ties}/{wins.losses}", wins.wins)
