"""Charts of an evaluation as SVG, which the page's style sheet colours, by day and by night."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup, escape

WIDTH, HEIGHT = 420, 240  # in the units of the drawing; on the page it fills its column
LEFT, RIGHT, TOP, BOTTOM = 52, 10, 14, 38
COLOURS = 6  # of policies, that the style sheet has; a further policy takes the first again
BINS = (8, 40)  # at least and at most


@dataclass(frozen=True)
class Series:
    """Values of one method.

    Attributes:
        name: the method.
        style: its class in the style sheet: "base" or "s0", "s1", ...
        values: scores of a histogram, or heights of a curve.
        positions: of a curve's points.
        lows, highs: of a curve's interval.
    """

    name: str
    style: str
    values: Sequence[float]
    positions: Sequence[float] = ()
    lows: Sequence[float] = ()
    highs: Sequence[float] = ()


def histogram(series: Sequence[Series], title: str, axis: str, mark: float | None = None) -> Markup:
    """Shares of each series' values, as outlines over common bins.

    Args:
        series: each with at least one value.
        title: read out in the chart's stead.
        axis: what the values are.
        mark: where to draw a line.
    """
    everything = np.concatenate([np.asarray(one.values, dtype=float) for one in series])
    low, high = _room(float(everything.min()), float(everything.max()))
    edges = np.linspace(low, high, _bins(everything, high - low) + 1)
    shares = [100 * np.histogram(one.values, edges)[0] / len(one.values) for one in series]
    frame = _Frame((low, high), (0.0, 1.08 * max(float(share.max()) for share in shares)))
    parts = [frame.axes(axis, "%")]
    if mark is not None and low <= mark <= high:
        parts.append(frame.line([(mark, 0.0), (mark, frame.y[1])], "mark"))
    for one, share in zip(series, shares):
        steps = [(float(edges[0]), 0.0)]
        for left, right, height in zip(edges[:-1], edges[1:], share):
            steps += [(float(left), float(height)), (float(right), float(height))]
        parts.append(frame.line([*steps, (float(edges[-1]), 0.0)], f"line area {one.style}"))
    return _svg(title, parts)


def curves(series: Sequence[Series], title: str, axis: str, mark: float | None = None) -> Markup:
    """Each series' heights over its positions, with its intervals as whiskers.

    Args:
        series: with positions, lows and highs, as many as values.
        title: read out in the chart's stead.
        axis: what the heights are.
        mark: where to draw a level line.
    """
    heights = [h for one in series for h in (*one.values, *one.lows, *one.highs)] + ([] if mark is None else [mark])
    places = [p for one in series for p in one.positions]
    frame = _Frame(_room(min(places), max(places)), _room(min(heights), max(heights)))
    parts = [frame.axes("guidance", axis)]
    if mark is not None:
        parts.append(frame.line([(frame.x[0], mark), (frame.x[1], mark)], "mark"))
    for number, one in enumerate(series):
        shift = (number - (len(series) - 1) / 2) * 0.006 * (frame.x[1] - frame.x[0])  # whiskers stand side by side
        for place, low, high in zip(one.positions, one.lows, one.highs):
            parts.append(frame.line([(place + shift, low), (place + shift, high)], f"whisker {one.style}"))
        points = [(place + shift, height) for place, height in zip(one.positions, one.values)]
        parts.append(frame.line(points, f"line {one.style}"))
        parts += [frame.dot(*point, one.style) for point in points]
    return _svg(title, parts)


class _Frame:
    """Where values of two ranges stand in the drawing."""

    def __init__(self, x: tuple[float, float], y: tuple[float, float]) -> None:
        self.x, self.y = x, y

    def place(self, x: float, y: float) -> tuple[float, float]:
        across = (x - self.x[0]) / (self.x[1] - self.x[0])
        up = (y - self.y[0]) / (self.y[1] - self.y[0])
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    def line(self, points: Sequence[tuple[float, float]], style: str) -> Markup:
        path = "L".join("{:.1f} {:.1f}".format(*self.place(*point)) for point in points)
        return Markup('<path class="{}" d="M{}"/>').format(style, path)

    def dot(self, x: float, y: float, style: str) -> Markup:
        return Markup('<circle class="dot {}" cx="{:.1f}" cy="{:.1f}" r="3.5"/>').format(style, *self.place(x, y))

    def axes(self, across: str, up: str) -> Markup:
        """Grid lines with their numbers, and what the axes are."""
        parts = [Markup('<text class="axis" x="{}" y="{}">{}</text>').format((WIDTH + LEFT) // 2, HEIGHT - 4, across)]
        parts.append(Markup('<text class="up" x="{}" y="{}">{}</text>').format(4, 10, up))
        for tick in _ticks(*self.x):
            x, y = self.place(tick, self.y[0])
            parts.append(Markup('<text class="axis" x="{:.1f}" y="{:.1f}">{:g}</text>').format(x, y + 16, tick))
        for tick in _ticks(*self.y):
            x, y = self.place(self.x[0], tick)
            parts.append(self.line([(self.x[0], tick), (self.x[1], tick)], "grid"))
            parts.append(Markup('<text class="number" x="{:.1f}" y="{:.1f}">{:g}</text>').format(x - 6, y + 4, tick))
        return Markup("").join(parts)


def _bins(values: np.ndarray, width: float) -> int:
    """How many, by Freedman and Diaconis' rule, within ``BINS``."""
    quarters = np.quantile(values, (0.25, 0.75))
    step = 2 * float(quarters[1] - quarters[0]) / len(values) ** (1 / 3)
    return BINS[0] if step == 0 else int(min(BINS[1], max(BINS[0], np.ceil(width / step))))


def _ticks(low: float, high: float) -> list[float]:
    """About five round numbers within a range."""
    from matplotlib.ticker import MaxNLocator  # a third of a second, which no --help should wait for

    return [round(float(t), 12) for t in MaxNLocator(5).tick_values(low, high) if low <= t <= high]


def _room(low: float, high: float) -> tuple[float, float]:
    """A range with a little room to both sides, also where all values are one."""
    margin = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    return low - margin, high + margin


def _svg(title: str, parts: Sequence[Markup]) -> Markup:
    opening = Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">').format(WIDTH, HEIGHT, escape(title))
    return opening + Markup("").join(parts) + Markup("</svg>")
