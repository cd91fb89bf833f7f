"""Tables of an evaluation: for the terminal, for the page, as Markdown and as CSV."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich import box
from rich.table import Table as RichTable

from callbacks.evaluation.statistics import INTERVAL, Mean
from experiments.evaluation.cells import (
    NONE,
    Cell,
    counts_cell,
    decimals,
    difference_cell,
    mean_cell,
    number_cell,
    rate_cell,
    spread_cell,
)
from experiments.evaluation.findings import Duel, Method, columns, duels, findings, methods, rewards
from experiments.evaluation.results import Evaluation
from lightning_modules.terminal import literal, printable

CAPTION = (
    f"{INTERVAL}: how far the numbers may lie from those of other prompts of the same kind. ± is the standard error of "
    "the mean over prompts. Differences are paired: per prompt, policy minus baseline. Win rates compare pictures of "
    "the same noise, ties half, with the clustered Wilson interval, which counts prompts and not pictures. Several "
    "runs of a method are averaged per prompt first, and the interval takes them as alike: read the standard deviation "
    "(sd) of the runs beside it."
)
PAGE_ALONE = ("sd of rates", "wins/ties/losses")  # columns for which a terminal has no room
DUELS = (
    "Two policies are compared with each other by their differences per prompt; whether the intervals of two win rates "
    "overlap says nothing of the kind."
)


@dataclass(frozen=True)
class Table:
    """A table whose rows stand in groups: a method, then its single runs.

    Attributes:
        title: what it is about.
        header: names of the columns.
        groups: of rows; the first leads, the others are its runs.
        kind: "overview", "reward", "part" or "duels".
        note: a sentence below the title.
    """

    title: str
    header: Sequence[str]
    groups: Sequence[Sequence[Sequence[Cell]]]
    kind: str = "reward"
    note: str = ""

    def for_terminal(self) -> RichTable:
        """Without the columns of ``PAGE_ALONE``; where it is too wide for a terminal, cells fold and lose nothing."""
        kept = [n for n, name in enumerate(self.header) if name not in PAGE_ALONE]
        table = RichTable(title=literal(self.title), title_justify="left", box=box.SIMPLE_HEAD)
        for n in kept:
            table.add_column(literal(self.header[n]), justify="right" if n else "left", overflow="fold")
        for group in self.groups:
            for number, row in enumerate(group):
                indent = "  " if number else ""
                texts = [indent + row[n].text if n == 0 else row[n].text for n in kept]
                table.add_row(*map(literal, texts), style="dim" if number else None)
        return table

    def markdown(self) -> str:
        lines = [self.header, [":--", *["--:"] * (len(self.header) - 1)]]
        for group in self.groups:
            for number, row in enumerate(group):
                lines.append([("– " if number else "") + row[0].text, *(cell.text for cell in row[1:])])  # noqa: RUF001
        rows = "\n".join("| " + " | ".join(map(_escaped, line)) + " |" for line in lines)
        return "\n\n".join(part for part in (f"## {_escaped(self.title)}", self.note, rows) if part)


def tables(evaluation: Evaluation) -> list[Table]:
    """The rewards side by side where there are several, then each with its parts, then policies against each other."""
    found = [_overview(evaluation)] if len(rewards(evaluation)) > 1 else []
    found += [_quality(evaluation, column) for column in columns(evaluation)]
    if any(duels(evaluation, column) for column in rewards(evaluation)):
        found.append(_duels(evaluation))
    return found


def markdown(evaluation: Evaluation, title: str) -> str:
    """``evaluation.md``: the tables and how to read them."""
    return "\n\n".join([f"# {_escaped(title)}", *(table.markdown() for table in tables(evaluation)), CAPTION]) + "\n"


def _overview(evaluation: Evaluation) -> Table:
    """Means of all rewards, as papers' tables have them."""
    heads, everyone = rewards(evaluation), methods(evaluation)
    means = {head: [Mean.of(method.scores(head)) for method in everyone] for head in heads}
    places = {head: decimals(found) for head, found in means.items()}
    groups = [
        [[_name(method), number_cell(method.guidance), *(mean_cell(means[head][n], places[head]) for head in heads)]]
        for n, method in enumerate(everyone)
    ]
    return _table(f"means, {_size(evaluation)}", ["policy", "guidance", *heads], groups, "overview", evaluation)


def _quality(evaluation: Evaluation, column: str) -> Table:
    """Every method in one column, against its baseline."""
    found = findings(evaluation, column)
    leads = [group[0] for group in found]
    places, steps = decimals([one.mean for one in leads]), decimals([one.difference for one in leads if one.difference])
    several = len({method.label for method in methods(evaluation) if method.baseline}) > 1
    header = ["policy", "guidance", "mean", "sd of runs", "against", "difference [95%]", "win rate [95%]",
              "sd of rates", "wins/ties/losses"]  # fmt: skip
    groups = [
        [
            [
                Cell(one.method.runs[0].source) if number else _name(one.method),
                number_cell(one.method.guidance),
                mean_cell(one.mean, places),
                spread_cell(one.spread),
                Cell(one.against.label if one.against and several else NONE),
                difference_cell(one.difference, steps),
                rate_cell(one.wins),
                spread_cell(None if one.wins_spread is None else 100 * one.wins_spread, "%"),
                counts_cell(one.wins),
            ]
            for number, one in enumerate(group)
        ]
        for group in found
    ]
    return _table(f"{column}, {_size(evaluation)}", header, groups, "part" if "/" in column else "reward", evaluation)


def _duels(evaluation: Evaluation) -> Table:
    """Every two policies, reward by reward."""
    header = ["policies", "guidance", "reward", "difference [95%]", "win rate [95%]", "difference of win rates [95%]"]
    groups = []
    for head in rewards(evaluation):
        found = duels(evaluation, head)
        steps = decimals([duel.finding.difference for duel in found if duel.finding.difference])
        groups += [[_duel(duel, steps)] for duel in found]
    return _table("policies against each other", header, groups, "duels", evaluation)


def _duel(duel: Duel, steps: int) -> list[Cell]:
    finding = duel.finding
    names = " against ".join(method.label for method in (finding.method, finding.against) if method)
    return [
        Cell(names, names),
        number_cell(finding.method.guidance),
        Cell(finding.column, finding.column),
        difference_cell(finding.difference, steps),
        rate_cell(finding.wins),
        difference_cell(duel.rates, 1, unit=100),
    ]


def _table(
    title: str, header: Sequence[str], groups: Sequence[Sequence[Sequence[Cell]]], kind: str, evaluation: Evaluation
) -> Table:
    """Without columns that say nothing: those without a number, and a guidance that is everybody's."""
    one_guidance = len({drawn.guidance for drawn in evaluation.drawn}) == 1
    kept = [
        n
        for n, name in enumerate(header)
        if not (name == "guidance" and one_guidance) and any(row[n].text != NONE for group in groups for row in group)
    ]
    picked = [[[row[n] for n in kept] for row in group] for group in groups]
    guidance = f", guidance {evaluation.drawn[0].guidance:g}" if one_guidance else ""
    return Table(title + guidance, [header[n] for n in kept], picked, kind, DUELS if kind == "duels" else "")


def _size(evaluation: Evaluation) -> str:
    pictures = len(next(iter(evaluation.drawn[0].scores.values()))[0])
    return f"{len(evaluation.prompts)} prompts, {pictures} picture{'' if pictures == 1 else 's'} each"


def _name(method: Method) -> Cell:
    runs = f" ({len(method.runs)} runs)" if len(method.runs) > 1 else ""
    return Cell(method.label + runs, method.label)


def _escaped(text: str) -> str:
    """Plain text in a Markdown table: labels and paths are anybody's."""
    text = printable(text)
    for character in "\\`*_<>|#":
        text = text.replace(character, f"\\{character}")
    return text.replace("](", "]\\(")
