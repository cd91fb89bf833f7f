"""Methods side by side: each the runs of one label, judged on the same prompts and noise."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

from callbacks.evaluation.statistics import Mean, PerPicture, outcomes, over_runs, paired_difference, spread
from experiments.comparison.runs import COSTS, Entry, Rate, Run, reward_names
from lightning_modules.errors import ConfigError


@dataclass(frozen=True)
class Score:
    """A mean over prompts, each of which was averaged over the runs first.

    Attributes:
        mean: of all pictures of all runs, which have equally many.
        standard_error: over prompts; None where the scores of every picture are not known.
        spread: standard deviation of the runs' means, which the standard error knows nothing of; None for a single run.
    """

    mean: float
    standard_error: float | None
    spread: float | None

    def shown(self) -> str:
        return Mean(self.mean, self.standard_error).shown()


@dataclass(frozen=True)
class Difference:
    """What one method has more than another, prompt by prompt.

    Attributes:
        first, second: their labels; ``second`` may be the base.
        scores: column -> mean of first - second over prompts, with its interval.
        rate: the same of their outcomes against the base; None where one has none, and for the base itself.
    """

    first: str
    second: str
    scores: dict[str, Mean]
    rate: Mean | None


@dataclass(frozen=True)
class Method:
    """The runs of one label: one method, several seeds."""

    label: str
    runs: tuple[Run, ...]

    def scores(self, column: str) -> PerPicture | None:
        """Every prompt's pictures in all runs; None where a run has not kept them."""
        return _joined([run.scores("policy", column) for run in self.runs])

    def outcomes(self, reward: str) -> PerPicture | None:
        """1, 1/2 or 0 of every picture against the base's, as ``scores``; None without a base."""
        pairs = [(run.scores("policy", reward), run.scores("reference", reward)) for run in self.runs]
        return _joined([None if one is None or two is None else outcomes(one, two) for one, two in pairs])

    def score(self, column: str) -> Score:
        means = [run.result["policy"][column]["mean"] for run in self.runs]
        scores = self.scores(column)
        error = None if scores is None else Mean.of(scores).standard_error
        return Score(statistics.fmean(means), error, spread(means))

    def wins(self, reward: str) -> Rate | None:
        """Against the base; None without a reference. Without every picture's scores the rate alone is known."""
        pairs = [(run.scores("policy", reward), run.scores("reference", reward)) for run in self.runs]
        known = [(one, two) for one, two in pairs if one is not None and two is not None]
        if len(known) == len(pairs):
            return Rate.of(known)
        rates = [found.rate for run in self.runs if (found := run.wins(reward)) is not None]
        return Rate(statistics.fmean(rates), None, spread(rates)) if len(rates) == len(self.runs) else None

    def gain_at(self, step: int | float, reward: str) -> Mean | None:
        """What the policy has more than the base on the validation prompts at a step, prompt by prompt.

        None at a step or for runs of which the scores of every picture are not known.
        """
        pairs = self._judged_at(step, reward)
        return paired_difference(*map(over_runs, zip(*pairs))) if pairs else None

    def rate_at(self, step: int | float, reward: str) -> Rate | None:
        """The win rate against the base on the validation prompts at a step; None as for ``gain_at``."""
        pairs = self._judged_at(step, reward)
        return Rate.of(pairs) if pairs else None

    def _judged_at(self, step: int | float, reward: str) -> list[tuple[PerPicture, PerPicture]]:
        """Every run's scores of policy and reference; empty where one has none."""
        entries = [entry.get("scores", {}) for run in self.runs for entry in run.curve if entry["step"] == step]
        known = [(s["policy"][reward], s["reference"][reward]) for s in entries if s.get("reference")]
        return known if len(known) == len(self.runs) else []

    def cost(self, name: str) -> float | None:
        """Mean over the runs, up to the step that was judged."""
        costs = [run.cost(name, run.result["step"]) for run in self.runs]
        known = [cost for cost in costs if cost is not None]
        return statistics.fmean(known) if len(known) == len(costs) else None

    @property
    def steps(self) -> str:
        return ", ".join(str(step) for step in sorted({run.result["step"] for run in self.runs}))


@dataclass(frozen=True)
class Comparison:
    """Methods judged alike."""

    split: str
    methods: tuple[Method, ...]

    @staticmethod
    def of(runs: Sequence[Run], split: str) -> Comparison:
        """Group the runs by label, in the order in which labels come first.

        Raises:
            ConfigError: a run given twice, runs judged differently, or runs from different base models.
        """
        folders = [run.folder.resolve() for run in runs]
        for folder in folders:
            if folders.count(folder) > 1:
                raise ConfigError(f"run folder {folder} is given twice; it would count as two seeds")
        for run in runs[1:]:
            _require_same_protocol(runs[0], run)
        _require_same_base(runs)
        labels = list(dict.fromkeys(run.label for run in runs))
        methods = (Method(label, tuple(run for run in runs if run.label == label)) for label in labels)
        return Comparison(split, tuple(methods))

    @property
    def runs(self) -> list[Run]:
        return [run for method in self.methods for run in method.runs]

    @property
    def rewards(self) -> list[str]:
        return reward_names(self.protocol)

    @property
    def protocol(self) -> Entry:
        result: Entry = self.runs[0].result["protocol"]
        return result

    def columns(self, reward: str) -> list[str]:
        """A reward and its parts, such as ``shapes/correctness``."""
        return [reward, *(name for name in self.runs[0].result["policy"] if name.startswith(f"{reward}/"))]

    def base(self, column: str, split: str | None = None) -> Mean | None:
        """The reference's mean, on the prompts compared or on another split; None if no run has a reference."""
        if split is not None and split != self.split:
            entries = [entry["reference"] for run in self.runs for entry in run.curve]
            return next((Mean(known[column]["mean"], None) for known in entries if known), None)
        means = [mean for run in self.runs if (mean := run.mean("reference", column)) is not None]
        return next((mean for mean in means if mean.standard_error is not None), means[0] if means else None)

    def differences(self, reward: str) -> list[Difference]:
        """Of every method to the base and to every method before it; of those whose pictures' scores are known."""
        columns = self.columns(reward)
        base = {column: _first([run.scores("reference", column) for run in self.runs]) for column in columns}
        sides: list[tuple[str, dict[str, PerPicture | None], PerPicture | None]] = [("base", base, None)]
        sides += [(one.label, {c: one.scores(c) for c in columns}, one.outcomes(reward)) for one in self.methods]
        found = []
        for (second, less, lost), (first, more, won) in combinations(sides, 2):
            pairs = {c: (one, two) for c in columns if (one := more[c]) is not None and (two := less[c]) is not None}
            if pairs:
                rate = None if won is None or lost is None else paired_difference(won, lost)
                found.append(Difference(first, second, {c: paired_difference(*pairs[c]) for c in pairs}, rate))
        return found

    @property
    def costs(self) -> list[str]:
        """The costs that every run has counted."""
        return list(COSTS) if all(run.costs for run in self.runs) else []

    def differing_settings(self) -> dict[str, list[str]]:
        """Settings that are not the same in all runs -> each method's value, or values; "-" where it has none."""
        names = dict.fromkeys(name for run in self.runs for name in run.settings)
        table = {}
        for name in names:
            values = [[run.settings.get(name, "-") for run in method.runs] for method in self.methods]
            if len({value for of_method in values for value in of_method}) > 1 and name not in _WHERE:
                table[name] = [", ".join(dict.fromkeys(of_method)) for of_method in values]
        return table


# Where a run was kept, which says nothing about what it did.
_WHERE = {"run_dir", "ckpt_path", "trainer.default_root_dir"}


def _joined(runs: Sequence[PerPicture | None]) -> PerPicture | None:
    known = [scores for scores in runs if scores is not None]
    return over_runs(known) if len(known) == len(runs) else None


def _first(found: Sequence[PerPicture | None]) -> PerPicture | None:
    return next((scores for scores in found if scores is not None), None)


def _require_same_protocol(first: Run, other: Run) -> None:
    for one, two in ((first.result, other.result), *zip(first.curve[:1], other.curve[:1])):
        for name in dict.fromkeys([*one["protocol"], *two["protocol"]]):
            a, b = one["protocol"].get(name), two["protocol"].get(name)
            if a != b:
                raise ConfigError(
                    f"{first.folder} and {other.folder} were judged differently on the {one['split']} prompts: "
                    f"{name} is {a} and {b}; evaluate both with the same WinRate settings"
                )


def _require_same_base(runs: Sequence[Run]) -> None:
    """The same base model, from the same noise, gets the same scores up to rounding on another machine."""
    known = [run for run in runs if run.result["reference"]]
    for run in known[1:]:
        for column, found in run.result["reference"].items():
            one = known[0].result["reference"][column]
            if abs(one["mean"] - found["mean"]) > max((one.get("standard_error") or 0.0) / 2, 1e-6):
                raise ConfigError(
                    f"{known[0].folder} and {run.folder} start from different base models, or their rewards differ: "
                    f"the reference's {column} is {one['mean']:.4f} and {found['mean']:.4f}; compare runs of one base"
                )
