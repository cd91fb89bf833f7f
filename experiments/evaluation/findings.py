"""What an evaluation says of every method: means, differences and wins, with intervals for a new draw of prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, product

from callbacks.evaluation.statistics import (
    Mean,
    PerPicture,
    WinCount,
    outcomes,
    over_runs,
    paired_difference,
    spread,
)
from experiments.evaluation.results import Drawn, Evaluation


@dataclass(frozen=True)
class Method:
    """All runs of one label at one guidance; a prompt's pictures are those of all of them."""

    label: str
    guidance: float
    baseline: bool
    runs: tuple[Drawn, ...]

    def scores(self, column: str) -> PerPicture:
        return over_runs([run.scores[column] for run in self.runs])

    def single_runs(self) -> list[Method]:
        """Each run by itself; none where there is only one."""
        if len(self.runs) == 1:
            return []
        return [Method(run.label, self.guidance, self.baseline, (run,)) for run in self.runs]


@dataclass(frozen=True)
class Finding:
    """A method's scores in one column, alone and against another method's at the same guidance.

    Attributes:
        method, column: whose scores, of what.
        mean: over prompts.
        spread: standard deviation of the runs' means; None for one run.
        against: the other method; None where there is none, and then what follows is None, too.
        difference: mean over prompts of the method's score minus the other's.
        wins: pictures of the same noise on which the method's score is higher, every run with every run.
        wins_spread: standard deviation of the runs' win rates; None for one run.
    """

    method: Method
    column: str
    mean: Mean
    spread: float | None
    against: Method | None = None
    difference: Mean | None = None
    wins: WinCount | None = None
    wins_spread: float | None = None

    @staticmethod
    def of(method: Method, column: str, against: Method | None = None) -> Finding:
        mean = Mean.of(method.scores(column))
        runs = spread([Mean.of(run.scores[column]).mean for run in method.runs])
        if against is None:
            return Finding(method, column, mean, runs)
        rates = [win_count(run, against, column).rate for run in method.single_runs()]
        difference = paired_difference(method.scores(column), against.scores(column))
        wins = win_count(method, against, column)
        return Finding(method, column, mean, runs, against, difference, wins, spread(rates))


@dataclass(frozen=True)
class Duel:
    """Two methods compared with each other, prompt by prompt.

    Attributes:
        finding: the first one's scores and wins against the second's.
        rates: mean over prompts of the difference of their win rates against one baseline; None without a baseline.
        baseline: which one.
    """

    finding: Finding
    rates: Mean | None = None
    baseline: Method | None = None


def methods(evaluation: Evaluation) -> list[Method]:
    """In the order in which they appear: those of one guidance together, as they were drawn."""
    runs: dict[tuple[float, bool, str], list[Drawn]] = {}
    for drawn in evaluation.drawn:
        runs.setdefault((drawn.guidance, drawn.baseline, drawn.label), []).append(drawn)
    return [Method(label, guidance, baseline, tuple(found)) for (guidance, baseline, label), found in runs.items()]


def columns(evaluation: Evaluation) -> list[str]:
    """The rewards, each followed by its parts."""
    found = list(dict.fromkeys(column for drawn in evaluation.drawn for column in drawn.scores))
    heads = [column for column in found if "/" not in column]
    return [column for head in heads for column in found if column == head or column.startswith(f"{head}/")]


def rewards(evaluation: Evaluation) -> list[str]:
    return [column for column in columns(evaluation) if "/" not in column]


def findings(evaluation: Evaluation, column: str) -> list[list[Finding]]:
    """Every method, followed by its single runs; a policy once against each baseline of its guidance."""
    everyone = methods(evaluation)
    found = []
    for method in everyone:
        others: Sequence[Method | None] = baselines_of(method, everyone) or [None]
        for other in others:
            found.append([Finding.of(one, column, other) for one in (method, *method.single_runs())])
    return found


def duels(evaluation: Evaluation, column: str) -> list[Duel]:
    """Every two policies of one guidance; once for each baseline that both were compared with."""
    everyone = methods(evaluation)
    policies = [method for method in everyone if not method.baseline]
    found = []
    for one, two in combinations(policies, 2):
        if one.guidance == two.guidance:
            finding = Finding.of(one, column, two)
            bases = baselines_of(one, everyone)
            found += [Duel(finding, rate_difference(one, two, base, column), base) for base in bases] or [Duel(finding)]
    return found


def baselines_of(method: Method, everyone: Sequence[Method]) -> list[Method]:
    """What a policy is compared with; none for a baseline."""
    if method.baseline:
        return []
    return [other for other in everyone if other.baseline and other.guidance == method.guidance]


def win_count(method: Method, other: Method, column: str) -> WinCount:
    """Wins of every run against every run of the other: pictures of one prompt and number start from one noise."""
    pairs = list(product(method.runs, other.runs))
    mine = over_runs([run.scores[column] for run, _ in pairs])
    theirs = over_runs([run.scores[column] for _, run in pairs])
    return WinCount.of(mine, theirs)


def rate_difference(one: Method, two: Method, base: Method, column: str) -> Mean:
    """How much more often ``one`` wins against the baseline than ``two`` does, prompt by prompt."""
    return paired_difference(*(_outcomes(method, base, column) for method in (one, two)))


def prompt_differences(method: Method, base: Method, column: str) -> list[float]:
    """Per prompt: the method's mean score minus the baseline's."""
    pairs = zip(method.scores(column), base.scores(column))
    return [sum(mine) / len(mine) - sum(theirs) / len(theirs) for mine, theirs in pairs]


def _outcomes(method: Method, base: Method, column: str) -> PerPicture:
    pairs = product(method.runs, base.runs)
    return over_runs([outcomes(run.scores[column], other.scores[column]) for run, other in pairs])
