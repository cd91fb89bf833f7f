"""The whole pipeline in one command, without network or GPU: align the embedded model, judge it on held-out prompts.

    python -m experiments.demo
    python -m experiments.demo --methods dpo spo shuffled --seeds 0 1 2

What ``make demo`` runs is SPO, with the step-aware preference model that ships. ``dpo`` first lets the base draw
pictures and orders them by the exact reward; ``shuffled`` is SPO's control, its judge's scores shuffled. Every
step is a command of its own, printed before it runs; a second call resumes where the first one stopped. Several runs
are compared at the end. Further ``--key=value`` settings go to every training, as with ``experiments.run``.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from experiments import compare, prepare_feedback, prepare_pickapic, run
from experiments.cli.command import run_command
from lightning_modules.files import resolved_path
from lightning_modules.terminal import literal

METHODS = {
    "dpo": ["--config", "dpo_tiny"],
    "spo": ["--config", "spo_tiny"],
    "shuffled": ["--config", "spo_tiny", "--config", "spo_tiny_shuffled"],
}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["spo"], help="What to train (spo).")
    parser.add_argument("--seeds", nargs="+", type=int, default=[42], metavar="SEED", help="Of the trainings (42).")
    parser.add_argument("--data", type=resolved_path, default="data", help="Folder for dpo's pairs (%(default)s).")
    parser.add_argument("--runs", type=resolved_path, default="runs", help="Folder for the runs (%(default)s).")
    parser.add_argument("--pairs", type=int, default=768, help="Pairs to draw for dpo (%(default)s).")
    args, overrides = parser.parse_known_args(argv)
    runs = []
    for method in args.methods:
        settings = [*METHODS[method], *(_pairs(args.data, args.pairs) if method == "dpo" else [])]
        for seed in args.seeds:
            folder = args.runs / f"demo-{method}-seed{seed}"
            words = [*settings, "--run_dir", folder, f"--seed_everything={seed}", *overrides]
            _show(run.main, "run", *words, "--ckpt_path", "auto")
            _show(run.main, "run", "test", *words, "--ckpt_path", "last")
            runs.append(f"{method}={folder}")
    if len(runs) > 1:
        _show(compare.main, "compare", *runs, "--output", args.runs / "demo-comparison")


def _pairs(data: Path, number: int) -> list[str]:
    """The setting that names DPO's pairs, which are drawn first where they are not there yet."""
    drawn, shards = data / "shapes" / "feedback", data / "shapes" / "feedback-pairs"
    if not (shards / "manifest.json").exists():
        feedback = ["--config", "dpo_tiny", "--prompts", "embedded/prompts/shapes_train.txt"]
        feedback += ["--reward", "ShapesReward", "--sampler.guidance_scale=2", "--candidates=4"]
        _show(prepare_feedback.main, "prepare_feedback", *feedback, f"--pairs={number}", f"--output={drawn}")
        _show(prepare_pickapic.main, "prepare_pickapic", "--input", drawn, "--output", shards)
    return [f"--data.shards={shards}"]


def _show(command: Callable[[Sequence[str]], Any], name: str, *words: Any) -> None:
    """Run a command of this package in this process, after showing how to type it."""
    argv = [str(word) for word in words]
    Console().print()
    Console().print(literal(f"$ python -m experiments.{name} {shlex.join(argv)}"), style="bold")
    command(argv)


if __name__ == "__main__":
    run_command(main)
