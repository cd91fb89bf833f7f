"""Means of scores and rates of wins, with intervals for a new draw of prompts.

Pictures of one prompt are alike: they score and win together, and are no independent trials. Every uncertainty here is
therefore one over prompts; over pictures, intervals would be too narrow. Scores come as ``scores[prompt][picture]``.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import fmean

# One number per picture, [prompt][picture]: scores, outcomes, differences. Every prompt has at least one picture.
PerPicture = Sequence[Sequence[int | float]]

INTERVAL = "95% intervals for a new draw of prompts"  # what tables and pages say of them
CONFIDENCE = 0.95
ROUNDING = 1e-24  # a variance of outcomes below it is one of floating-point rounding


@dataclass(frozen=True)
class Mean:
    """A mean over all pictures, and how far it may be from that of other prompts.

    Attributes:
        mean: over pictures; prompts weigh by their pictures, of which they commonly have equally many.
        standard_error: over prompts, of the mean of a new draw of as many prompts; None for one prompt.
        low, high: Student's 95% interval, with one degree of freedom less than prompts; None for one prompt.
    """

    mean: float
    standard_error: float | None
    low: float | None = None
    high: float | None = None

    @staticmethod
    def of(scores: PerPicture) -> Mean:
        mean, variance = _mean_and_variance(scores)
        if variance is None:
            return Mean(mean, None)
        error = math.sqrt(variance)
        reach = student_quantile(len(scores) - 1) * error
        return Mean(mean, error, mean - reach, mean + reach)

    def shown(self) -> str:
        """``0.531 ±0.019``: the mean and its standard error, where there is one."""
        return f"{self.mean:.3f}" + (f" ±{self.standard_error:.3f}" if self.standard_error is not None else "")


@dataclass(frozen=True)
class WinCount:
    """Paired comparisons of pictures.

    Attributes:
        n: pairs of pictures; wins + ties + losses.
        rate: (wins + tie x ties) / n, where ``tie`` is what a tie counts, commonly half.
        low, high: ``clustered_wilson``'s 95% interval of the rate.
    """

    n: int
    wins: int
    ties: int
    losses: int
    rate: float
    low: float
    high: float

    @staticmethod
    def of(policy: PerPicture, reference: PerPicture, tie: float = 0.5) -> WinCount:
        """Picture by picture of each prompt, which ``policy`` wins with the higher score.

        Args:
            policy, reference: scores of the same pictures of the same prompts.
            tie: what equal scores count: 0.5, or 0 where they are to count as lost.
        """
        found = outcomes(policy, reference, tie)
        pairs = [pair for one, two in zip(policy, reference) for pair in zip(one, two)]
        wins, ties = sum(p > r for p, r in pairs), sum(p == r for p, r in pairs)
        n = len(pairs)
        return WinCount(n, wins, ties, n - wins - ties, (wins + tie * ties) / n, *clustered_wilson(found))

    def shown(self) -> str:
        """``82.3% [76.3, 87.0]``: the rate and its interval."""
        return f"{100 * self.rate:.1f}% [{100 * self.low:.1f}, {100 * self.high:.1f}]"


def outcomes(policy: PerPicture, reference: PerPicture, tie: float = 0.5) -> PerPicture:
    """1 where the policy's picture has the higher score, ``tie`` where both have the same, else 0."""
    return [
        [1.0 if p > r else tie if p == r else 0.0 for p, r in zip(one, two, strict=True)]
        for one, two in zip(policy, reference, strict=True)
    ]


def clustered_wilson(outcomes: PerPicture) -> tuple[float, float]:
    """A 95% interval for a rate whose trials come in groups, one per prompt.

    Wilson's score interval with two of its three numbers exchanged: the variance v of the rate p over P prompts stands
    for n = p (1 - p) / v trials (n = P where the prompts don't differ, so that its width is never 0), and Student's
    97.5% quantile with P - 1 degrees of freedom for the normal's. One picture per prompt makes it Wilson's with
    n = P - 1; one prompt says nothing, and the interval is all of [0, 1].

    Args:
        outcomes: between 0 and 1, commonly 1, 1/2 and 0.
    """
    rate, variance = _mean_and_variance(outcomes)
    if variance is None:
        return 0.0, 1.0
    n = rate * (1 - rate) / variance if variance > ROUNDING else len(outcomes)
    return wilson_interval(rate, n, student_quantile(len(outcomes) - 1))


def wilson_interval(rate: float, n: int | float, z: float) -> tuple[float, float]:
    """Wilson's score interval of a rate found in ``n`` independent trials, ``z`` standard errors to each side."""
    centre = (rate + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(max(0.0, rate * (1 - rate)) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def paired_difference(first: PerPicture, second: PerPicture) -> Mean:
    """The mean over prompts of ``first - second``, each a mean over the prompt's pictures, with Student's interval.

    For scores of two policies, and for their ``outcomes`` against one base, also of unequally many runs: what a prompt
    adds to both falls out. Two intervals that overlap say nothing of the kind.
    """
    pairs = zip(first, second, strict=True)
    return Mean.of([[math.fsum(one) / len(one) - math.fsum(two) / len(two)] for one, two in pairs])


def over_runs(runs: Sequence[PerPicture]) -> PerPicture:
    """Several runs on the same prompts as one table: a prompt's pictures in all of them.

    Its means and intervals are those of prompts that were averaged over the runs first. They take the runs as alike:
    show their ``spread`` beside. The same joins outcomes of several rewards to their average.
    """
    return [[value for pictures in prompt for value in pictures] for prompt in zip(*runs, strict=True)]


def spread(means: Sequence[int | float]) -> float | None:
    """Standard deviation (sample, n - 1) of the means of several runs; None for one run."""
    if len(means) < 2:
        return None
    centre = fmean(means)
    return math.sqrt(math.fsum((mean - centre) ** 2 for mean in means) / (len(means) - 1))


def by_prompt(scored: Iterable[tuple[str, int | float]]) -> dict[str, list[int | float]]:
    """Scores of pictures, each with its prompt's text, gathered by prompt."""
    found: defaultdict[str, list[int | float]] = defaultdict(list)
    for prompt, score in scored:
        found[prompt].append(score)
    return dict(found)


def paired_by_prompt(
    first: Iterable[tuple[str, int | float]], second: Iterable[tuple[str, int | float]]
) -> tuple[PerPicture, PerPicture]:
    """Scores of two sets of pictures that were drawn apart, paired as Diffusion-SDPO pairs them.

    Prompts that both have, by their text; a prompt's pictures in their order, and those that only one set has are
    left out.
    """
    one, two = by_prompt(first), by_prompt(second)
    pairs = [list(zip(one[prompt], two[prompt])) for prompt in sorted(one.keys() & two.keys())]
    return [[a for a, _ in prompt] for prompt in pairs], [[b for _, b in prompt] for prompt in pairs]


@lru_cache(maxsize=64)
def student_quantile(degrees: int) -> float:
    """Student's 97.5% quantile, that of a two-sided 95% interval."""
    from scipy.special import stdtrit  # half a second, which no --help should wait for

    return float(stdtrit(degrees, (1 + CONFIDENCE) / 2))


def _mean_and_variance(values: PerPicture) -> tuple[float, float | None]:
    """The mean over pictures, and its variance over P prompts: P / (P - 1) sum_i (sum_i - n_i mean)^2 / n^2.

    With m pictures each it is the variance of the prompts' means over P. None for one prompt.
    """
    sums, sizes = list(map(math.fsum, values)), list(map(len, values))
    prompts, n = len(values), sum(sizes)
    mean = math.fsum(sums) / n
    if prompts < 2:
        return mean, None
    squares = math.fsum((total - size * mean) ** 2 for total, size in zip(sums, sizes))
    return mean, prompts / (prompts - 1) * squares / n**2
