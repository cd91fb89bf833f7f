"""Which charts the page of an evaluation has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from callbacks.evaluation.statistics import Mean
from experiments.evaluation.charts import COLOURS, Series, curves, histogram
from experiments.evaluation.findings import Finding, Method, baselines_of, methods, prompt_differences, rewards
from experiments.evaluation.results import Evaluation


@dataclass(frozen=True)
class Charts:
    """Charts of one reward at one guidance, or over several: what each shows, and the chart."""

    title: str
    charts: list[tuple[str, Markup]]


def styles(everyone: Sequence[Method]) -> dict[str, str]:
    """Every label's class in the style sheet: one colour at all guidances, grey for the first baseline."""
    base = next((method.label for method in everyone if method.baseline), None)
    others = dict.fromkeys(method.label for method in everyone if method.label != base)
    found = {} if base is None else {base: "base"}
    return found | {label: f"s{number % COLOURS}" for number, label in enumerate(others)}


def _guidances(everyone: Sequence[Method]) -> list[float]:
    return list(dict.fromkeys(method.guidance for method in everyone))


def histograms(evaluation: Evaluation) -> list[Charts]:
    """Scores of all pictures, and differences per prompt, for each reward and guidance."""
    everyone = methods(evaluation)
    classes = styles(everyone)
    guidances = _guidances(everyone)
    found = []
    for reward in rewards(evaluation):
        for guidance in guidances:
            here = [method for method in everyone if method.guidance == guidance]
            scores = [
                Series(one.label, classes[one.label], [score for prompt in one.scores(reward) for score in prompt])
                for one in here
            ]
            differences = [
                Series(one.label, classes[one.label], prompt_differences(one, base, reward))
                for one in here
                for base in baselines_of(one, everyone)[:1]
            ]
            name = f"{reward}, guidance {guidance:g}" if len(guidances) > 1 else reward
            shown = [("scores of all pictures", histogram(scores, f"{name}: scores", reward))]
            if differences:
                chart = histogram(differences, f"{name}: differences", f"{reward}, policy minus baseline", mark=0.0)
                shown.append(("differences per prompt", chart))
            found.append(Charts(name, shown))
    return found


def sweeps(evaluation: Evaluation) -> list[Charts]:
    """Mean score and win rate over guidance, for each reward; none at one guidance."""
    everyone = methods(evaluation)
    if len(_guidances(everyone)) == 1:
        return []
    classes = styles(everyone)
    found = []
    for reward in rewards(evaluation):
        means, rates = [], []
        for label, style in classes.items():
            here = sorted((one for one in everyone if one.label == label), key=lambda method: method.guidance)
            points = [(one.guidance, Mean.of(one.scores(reward))) for one in here]
            errors = [(guidance, mean.mean, mean.standard_error or 0.0) for guidance, mean in points]
            means.append(_curve(label, style, [(g, m, m - e, m + e) for g, m, e in errors]))
            wins = [
                (one.guidance, 100 * count.rate, 100 * count.low, 100 * count.high)
                for one in here
                for base in baselines_of(one, everyone)[:1]
                if (count := Finding.of(one, reward, base).wins) is not None
            ]
            rates += [_curve(label, style, wins)] if wins else []
        shown = [("mean, ± its standard error", curves(means, f"{reward} over guidance", reward))]
        if rates:
            chart = curves(rates, f"win rate by {reward} over guidance", "win rate, %", mark=50.0)
            shown.append(("win rate against the baseline, with its 95% interval", chart))
        found.append(Charts(reward, shown))
    return found


def _curve(label: str, style: str, points: Sequence[tuple[float, float, float, float]]) -> Series:
    places, heights, lows, highs = zip(*points)
    return Series(label, style, heights, places, lows, highs)
