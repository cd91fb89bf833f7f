"""What one evaluation found: for the logger, for ``win_rate.json``, and as a table for people."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table

from callbacks.evaluation.kept import add_entry
from callbacks.evaluation.statistics import INTERVAL, Mean, PerPicture, WinCount
from lightning_modules.terminal import literal


@dataclass(frozen=True)
class Report:
    """One evaluation.

    Attributes:
        split: "val" or "test".
        step: optimizer steps that the policy has seen.
        policy, reference: means of every column; the reference's is empty if there is none.
        comparisons: of every column, parts included.
        protocol: how it was judged, ``Protocol.described``.
        scores: "policy" and "reference" -> column -> every picture's score, [prompt][picture]: what
            ``experiments.compare`` counts anew over several runs.
    """

    split: str
    step: int
    policy: Mapping[str, Mean]
    reference: Mapping[str, Mean]
    comparisons: Mapping[str, WinCount]
    protocol: Mapping[str, Any] = field(default_factory=dict)
    scores: Mapping[str, Mapping[str, PerPicture]] = field(default_factory=dict)

    @staticmethod
    def of(
        split: str,
        step: int,
        policy: Mapping[str, PerPicture],
        reference: Mapping[str, PerPicture] | None,
        protocol: Mapping[str, Any] | None = None,
    ) -> Report:
        """Count and average scores; ``policy`` and ``reference``: column -> [prompt][picture]."""
        against = reference or {}
        return Report(
            split,
            step,
            {name: Mean.of(values) for name, values in policy.items()},
            {name: Mean.of(values) for name, values in against.items()},
            {name: WinCount.of(policy[name], values) for name, values in against.items()},
            protocol or {},
            {"policy": policy, "reference": against},
        )

    def metrics(self) -> dict[str, float]:
        """What is logged: win rates of the rewards (not of their parts), means and their errors of everything."""
        metrics: dict[str, float] = {}
        for name, count in self.comparisons.items():
            if "/" not in name:
                metrics[f"{self.split}/win_rate/{name}"] = count.rate
                metrics[f"{self.split}/win_rate/{name}_low"] = count.low
                metrics[f"{self.split}/win_rate/{name}_high"] = count.high
        for kind, means in (("reward", self.policy), ("reference_reward", self.reference)):
            for name, mean in means.items():
                metrics[f"{self.split}/{kind}/{name}"] = mean.mean
                if mean.standard_error is not None:
                    metrics[f"{self.split}/{kind}/{name}_se"] = mean.standard_error
        return metrics

    def append_to(self, path: Path) -> None:
        """Add this report to the history; one of the same split and step (a repeated evaluation) is replaced."""
        add_entry(path, asdict(self))

    def table(self) -> Table:
        """The report for people, at most 80 characters wide; parts stand indented under their reward."""
        caption = "± standard error over prompts"
        if self.comparisons:
            caption = f"mean {caption}; {INTERVAL}; reference: the model before alignment"
        table = Table(title=f"{self.split} prompts, step {self.step}", caption=caption)
        columns = ["reference", "policy", "win rate [95%]", "n"] if self.comparisons else ["policy"]
        table.add_column("reward", no_wrap=True)
        for column in columns:
            table.add_column(column, justify="right", no_wrap=True)
        for name, mean in self.policy.items():
            cells = [mean.shown()]
            if name in self.comparisons:
                count = self.comparisons[name]
                cells = [self.reference[name].shown(), *cells, count.shown(), str(count.n)]
            reward, _, part = name.partition("/")
            table.add_row(literal(f"  {part}" if part else reward), *map(literal, cells))
        return table
