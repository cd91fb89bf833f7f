"""Trains and judges variants of one run, each with several seeds, and compares them on the test prompts.

    python -m experiments.ablate spo_tiny --seeds 0 1 2
    python -m experiments.ablate my_ablation.yaml --only SPO "two candidates" --data.prompts_per_pool=16
    python -m experiments.ablate my_ablation.yaml --print

The YAML names the variants by the words of ``experiments.run`` that make them:

    every: --config spo_tiny
    variants:
      SPO: ""
      two candidates: --data.sampler.candidates=2

``{seed}`` in a word is the run's seed, for data of its own. Every run is a folder of its own,
``RUNS/ablation-FILE-VARIANT-seedN``; called again, the command goes on where it was
stopped and trains nothing twice. ``--print`` writes the commands, one run per line, for a cluster. Further
``--key=value`` settings go to every training.
"""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from experiments import compare, run
from experiments.cli.command import run_command
from experiments.cli.compose import nearest
from experiments.cli.packaged import packaged, read_packaged
from lightning_modules.errors import ConfigError
from lightning_modules.files import resolved_path
from lightning_modules.terminal import literal


@dataclass(frozen=True)
class Trial:
    """One run of a comparison.

    Attributes:
        label: whose seed it is, in the tables.
        folder: the run's.
        words: of ``experiments.run``, seed included.
    """

    label: str
    folder: Path
    words: tuple[str, ...]

    @property
    def commands(self) -> list[tuple[str, ...]]:
        """Words of ``experiments.run``: the training, from where it stopped, and the judging of its last weights."""
        words = (*self.words, "--run_dir", str(self.folder))
        return [(*words, "--ckpt_path", "auto"), ("test", *words, "--ckpt_path", "last")]


def main(argv: Sequence[str] | None = None) -> None:
    args, overrides = _parser().parse_known_args(argv)
    name, variants = read_ablation(args.ablation)
    for word in args.only or ():
        if word not in variants:
            raise ConfigError(f"--only {word!r}{nearest(word, variants)}: {name} has {', '.join(variants)}")
    check_words("the command line", overrides)
    trials = [
        Trial(
            label,
            args.runs / f"ablation-{name}-{_slug(label)}-seed{seed}",
            (*(word.replace("{seed}", str(seed)) for word in words), f"--seed_everything={seed}", *overrides),
        )
        for label, words in variants.items()
        if label in (args.only or variants)
        for seed in args.seeds
    ]
    if args.print:
        for trial in trials:
            lines = (f"python -m experiments.run {shlex.join(words)}" for words in trial.commands)
            print(" && ".join(lines))
        return
    train_and_compare(trials, args.runs / f"ablation-{name}")


def check_words(where: str, words: Sequence[str]) -> None:
    """
    Raises:
        ConfigError: a word that would make seeds alike, or put runs elsewhere than where they are looked for.
    """
    for word in words:
        if word.split("=")[0] in ("--run_dir", "--seed_everything", "--ckpt_path", "--resume"):
            raise ConfigError(f"{where} gives {word.split('=')[0]}, which this command sets itself; leave it out")


def train_and_compare(trials: Sequence[Trial], output: Path) -> None:
    """Every trial trained to its end and judged; the comparison of them, if there are several, in ``output``."""
    for trial in trials:
        for words in trial.commands:
            show(run.main, "run", *words)
    if len(trials) > 1:
        show(compare.main, "compare", *(f"{trial.label}={trial.folder}" for trial in trials), "--output", output)


def show(command: Callable[[Sequence[str]], Any], name: str, *words: Any) -> None:
    """Run a command of this package in this process, after showing how to type it."""
    argv = [str(word) for word in words]
    Console().print()
    Console().print(literal(f"$ python -m experiments.{name} {shlex.join(argv)}"), style="bold")
    command(argv)


def read_ablation(name: str) -> tuple[str, dict[str, tuple[str, ...]]]:
    """An ablation by its file, or by its name if it ships: its short name, and each variant's words.

    Raises:
        ConfigError: no such file, or one that holds something else.
    """
    path, tree = read_packaged("ablation", "ablations", name)
    return path.stem, _variants(path, tree)


def _variants(path: Path, tree: Any) -> dict[str, tuple[str, ...]]:
    if not isinstance(tree, Mapping) or not set(tree) <= {"every", "variants"}:
        raise ConfigError(f"ablation {path}: wants 'every' (words of each run) and 'variants' (name: words), no others")
    variants = tree.get("variants")
    if not isinstance(variants, Mapping) or not variants:
        raise ConfigError(f"ablation {path}: 'variants' must name at least one, as name: words of experiments.run")
    every, found = _words(path, "every", tree.get("every", "")), {}
    for label, text in variants.items():
        if not isinstance(label, str) or not _slug(label) or "=" in label:
            raise ConfigError(
                f"ablation {path}: a variant's name is a text with a letter and without '=', got {label!r}"
            )
        found[label] = (*every, *_words(path, label, text))
    slugs = [_slug(label) for label in found]
    if len(set(slugs)) < len(slugs):
        raise ConfigError(
            f"ablation {path}: two variants would share a run folder; give them names that differ in letters"
        )
    return found


def _words(path: Path, key: str, text: Any) -> tuple[str, ...]:
    if not isinstance(text, str):
        raise ConfigError(f"ablation {path}: {key!r} must be a text of words for experiments.run, got {text!r}")
    try:
        words = tuple(shlex.split(text))
    except ValueError as error:
        raise ConfigError(f"ablation {path}: {key!r} cannot be split into words ({error})") from error
    check_words(f"ablation {path}: {key!r}", words)
    return words


def _slug(label: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", label.lower()).strip("-")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.ablate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"Packaged ablations: {', '.join(packaged('ablations'))}.",
        allow_abbrev=False,
    )
    parser.add_argument("ablation", help="YAML file, or the name of a packaged one")
    parser.add_argument(
        "--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="SEED", help="of the trainings (0 1 2)"
    )
    parser.add_argument("--only", nargs="+", metavar="VARIANT", help="these variants alone")
    parser.add_argument("--runs", type=resolved_path, default="runs", help="folder for the runs (%(default)s)")
    parser.add_argument("--print", action="store_true", help="print the commands, one run per line, and run nothing")
    return parser


if __name__ == "__main__":
    run_command(main)
