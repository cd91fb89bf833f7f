"""Finished runs read side by side: the same prompts, the same noise, what they reached and what it cost."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from callbacks.evaluation.statistics import Mean, WinCount, wilson_interval
from experiments.cli.saved_settings import saved_files
from lightning_modules.errors import ConfigError, DataError

Entry = Mapping[str, Any]  # one evaluation of win_rate.json, or one line of cost.json's history

MAX_SETTINGS = 10_000  # aliases in a YAML file can stand for any number

# What the tables call a cost -> the fields of cost.json that add up to it.
COSTS = {
    "denoiser evaluations": ("training_denoiser_rows", "sampling_denoiser_rows"),
    "pictures": ("data_pictures", "drawn_pictures"),
    "CPU seconds": ("cpu_seconds",),
}


@dataclass(frozen=True)
class Run:
    """One finished run.

    Attributes:
        label: the method that it is a run of.
        folder: where it lives.
        result: the last evaluation on the split that is compared.
        curve: its evaluations on validation prompts, by step.
        costs: its costs by step; empty where none were counted.
        settings: those of its last start as dotted names and values; classes stand in place of their paths.
    """

    label: str
    folder: Path
    result: Entry
    curve: tuple[Entry, ...]
    costs: tuple[Entry, ...]
    settings: Mapping[str, str]

    @staticmethod
    def read(label: str, folder: Path, split: str) -> Run:
        """Read what the callbacks left in a run folder.

        Raises:
            DataError: there is no such folder, no evaluation on the split, or a file of it cannot be read.
        """
        if not folder.is_dir():
            raise DataError(f"run folder {folder} does not exist; give the --run_dir of a finished run")
        path = folder / "win_rate.json"
        evaluations = sorted(_read_entries(path, "policy"), key=lambda entry: entry["step"])
        judged = [entry for entry in evaluations if entry["split"] == split]
        if not judged:
            how = "run `python -m experiments.run test` on it" if split == "test" else "fit it with a WinRate callback"
            raise DataError(f"{path} has no evaluation on the {split} prompts; {how} first")
        curve = tuple(entry for entry in evaluations if entry["split"] == "val")
        for entry in (*curve, judged[-1]):
            if not entry.get("protocol"):
                raise DataError(f"{path}: step {entry['step']} does not say how it was judged; evaluate the run again")
        costs = _read_entries(folder / "cost.json")
        return Run(label, folder, judged[-1], curve, tuple(costs), _read_settings(folder))

    def cost(self, name: str, step: int | float) -> float | None:
        """A cost of ``COSTS`` up to a step, interpolated between those that were written; None if none were."""
        if not self.costs:
            return None
        steps = [0.0, *(entry["step"] for entry in self.costs)]
        values = [0.0, *(sum(entry[field] for field in COSTS[name]) for entry in self.costs)]
        return float(np.interp(step, steps, values))


@dataclass(frozen=True)
class Score:
    """A mean over pictures and runs.

    Attributes:
        mean: over the runs, each a mean over its pictures.
        standard_error: over pictures, of one run (root mean square over the runs). Runs share prompts and noise, so
            that several of them don't make it smaller.
        spread: standard deviation of the runs' means; None for a single run.
    """

    mean: float
    standard_error: float
    spread: float | None


@dataclass(frozen=True)
class Method:
    """The runs of one label: one method, several seeds."""

    label: str
    runs: tuple[Run, ...]

    def score(self, column: str) -> Score:
        parts = [Mean(**run.result["policy"][column]) for run in self.runs]
        means = [part.mean for part in parts]
        error = math.sqrt(statistics.fmean(part.standard_error**2 for part in parts))
        return Score(statistics.fmean(means), error, statistics.stdev(means) if len(means) > 1 else None)

    def wins(self, reward: str) -> WinCount | None:
        """Against the base; counts added over the runs, Wilson's interval of the sum. None without a reference."""
        counts = [wins(run, reward) for run in self.runs]
        known = [count for count in counts if count is not None]
        if len(known) < len(counts):
            return None
        n, won = sum(count.n for count in known), sum(count.wins for count in known)
        ties, lost = sum(count.ties for count in known), sum(count.losses for count in known)
        successes = won + ties / 2
        return WinCount(n, won, ties, lost, successes / n, *wilson_interval(successes, n))

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
        return list(self.protocol["rewards"])

    @property
    def protocol(self) -> Entry:
        result: Entry = self.runs[0].result["protocol"]
        return result

    def parts(self, reward: str) -> list[str]:
        """Columns of a reward's parts, such as ``shapes/correctness``."""
        return [column for column in self.runs[0].result["policy"] if column.startswith(f"{reward}/")]

    def base(self, column: str, split: str | None = None) -> Mean | None:
        """The reference's mean, on the prompts compared or on another split; None if no run has a reference."""
        entries = [run.result for run in self.runs]
        if split is not None and split != self.split:
            entries = [entry for run in self.runs for entry in run.curve]
        return next((Mean(**entry["reference"][column]) for entry in entries if entry["reference"]), None)

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


def wins(run: Run, reward: str) -> WinCount | None:
    """One run's comparison against the base."""
    comparisons = run.result["comparisons"]
    return WinCount(**comparisons[reward]) if reward in comparisons else None


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
        for column, mean in run.result["reference"].items():
            one = Mean(**known[0].result["reference"][column])
            if abs(one.mean - mean["mean"]) > max(one.standard_error / 2, 1e-6):
                raise ConfigError(
                    f"{known[0].folder} and {run.folder} start from different base models, or their rewards differ: "
                    f"the reference's {column} is {one.mean:.4f} and {mean['mean']:.4f}; compare runs of one base"
                )


def _read_entries(path: Path, *parts: str) -> list[dict[str, Any]]:
    """A history that a run keeps: one entry per step, of numbers by name, with the named parts; none without a file.

    Raises:
        DataError: it is something else.
    """
    if not path.is_file():
        return []
    try:
        entries = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON ({error}); run the job that wrote it again") from error
    for entry in entries if isinstance(entries, list) else [None]:
        if not isinstance(entry, dict) or not isinstance(entry.get("step"), int | float):
            raise DataError(f"{path} is no history of a run: want a list of entries with a step each")
        if any(not isinstance(entry.get(part), dict) for part in parts) or (parts and "split" not in entry):
            raise DataError(f"{path}: step {entry['step']} lacks its results; run the job that wrote it again")
    return list(entries)


def _read_settings(folder: Path) -> dict[str, str]:
    """The settings of a run's last start, empty where it has kept none.

    Raises:
        DataError: its file is no plain YAML, or without bounds.
    """
    configs = saved_files(folder)
    if not configs:
        return {}
    try:
        tree = yaml.safe_load(configs[-1].read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise DataError(f"{configs[-1]}: cannot be read as YAML ({' '.join(str(error).split())})") from error
    if not isinstance(tree, dict):
        raise DataError(f"{configs[-1]} holds no settings: want a mapping at its top")
    tree.pop("start", None)  # says how the settings came together
    found = dict(islice(_flattened(tree), MAX_SETTINGS + 1))
    if len(found) > MAX_SETTINGS:
        raise DataError(f"{configs[-1]} holds more than {MAX_SETTINGS} settings; a run has some hundred")
    return found


def _flattened(node: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """``model.objective.beta`` -> ``3000.0`` of a config; a class is its name, a callback's number its class."""
    if isinstance(node, dict) and "class_path" in node:
        yield name, node["class_path"].split(".")[-1]
        yield from _flattened(node.get("init_args") or {}, name)
    elif isinstance(node, dict):
        for key, value in node.items():
            yield from _flattened(value, f"{name}.{key}" if name else str(key))
    elif isinstance(node, list) and any(isinstance(item, dict) for item in node):
        for number, item in enumerate(node):
            named = isinstance(item, dict) and "class_path" in item
            yield from _flattened(item, f"{name}.{item['class_path'].split('.')[-1] if named else number}")
    else:
        yield name, json.dumps(node) if isinstance(node, list) else str(node)
