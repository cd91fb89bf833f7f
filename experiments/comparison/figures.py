"""Pictures of a comparison: how methods got there, and where they ended."""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from statistics import fmean
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no display: before pyplot

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from callbacks.evaluation.statistics import INTERVAL
from experiments.comparison.methods import Comparison, Method
from experiments.comparison.runs import Rate, Run

# Okabe and Ito's colours, told apart by colour-blind readers too; markers tell them apart in grey.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
BASE = "#6b6b6b"
STYLE: Any = {  # matplotlib types its keys as a list of literals
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "axes.axisbelow": True,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
}

Point = tuple[int | float, float]
Interval = tuple[float, float]
Position = Callable[[Run, int | float], float]  # where a run's step stands on the axis


def curves(comparison: Comparison, reward: str) -> bytes:
    """PNG: validation reward and win rate against steps and against every cost; a thin line per seed, their mean bold.

    A run starts at the base's scores: before the first step policy and reference are one. Whiskers, of every prompt
    averaged over the seeds: Student's 95% interval of the paired difference from the base, and the clustered Wilson
    interval of the win rate; none where the scores of every picture are not known.
    """
    axes_of: dict[str, Position] = {"optimizer steps": lambda run, step: step}
    for name in comparison.costs:
        if name != "pictures":  # tables give them; they go with the denoiser evaluations
            axes_of[f"{name}, training and sampling" if "evaluations" in name else name] = _cost_position(name)
    with plt.rc_context(STYLE):
        width = 4.2 * len(axes_of) + 0.4
        figure, grid = plt.subplots(2, len(axes_of), figsize=(width, 6.6), squeeze=False, sharex="col", sharey="row")
        for column, (title, position) in enumerate(axes_of.items()):
            _draw_curves(grid[0][column], comparison, position, _reward_points(reward), partial(_gain, reward))
            _draw_curves(grid[1][column], comparison, position, _rate_points(reward), partial(_rate, reward))
            base = comparison.base(reward, "val")
            if base is not None:
                grid[0][column].axhline(base.mean, color=BASE, linestyle="--", linewidth=1.2, label="base")
            grid[1][column].axhline(50, color=BASE, linestyle="--", linewidth=1.2)
            grid[1][column].set_xlabel(title)
            grid[1][column].xaxis.set_major_locator(MaxNLocator(5))
            grid[1][column].xaxis.set_major_formatter(FuncFormatter(lambda value, _: amount(value)))
            grid[1][column].set_xlim(left=0)
        grid[0][0].set_ylabel(f"{reward} reward")
        grid[1][0].set_ylabel("win rate against the base, %")
        whiskers = f"whiskers: difference from the base, and win rate; {INTERVAL}"
        _legend_above(figure, grid[0][0], f"validation prompts, {_seeds(comparison)}; {whiskers}")
        return _png(figure)


def results(comparison: Comparison, reward: str) -> bytes:
    """PNG: reward, its parts and the win rate of every method at the end; dots are seeds.

    Whiskers, of every prompt averaged over the seeds: one standard error over prompts for rewards, the clustered Wilson
    95% interval for the win rate (against the base); none where the scores of every picture are not known.
    """
    columns = comparison.columns(reward)
    with plt.rc_context(STYLE):
        height = 1.5 + 0.42 * (len(comparison.methods) + 1)
        width = 2.9 * (len(columns) + 1) + 0.8
        figure, grid = plt.subplots(1, len(columns) + 1, figsize=(width, height), squeeze=False, sharey=True)
        for axes, column in zip(grid[0], columns):
            _draw_scores(axes, comparison, column)
        _draw_rates(grid[0][-1], comparison, reward)
        rows = ["base", *(method.label for method in comparison.methods)]
        grid[0][0].set_yticks(range(len(rows)), rows)
        grid[0][0].set_ylim(len(rows) - 0.5, -0.5)  # the base on top
        for axes in grid[0]:
            axes.tick_params(axis="y", length=0)
            axes.grid(axis="y", visible=False)
            axes.xaxis.set_major_locator(MaxNLocator(4))
        whiskers = f"whiskers: standard error over prompts; win rate: {INTERVAL}"
        figure.suptitle(f"{comparison.split} prompts, {_seeds(comparison)}\n{whiskers}", fontsize=10)
        figure.tight_layout()
        return _png(figure)


def amount(value: int | float) -> str:
    """A count in three digits: 950, 12.3k, 4.56M."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"


def _cost_position(name: str) -> Position:
    def position(run: Run, step: int | float) -> float:
        cost = run.cost(name, step)
        assert cost is not None  # comparison.costs names those that all runs have
        return cost

    return position


def _reward_points(reward: str) -> Callable[[Run], list[Point]]:
    def points(run: Run) -> list[Point]:
        start = [(0.0, entry["reference"][reward]["mean"]) for entry in run.curve[:1] if entry["reference"]]
        return start + [(entry["step"], entry["policy"][reward]["mean"]) for entry in run.curve if entry["step"]]

    return points


def _rate_points(reward: str) -> Callable[[Run], list[Point]]:
    def points(run: Run) -> list[Point]:
        judged = [entry for entry in run.curve if entry["comparisons"] and entry["step"]]
        rates = [(entry["step"], 100 * entry["comparisons"][reward]["rate"]) for entry in judged]
        return [(0.0, 50.0), *rates] if rates else []

    return points


def _gain(reward: str, method: Method, step: int | float, mean: float) -> Interval | None:
    """Ends of the paired difference's interval, seen from the method's mean."""
    gain = method.gain_at(step, reward)
    if gain is None or gain.low is None or gain.high is None:
        return None
    return mean + gain.low - gain.mean, mean + gain.high - gain.mean


def _rate(reward: str, method: Method, step: int | float, mean: float) -> Interval | None:
    rate = method.rate_at(step, reward)
    if rate is None or rate.interval is None:
        return None
    return 100 * rate.interval[0], 100 * rate.interval[1]


def _draw_curves(
    axes: Axes,
    comparison: Comparison,
    position: Position,
    points: Callable[[Run], list[Point]],
    interval: Callable[[Method, int | float, float], Interval | None],
) -> None:
    for number, method in enumerate(comparison.methods):
        colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
        by_step: defaultdict[int | float, list[Point]] = defaultdict(list)
        for run in method.runs:
            line = [(position(run, step), value) for step, value in points(run)]
            for (step, _), point in zip(points(run), line):
                by_step[step].append(point)
            if len(method.runs) > 1:
                axes.plot(*_columns(line), color=colour, linewidth=0.8, alpha=0.4)
        # Where one seed was judged and another not, a mean would jump: only steps that all of them have.
        shared = {step: found for step, found in sorted(by_step.items()) if len(found) == len(method.runs)}
        mean = {step: (fmean(x for x, _ in found), fmean(y for _, y in found)) for step, found in shared.items()}
        axes.plot(
            *_columns([*mean.values()]), color=colour, marker=marker, markersize=5, linewidth=2, label=method.label
        )
        for step, (x, y) in mean.items():
            if step and (ends := interval(method, step, y)) is not None:
                reach = [[max(0.0, y - ends[0])], [max(0.0, ends[1] - y)]]  # rounding at 0 and 1
                axes.errorbar(x, y, yerr=reach, color=colour, capsize=3, linewidth=1)


def _columns(points: Sequence[Point]) -> tuple[list[int | float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def _draw_scores(axes: Axes, comparison: Comparison, column: str) -> None:
    reward, _, part = column.partition("/")
    axes.set_title(part or f"{reward} reward")
    base = comparison.base(column)
    lows, highs = [], []
    if base is not None:
        axes.axvline(base.mean, color=BASE, linestyle="--", linewidth=1)
        error = base.standard_error or 0.0
        axes.errorbar(base.mean, 0, xerr=error, color=BASE, marker="o", capsize=4)
        lows, highs = [base.mean - error], [base.mean + error]
    for row, method in enumerate(comparison.methods, start=1):
        score, colour = method.score(column), _colour(row)
        seeds = [run.result["policy"][column]["mean"] for run in method.runs]
        _dots(axes, seeds, row, colour)
        error = score.standard_error or 0.0
        axes.errorbar(score.mean, row, xerr=error, color=colour, marker=_marker(row), capsize=4)
        lows.append(min(score.mean - error, *seeds))
        highs.append(max(score.mean + error, *seeds))
    room = 0.12 * (max(highs) - min(lows)) or 0.1
    axes.set_xlim(min(lows) - room, max(highs) + room)


def _draw_rates(axes: Axes, comparison: Comparison, reward: str) -> None:
    axes.set_title("win rate, %")
    axes.axvline(50, color=BASE, linestyle="--", linewidth=1)
    low, high = 40.0, 60.0
    for row, method in enumerate(comparison.methods, start=1):
        rate = method.wins(reward)
        if rate is None:
            continue
        ends = _whisker(axes, rate, row)
        of_seeds = [100 * one.rate for run in method.runs if (one := run.wins(reward))]
        _dots(axes, of_seeds, row, _colour(row))
        low, high = min(low, ends[0] - 3, *of_seeds), max(high, ends[1] + 3, *of_seeds)
    axes.set_xlim(max(low - 1, -1), min(high + 1, 101))  # no dot is cut at the edge


def _whisker(axes: Axes, found: Rate, row: int) -> tuple[float, float]:
    """Draw a rate and its interval, in percent; returns the interval's ends, or the rate twice where it has none."""
    rate = 100 * found.rate
    low, high = (rate, rate) if found.interval is None else (100 * end for end in found.interval)
    reach = [[max(0.0, rate - low)], [max(0.0, high - rate)]]  # rounding at 0 and 1
    axes.errorbar(rate, row, xerr=reach, color=_colour(row), marker=_marker(row), capsize=4)
    return low, high


def _dots(axes: Axes, values: Sequence[float], row: int, colour: str) -> None:
    """The seeds, below the mean so that they don't hide it."""
    if len(values) > 1:
        axes.plot(values, [row + 0.22] * len(values), "o", color=colour, alpha=0.5, markersize=4, linestyle="none")


def _colour(row: int) -> str:
    return COLOURS[(row - 1) % len(COLOURS)]


def _marker(row: int) -> str:
    return MARKERS[(row - 1) % len(MARKERS)]


def _seeds(comparison: Comparison) -> str:
    counts = sorted({len(method.runs) for method in comparison.methods})
    return "1 seed per method" if counts == [1] else f"{' or '.join(map(str, counts))} seeds per method"


def _legend_above(figure: Figure, axes: Axes, title: str) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.tight_layout(rect=(0, 0, 1, 0.9))
    columns = min(len(labels), 6)
    figure.legend(handles, labels, title=title, title_fontsize=11, loc="upper center", ncols=columns, frameon=False)


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=144)
    plt.close(figure)
    return buffer.getvalue()
