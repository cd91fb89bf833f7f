"""Findings as ``evaluation.csv``, in full precision, for whoever computes further."""

from __future__ import annotations

import csv
import io
from itertools import chain

from callbacks.evaluation.statistics import Mean
from experiments.evaluation.findings import Finding, columns, duels, findings
from experiments.evaluation.results import Evaluation

FIELDS = (
    *("policy", "run", "runs", "baseline", "guidance", "reward", "prompts", "pictures"),
    *("mean", "mean_standard_error", "mean_low", "mean_high", "mean_sd_of_runs", "against"),
    *("difference", "difference_standard_error", "difference_low", "difference_high"),
    *("wins", "ties", "losses", "win_rate", "win_rate_low", "win_rate_high", "win_rate_sd_of_runs", "rates_against"),
    *(f"rate_difference{end}" for end in ("", "_standard_error", "_low", "_high")),
)


def as_csv(evaluation: Evaluation) -> str:
    """``evaluation.csv``: one row per method or run, column of scores and method that it is compared with.

    In full precision; what there is not is empty. ``run`` is empty in the row of a method with several runs.
    """
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, FIELDS, lineterminator="\n")
    writer.writeheader()
    for column in columns(evaluation):
        for finding in chain.from_iterable(findings(evaluation, column)):
            writer.writerow(_record(finding))
        for duel in duels(evaluation, column):
            record = _record(duel.finding)
            if duel.rates is not None and duel.baseline is not None:
                record |= {"rates_against": duel.baseline.label} | _interval("rate_difference", duel.rates)
            writer.writerow(record)
    return buffer.getvalue()


def _record(finding: Finding) -> dict[str, object]:
    method, scores = finding.method, finding.method.scores(finding.column)
    record: dict[str, object] = {
        "policy": method.label,
        "run": method.runs[0].source if len(method.runs) == 1 else "",
        "runs": len(method.runs),
        "baseline": int(method.baseline),
        "guidance": method.guidance,
        "reward": finding.column,
        "prompts": len(scores),
        "pictures": sum(map(len, scores)),
        **_interval("mean", finding.mean),
        "mean_sd_of_runs": finding.spread,
    }
    if finding.against is not None and finding.difference is not None and finding.wins is not None:
        wins = finding.wins
        record |= {"against": finding.against.label, **_interval("difference", finding.difference)}
        record |= {"wins": wins.wins, "ties": wins.ties, "losses": wins.losses, "win_rate": wins.rate}
        record |= {"win_rate_low": wins.low, "win_rate_high": wins.high, "win_rate_sd_of_runs": finding.wins_spread}
    return record


def _interval(name: str, mean: Mean) -> dict[str, object]:
    ends = ("", "_standard_error", "_low", "_high")
    return {name + end: value for end, value in zip(ends, (mean.mean, mean.standard_error, mean.low, mean.high))}
