"""Compares finished runs on the same held-out prompts and noise: a table, pictures, and a page that holds both.

    python -m experiments.compare runs/dpo runs/spo --output comparison
    python -m experiments.compare DPO=runs/dpo-seed0 DPO=runs/dpo-seed1 SPO=runs/spo-seed0 SPO=runs/spo-seed1

Runs of one label are seeds of one method. Each run must have been judged by ``WinRate`` with the same prompts, sampler,
noise and rewards (``python -m experiments.run test``), and counted its cost (``Cost``), where costs are to be shown.
Writes ``index.html`` (no other file needed to read it), ``curves-<reward>.png`` and ``results-<reward>.png``.
"""

from __future__ import annotations

import argparse
import base64
import sys
from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, PackageLoader
from rich import box
from rich.console import Console
from rich.table import Table

from callbacks.evaluation.statistics import Mean, WinCount
from callbacks.files import write_atomically
from experiments.cli.command import run_command
from experiments.comparison.figures import amount, curves, results
from experiments.comparison.runs import COSTS, Comparison, Method, Run, Score, wins
from lightning_modules.errors import ConfigError

NONE = "–"  # noqa: RUF001  # a cell without a number
FILE_WIDTH = 110  # characters a line where the output is not a terminal
UNBROKEN = ("reward", "sd", "win rate [95%]")
CAPTION = (
    "Rewards: mean over seeds ± standard error over the pictures of one seed; sd: standard deviation of the seeds' "
    "means. Win rate: against the base's picture from the same noise, ties half, with Wilson's 95% interval over all "
    "seeds' pictures. It takes pictures as independent; those of one prompt, and of one noise in several seeds, are "
    "not quite, so that it is rather too narrow."
)


def main(argv: Sequence[str] | None = None) -> Comparison:
    """Read the runs, print the tables, write pictures and page.

    Raises:
        UserError: a run that is missing, not judged, or judged differently; a folder that cannot be written.
    """
    parser = argparse.ArgumentParser(
        prog="python -m experiments.compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", nargs="+", metavar="[NAME=]RUN", help="run folder, with the method's name before it")
    parser.add_argument("--split", choices=("test", "val"), default="test", help="prompts to compare on (%(default)s)")
    parser.add_argument("--output", type=Path, default=Path("comparison"), help="folder to write (%(default)s)")
    options = parser.parse_args(argv)
    runs = [Run.read(*labelled(word), options.split) for word in options.runs]
    comparison = Comparison.of(runs, options.split)
    console = Console(width=None if sys.stdout.isatty() else FILE_WIDTH)
    for table in tables(comparison):
        console.print(table.for_terminal())
    console.print(CAPTION, style="dim")
    files = render(comparison)
    try:
        for name, content in files.items():
            write_atomically(options.output / name, content)
    except OSError as error:
        raise ConfigError(f"--output {options.output} cannot be written ({error.strerror}); name another") from error
    console.print(f"page: {options.output / 'index.html'}", soft_wrap=True)
    return comparison


def labelled(word: str) -> tuple[str, Path]:
    """``NAME=FOLDER``, or a folder, which is then named by its last part."""
    name, sign, folder = word.partition("=")
    if sign and not Path(word).is_dir():
        if not name or not folder:
            raise ConfigError(f"NAME=RUN wants a name and a folder, got {word!r}")
        return name, Path(folder)
    return Path(word).resolve().name, Path(word)


class Grid:
    """A table for the terminal and for the page.

    Attributes:
        title: what it is about.
        header: names of the columns.
        rows: cells; one that starts with two spaces is a seed of the method above.
    """

    def __init__(self, title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        self.title, self.header, self.rows = title, header, rows

    def for_terminal(self) -> Table:
        table = Table(title=self.title, title_justify="left", box=box.SIMPLE_HEAD)
        for number, name in enumerate(self.header):
            table.add_column(name, justify="right" if number else "left", overflow="fold", no_wrap=name in UNBROKEN)
        for row in self.rows:
            table.add_row(*row, style="dim" if row[0].startswith("  ") else None)
        return table


def tables(comparison: Comparison) -> list[Grid]:
    """One for each reward, then the costs."""
    return [*(quality(comparison, reward) for reward in comparison.rewards), costs(comparison)]


def quality(comparison: Comparison, reward: str) -> Grid:
    """The base, then every method, then its seeds."""
    columns = [reward, *comparison.parts(reward)]
    protocol = comparison.protocol
    pictures = protocol["number_of_prompts"] * protocol["images_per_prompt"]
    title = f"{reward}: {protocol['number_of_prompts']} {comparison.split} prompts, {pictures} pictures a seed"
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
    return Grid(title, header, rows)


def costs(comparison: Comparison) -> Grid:
    """What the training of one seed cost."""
    rows = [[one.label, one.steps, *(_cost(one, name) for name in COSTS)] for one in comparison.methods]
    return Grid("cost of training, mean of the seeds", ["method", "steps", *COSTS], rows)


def render(comparison: Comparison) -> dict[str, bytes]:
    """All files, by name; made before any is written."""
    pictures = {}
    for reward in comparison.rewards:
        if any(run.curve for run in comparison.runs):
            pictures[f"curves-{reward}.png"] = curves(comparison, reward)
        pictures[f"results-{reward}.png"] = results(comparison, reward)
    template = Environment(loader=PackageLoader("experiments"), autoescape=True).get_template("comparison.html")
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


if __name__ == "__main__":
    run_command(main)
