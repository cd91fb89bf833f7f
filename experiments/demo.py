"""The whole road in one command, without network or GPU: AI feedback, shards, alignment, held-out judgement.

    python -m experiments.demo

What ``make demo`` runs. Every step is a command of its own, printed before it runs; a second call goes on where the
first one stopped. Further ``--key=value`` settings go to the training, as with ``experiments.run``.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from experiments import prepare_feedback, prepare_pickapic, run
from experiments.command import run_command


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m experiments.demo", description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("data"), help="Folder for the pairs (%(default)s).")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="Folder for the run (%(default)s).")
    parser.add_argument("--seed", type=int, default=0, help="Of the training (%(default)s).")
    parser.add_argument("--pairs", type=int, default=768, help="Pairs to draw and train on (%(default)s).")
    args, overrides = parser.parse_known_args(argv)
    drawn, shards = args.data / "shapes" / "feedback", args.data / "shapes" / "feedback-pairs"
    run_dir = args.runs / f"demo-seed{args.seed}"
    if not (shards / "manifest.json").exists():
        feedback = [
            "--config",
            "dpo_tiny",
            "--prompts",
            "embedded/prompts/shapes_train.txt",
            "--reward",
            "ShapesReward",
        ]
        feedback += ["--sampler.guidance_scale=2", "--candidates=4", f"--pairs={args.pairs}", f"--output={drawn}"]
        _show(prepare_feedback.main, "prepare_feedback", *feedback)
        _show(prepare_pickapic.main, "prepare_pickapic", "--input", drawn, "--output", shards)
    settings = ["--config", "dpo_tiny", "--run_dir", run_dir, f"--data.shards={shards}"]
    settings += [f"--seed_everything={args.seed}", *overrides]
    _show(run.main, "run", *settings, "--ckpt_path", "auto")
    _show(run.main, "run", "test", *settings, "--ckpt_path", "last")


def _show(command: Callable[[Sequence[str]], Any], name: str, *words: Any) -> None:
    """Run a command of this package in this process, after showing how to type it."""
    argv = [str(word) for word in words]
    Console().print(f"\n[bold]$ python -m experiments.{name} {shlex.join(argv)}[/bold]", highlight=False)
    command(argv)


if __name__ == "__main__":
    run_command(main)
