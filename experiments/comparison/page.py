"""What a comparison shows: tables for terminal and page, figures, and one page that holds all of it."""

from __future__ import annotations

import base64
from collections.abc import Sequence

from jinja2 import Environment, PackageLoader
from rich import box
from rich.table import Table

from callbacks.evaluation.statistics import INTERVAL, Mean
from experiments.comparison.figures import amount, curves, results
from experiments.comparison.methods import Comparison, Method, Score
from experiments.comparison.runs import COSTS, Rate, Run
from lightning_modules.terminal import literal

NONE = "–"  # noqa: RUF001  # a cell without a number
UNBROKEN = ("reward", "sd", "win rate [95%]", "win rate, points")
CAPTION = (
    "Every prompt is averaged over the seeds first. Rewards: mean ± standard error over prompts. Win rate: against the "
    "base's picture from the same noise, ties half, with the clustered Wilson interval; sd: standard deviation of the "
    "seeds. Differences: prompt by prompt, with Student's interval; two methods are compared by them, not by whether "
    f"their intervals overlap. All are {INTERVAL}: what other seeds would have learned is in sd alone."
)
WITHOUT_SCORES = (
    "{run.label}: {run.folder} was judged before the scores of every picture were kept: no standard errors, intervals "
    "and differences; judge it again (the test prompts: `python -m experiments.run test --run_dir {run.folder}`)"
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

    def for_markdown(self) -> str:
        lines = [self.header, ["---"] * len(self.header), *self.rows]
        cells = [[cell.strip().replace("|", "\\|").replace("\n", " ") for cell in line] for line in lines]
        return f"**{self.title}**\n\n" + "".join(f"| {' | '.join(line)} |\n" for line in cells)


def tables(comparison: Comparison) -> list[ResultTable]:
    """Quality and differences of each reward, then the costs."""
    found = []
    for reward in comparison.rewards:
        found.append(quality(comparison, reward))
        if comparison.differences(reward):
            found.append(differences(comparison, reward))
    return [*found, costs(comparison)]


def notes(comparison: Comparison) -> list[str]:
    """A line for each run that lacks what uncertainties are counted from."""
    columns = comparison.rewards[:1]
    without = [run for run in comparison.runs for column in columns if run.scores("policy", column) is None]
    return [WITHOUT_SCORES.format(run=run) for run in without]


def quality(comparison: Comparison, reward: str) -> ResultTable:
    """The base, then every method, then its seeds."""
    columns = comparison.columns(reward)
    protocol = comparison.protocol
    shape = f"{protocol['number_of_prompts']} {comparison.split} prompts x {protocol['images_per_prompt']}"
    header = ["method", "reward", "sd", *_parts(columns), "win rate [95%]", "sd"]
    base = [_shown(comparison.base(column)) for column in columns]
    rows = [["base", base[0], NONE, *base[1:], NONE, NONE]]
    for method in comparison.methods:
        scores, wins = [method.score(column) for column in columns], method.wins(reward)
        label = method.label if len(method.runs) == 1 else f"{method.label} ({len(method.runs)} seeds)"
        cells = [_shown(score) for score in scores]
        rows.append([label, cells[0], _spread(scores[0].spread), *cells[1:], _rate(wins), _percent_spread(wins)])
        if len(method.runs) > 1:
            rows += [_seed_row(run, columns, reward) for run in method.runs]
    return ResultTable(f"{reward}: {shape} pictures per seed", header, rows)


def differences(comparison: Comparison, reward: str) -> ResultTable:
    """What every method has more than the base, and than every method before it."""
    columns = comparison.columns(reward)
    header = ["difference", "reward", *_parts(columns), "win rate, points"]
    rows = [
        [
            f"{one.first} - {one.second}",
            *(_signed(one.scores.get(column), 1, 3) for column in columns),
            _signed(one.rate, 100, 1),
        ]
        for one in comparison.differences(reward)
    ]
    return ResultTable(f"{reward}: differences over prompts [95%]", header, rows)


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
        notes=notes(comparison),
        pictures={name: base64.b64encode(content).decode() for name, content in pictures.items()},
        settings=comparison.differing_settings(),
    )
    texts = [*(table.for_markdown() for table in tables(comparison)), CAPTION + "\n", *notes(comparison)]
    return {**pictures, "tables.md": "\n".join(texts).encode(), "index.html": page.encode()}


def _parts(columns: Sequence[str]) -> list[str]:
    return [column.partition("/")[2] for column in columns[1:]]


def _seed_row(run: Run, columns: Sequence[str], reward: str) -> list[str]:
    seed = run.settings.get("seed_everything")
    means = [_shown(run.mean("policy", column)) for column in columns]
    name = run.folder.name if seed is None else f"seed {seed}"
    return [f"  {name}", means[0], "", *means[1:], _rate(run.wins(reward)), ""]


def _shown(mean: Mean | Score | None) -> str:
    return NONE if mean is None else mean.shown()


def _spread(value: float | None) -> str:
    return NONE if value is None else f"{value:.3f}"


def _percent_spread(rate: Rate | None) -> str:
    return NONE if rate is None or rate.spread is None else f"{100 * rate.spread:.1f}"


def _rate(rate: Rate | None) -> str:
    if rate is None:
        return NONE
    shown = f"{100 * rate.rate:.1f}%"
    return shown if rate.interval is None else f"{shown} [{', '.join(f'{100 * end:.1f}' for end in rate.interval)}]"


def _signed(mean: Mean | None, scale: int, digits: int) -> str:
    """``+0.030 [0.021, 0.040]``, in units of 1 / scale."""
    if mean is None:
        return NONE
    shown = f"{scale * mean.mean:+.{digits}f}"
    if mean.low is None or mean.high is None:
        return shown
    return f"{shown} [{scale * mean.low:.{digits}f}, {scale * mean.high:.{digits}f}]"


def _cost(method: Method, name: str) -> str:
    value = method.cost(name)
    return NONE if value is None else amount(value)
