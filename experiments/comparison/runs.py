"""One finished run: what it reached, on which prompts, and what it cost, as its callbacks left it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from callbacks.evaluation.statistics import Mean, PerPicture, clustered_wilson, outcomes, over_runs, spread
from experiments.cli.saved_settings import saved_files
from lightning_modules.errors import DataError

Entry = Mapping[str, Any]  # one evaluation of win_rate.json, or one line of cost.json's history

MAX_SETTINGS = 10_000  # aliases in a YAML file can stand for any number

# What the tables call a cost -> the fields of cost.json that add up to it.
COSTS = {
    "denoiser evaluations": ("training_denoiser_rows", "sampling_denoiser_rows"),
    "pictures": ("data_pictures", "drawn_pictures"),
    "CPU seconds": ("cpu_seconds",),
}


@dataclass(frozen=True)
class Rate:
    """A win rate.

    Attributes:
        rate: ties count half.
        interval: ``clustered_wilson``'s; None where the scores of every picture are not known.
        spread: standard deviation of the runs' rates; None for a single run.
    """

    rate: float
    interval: tuple[float, float] | None = None
    spread: float | None = None

    @staticmethod
    def of(runs: Sequence[tuple[PerPicture, PerPicture]]) -> Rate:
        """Of the scores of policy and reference in each run; every prompt is averaged over the runs first."""
        found = [outcomes(policy, reference) for policy, reference in runs]
        joined = over_runs(found)
        return Rate(Mean.of(joined).mean, clustered_wilson(joined), spread([Mean.of(run).mean for run in found]))


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
            _require_results(path, entry)
        costs = _read_entries(folder / "cost.json")
        return Run(label, folder, judged[-1], curve, tuple(costs), _read_settings(folder))

    def scores(self, whose: str, column: str) -> PerPicture | None:
        """The result's scores, [prompt][picture], of the "policy" or the "reference".

        None where there is no reference, and in histories of before such scores were kept.
        """
        found: PerPicture | None = self.result.get("scores", {}).get(whose, {}).get(column)
        return found

    def mean(self, whose: str, column: str) -> Mean | None:
        """Of the "policy" or the "reference"; without the scores of every picture its uncertainty is not known."""
        scores, kept = self.scores(whose, column), self.result[whose].get(column)
        if scores is not None:
            return Mean.of(scores)
        return None if kept is None else Mean(kept["mean"], None)

    def wins(self, column: str) -> Rate | None:
        """Against the base; None without one."""
        policy, reference = self.scores("policy", column), self.scores("reference", column)
        if policy is not None and reference is not None:
            return Rate.of([(policy, reference)])
        kept = self.result["comparisons"].get(column)
        return None if kept is None else Rate(kept["rate"])

    def cost(self, name: str, step: int | float) -> float | None:
        """A cost of ``COSTS`` up to a step, interpolated between those that were written; None if none were."""
        if not self.costs:
            return None
        steps = [0.0, *(entry["step"] for entry in self.costs)]
        values = [0.0, *(sum(entry[field] for field in COSTS[name]) for entry in self.costs)]
        return float(np.interp(step, steps, values))


def _require_results(path: Path, entry: Entry) -> None:
    """Every number that a comparison reads from an entry of ``win_rate.json`` is there.

    Raises:
        DataError: one is not.
    """
    protocol = entry.get("protocol")
    if not protocol:
        raise DataError(f"{path}: step {entry['step']} does not say how it was judged; evaluate the run again")
    try:
        numbers = [found["mean"] for whose in ("policy", "reference") for found in entry[whose].values()]
        numbers += [count["rate"] for count in entry["comparisons"].values()]
        good = set(reward_names(protocol)) <= set(entry["policy"])
        if "scores" in entry:
            tables = [table for whose in ("policy", "reference") for table in entry["scores"][whose].values()]
            sizes = [[len(pictures) for pictures in table] for table in tables]
            numbers += [score for table in tables for pictures in table for score in pictures]
            good &= all(set(entry["scores"][whose]) == set(entry[whose]) for whose in ("policy", "reference"))
            good &= all(len(size) == protocol["number_of_prompts"] for size in sizes)
            good &= all(number == protocol["images_per_prompt"] for size in sizes for number in size)
        good &= all(map(math.isfinite, numbers))
    except (KeyError, TypeError, AttributeError):
        good = False
    if not good:
        raise DataError(f"{path}: the results of step {entry['step']} are damaged; evaluate the run again")


def reward_names(protocol: Entry) -> list[str]:
    """The judges of an evaluation."""
    return list(protocol["rewards"])


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
