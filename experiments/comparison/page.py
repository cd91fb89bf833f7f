"""What a comparison shows: tables for terminal and page, figures, and one page that holds all of it."""

from __future__ import annotations

import base64
from collections.abc import Sequence

from jinja2 import Environment, PackageLoader
from rich import box
from rich.table import Table

from callbacks.evaluation.statistics import Mean, WinCount
from experiments.comparison.figures import amount, curves, results
from experiments.comparison.runs import COSTS, Comparison, Method, Run, Score, wins
from lightning_modules.terminal import literal

NONE = "–"  # noqa: RUF001  # a cell without a number
UNBROKEN = ("reward", "sd", "win rate [95%]")
CAPTION = (
    "Rewards: mean over seeds ± standard error over the pictures of one seed; sd: standard deviation of the seeds' "
    "means. Win rate: against the base's picture from the same noise, ties half, with Wilson's 95% interval over all "
    "seeds' pictures. It takes pictures as independent; those of one prompt, and of one noise in several seeds, are "
    "not quite, so that it is rather too narrow."
)


class ResultTable:
    """A table for the terminal and for the page.

    Attributes:
        title: what it is about.
        header: names of the columns.
        rows: cells; one that starts with two spaces is a seed of the method above.
    """

    def __init__(self, title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        self.title, self.header, self.rows = title, header, rows

    def for_terminal(self) -> Table:
        table = Table(title=literal(self.title), title_justify="left", box=box.SIMPLE_HEAD)
        for number, name in enumerate(self.header):
            table.add_column(name, justify="right" if number else "left", overflow="fold", no_wrap=name in UNBROKEN)
        for row in self.rows:
            table.add_row(*map(literal, row), style="dim" if row[0].startswith("  ") else None)
        return table


def tables(comparison: Comparison) -> list[ResultTable]:
    """One for each reward, then the costs."""
    return [*(quality(comparison, reward) for reward in comparison.rewards), costs(comparison)]


def quality(comparison: Comparison, reward: str) -> ResultTable:
    """The base, then every method, then its seeds."""
    columns = [reward, *comparison.parts(reward)]
    protocol = comparison.protocol
    pictures = protocol["number_of_prompts"] * protocol["images_per_prompt"]
    title = f"{reward}: {protocol['number_of_prompts']} {comparison.split} prompts, {pictures} pictures per seed"
    header = ["method", "reward", "sd", *(column.partition("/")[2] for column in columns[1:]), "win rate [95%]"]
    base = [_mean(comparison.base(column)) for column in columns]
    rows = [["base", base[0], NONE, *base[1:], NONE]]
    for method in comparison.methods:
        scores = [method.score(column) for column in columns]
        label = method.label if len(method.runs) == 1 else f"{method.label} ({len(method.runs)} seeds)"
        cells = [_mean(score) for score in scores]
        rows.append([label, cells[0], _spread(scores[0]), *cells[1:], _rate(method.wins(reward))])
        if len(method.runs) > 1:
            rows += [_seed_row(run, columns, reward) for run in method.runs]
    return ResultTable(title, header, rows)


def costs(comparison: Comparison) -> ResultTable:
    """What the training of one seed cost."""
    rows = [[one.label, one.steps, *(_cost(one, name) for name in COSTS)] for one in comparison.methods]
    return ResultTable("cost of training, mean of the seeds", ["method", "steps", *COSTS], rows)


def render(comparison: Comparison) -> dict[str, bytes]:
    """All files, by name; made before any is written."""
    pictures = {}
    for reward in comparison.rewards:
        if any(run.curve for run in comparison.runs):
            pictures[f"curves-{reward}.png"] = curves(comparison, reward)
        pictures[f"results-{reward}.png"] = results(comparison, reward)
    template = Environment(loader=PackageLoader("experiments.comparison", ""), autoescape=True).get_template(
        "comparison.html"
    )
    page = template.render(
        comparison=comparison,
        tables=tables(comparison),
        caption=CAPTION,
        pictures={name: base64.b64encode(content).decode() for name, content in pictures.items()},
        settings=comparison.differing_settings(),
    )
    return {**pictures, "index.html": page.encode()}


def _seed_row(run: Run, columns: Sequence[str], reward: str) -> list[str]:
    seed = run.settings.get("seed_everything")
    means = [_mean(Mean(**run.result["policy"][column])) for column in columns]
    name = run.folder.name if seed is None else f"seed {seed}"
    return [f"  {name}", means[0], "", *means[1:], _rate(wins(run, reward))]


def _mean(mean: Mean | Score | None) -> str:
    return NONE if mean is None else f"{mean.mean:.3f} ±{mean.standard_error:.3f}"


def _spread(score: Score) -> str:
    return NONE if score.spread is None else f"{score.spread:.3f}"


def _rate(count: WinCount | None) -> str:
    return NONE if count is None else f"{100 * count.rate:.1f}% [{100 * count.low:.1f}, {100 * count.high:.1f}]"


def _cost(method: Method, name: str) -> str:
    value = method.cost(name)
    return NONE if value is None else amount(value)
