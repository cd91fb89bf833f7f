"""What one evaluation found: for the logger, for ``win_rate.json``, and as a table for people."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table

from callbacks.evaluation.kept import add_entry
from callbacks.evaluation.scores import Scores
from callbacks.evaluation.statistics import Mean, WinCount
from lightning_modules.terminal import literal


@dataclass(frozen=True)
class Report:
    """One evaluation.

    Attributes:
        split: "val" or "test".
        step: optimizer steps that the policy has seen.
        policy, reference: means of every column; the reference's is empty if there is none.
        comparisons: of every column, parts included.
        protocol: how it was judged, ``WinRate.protocol``.
    """

    split: str
    step: int
    policy: Mapping[str, Mean]
    reference: Mapping[str, Mean]
    comparisons: Mapping[str, WinCount]
    protocol: Mapping[str, Any] = field(default_factory=dict)

    @staticmethod
    def of(
        split: str,
        step: int,
        policy: Scores,
        reference: Scores | None,
        protocol: Mapping[str, Any] | None = None,
    ) -> Report:
        against = reference or {}
        return Report(
            split,
            step,
            {name: Mean.of(values) for name, values in policy.items()},
            {name: Mean.of(values) for name, values in against.items()},
            {name: WinCount.of(policy[name], values) for name, values in against.items()},
            protocol or {},
        )

    def metrics(self) -> dict[str, float]:
        """What is logged: win rates of the rewards (not of their parts), means of everything."""
        metrics = {}
        for name, count in self.comparisons.items():
            if "/" not in name:
                metrics[f"{self.split}/win_rate/{name}"] = count.rate
                metrics[f"{self.split}/win_rate/{name}_low"] = count.low
                metrics[f"{self.split}/win_rate/{name}_high"] = count.high
        for kind, means in (("reward", self.policy), ("reference_reward", self.reference)):
            for name, mean in means.items():
                metrics[f"{self.split}/{kind}/{name}"] = mean.mean
                metrics[f"{self.split}/{kind}/{name}_se"] = mean.standard_error
        return metrics

    def append_to(self, path: Path) -> None:
        """Add this report to the history; one of the same split and step (a repeated evaluation) is replaced."""
        add_entry(path, asdict(self))

    def table(self) -> Table:
        """The report for people, at most 80 characters wide; parts stand indented under their reward."""
        caption = "mean ± standard error; reference: the model before alignment" if self.comparisons else None
        table = Table(title=f"{self.split} prompts, step {self.step}", caption=caption)
        columns = ["reference", "policy", "win rate [95%]", "n"] if self.comparisons else ["policy"]
        table.add_column("reward", no_wrap=True)
        for column in columns:
            table.add_column(column, justify="right", no_wrap=True)
        for name, mean in self.policy.items():
            cells = [_shown(mean)]
            if name in self.comparisons:
                count = self.comparisons[name]
                rate = f"{100 * count.rate:.1f}% [{100 * count.low:.1f}, {100 * count.high:.1f}]"
                cells = [_shown(self.reference[name]), *cells, rate, str(count.n)]
            reward, _, part = name.partition("/")
            table.add_row(literal(f"  {part}" if part else reward), *map(literal, cells))
        return table


def _shown(mean: Mean) -> str:
    return f"{mean.mean:.3f} ±{mean.standard_error:.3f}"
