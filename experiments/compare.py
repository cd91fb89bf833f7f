"""Compares finished runs on the same held-out prompts and noise: a table, pictures, and a page that holds both.

    python -m experiments.compare runs/dpo runs/spo --output comparison
    python -m experiments.compare DPO=runs/dpo-seed0 DPO=runs/dpo-seed1 SPO=runs/spo-seed0 SPO=runs/spo-seed1

Runs of one label are seeds of one method. Each run must have been judged by ``WinRate`` with the same prompts, sampler,
noise and rewards (``python -m experiments.run test``), and counted its cost (``Cost``), where costs are to be shown.
Prompts are averaged over the seeds first; methods are compared by their paired difference over prompts.
Writes ``index.html`` (no other file needed to read it), ``tables.md``, ``curves-<reward>.png`` and
``results-<reward>.png``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from experiments.cli.command import run_command
from experiments.comparison.methods import Comparison
from experiments.comparison.page import CAPTION, notes, render, tables
from experiments.comparison.runs import Run
from lightning_modules.errors import ConfigError
from lightning_modules.files import atomic_file, resolved_path
from lightning_modules.terminal import literal

FILE_WIDTH = 128  # characters per line where the output is not a terminal


def main(argv: Sequence[str] | None = None) -> Comparison:
    """Read the runs, print the tables, write pictures and page.

    Raises:
        UserError: a run that is missing, not judged, or judged differently; a folder that cannot be written.
    """
    options = _parser().parse_args(argv)
    runs = [Run.read(*labelled(word), options.split) for word in options.runs]
    comparison = Comparison.of(runs, options.split)
    console = Console(width=None if sys.stdout.isatty() else FILE_WIDTH)
    for table in tables(comparison):
        console.print(table.for_terminal())
    console.print(CAPTION, style="dim")
    for note in notes(comparison):
        console.print(literal(note), soft_wrap=True)
    for name, content in render(comparison).items():
        with atomic_file(options.output / name) as file:
            file.write(content)
    console.print(literal(f"page: {options.output / 'index.html'}"), soft_wrap=True)
    return comparison


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", nargs="+", metavar="[NAME=]RUN", help="run folder, with the method's name before it")
    parser.add_argument("--split", choices=("test", "val"), default="test", help="prompts to compare on (%(default)s)")
    parser.add_argument("--output", type=resolved_path, default="comparison", help="folder to write (comparison)")
    return parser


def labelled(word: str) -> tuple[str, Path]:
    """``NAME=FOLDER``, or a folder, which is then named by its last part."""
    name, sign, folder = word.partition("=")
    if sign and not Path(word).is_dir():
        if not name or not folder:
            raise ConfigError(f"NAME=RUN wants a name and a folder, got {word!r}")
        return name, resolved_path(folder)
    return resolved_path(word).name, resolved_path(word)


if __name__ == "__main__":
    run_command(main)
