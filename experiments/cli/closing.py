"""What a finished training says: where its results are, and how to use them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console

from callbacks.export_policy import exports
from lightning_modules.terminal import literal


def print_closing(run_dir: Path, step: int, steps: int) -> None:
    """Print where export, pictures, scores and checkpoints of a run are, as far as it has them.

    Args:
        run_dir: the run folder.
        step: optimizer steps done.
        steps: ``trainer.max_steps``, -1 for no limit.
    """
    console = Console()
    done = f"step {step}" + (f" of {steps}" if steps > 0 else "")
    console.print(literal(f"{run_dir}: {done}"), soft_wrap=True)
    for name, text in _results(run_dir):
        console.print(literal(f"  {name:<12} {text}"), soft_wrap=True)


def _results(run_dir: Path) -> Iterator[tuple[str, str]]:
    for export in exports(run_dir / "export")[-1:]:
        yield "export", str(export)
        yield "load it", f"pipe.{_load(export)}"
    pictures = sorted((run_dir / "samples").glob("step=*.png"))
    if pictures:
        yield "pictures", str(pictures[-1])
    rates = run_dir / "win_rate.json"
    if rates.is_file():
        yield "win rate", f"{rates}; python -m experiments.compare {run_dir}"
    checkpoint = run_dir / "checkpoints" / "last.ckpt"
    if checkpoint.is_file():
        yield "checkpoint", f"{checkpoint}; train on with --run_dir {run_dir} --resume last --trainer.max_steps=..."
    if any(run_dir.glob("events.out.tfevents*")):
        yield "curves", f"tensorboard --logdir {run_dir}"
    for file in sorted(run_dir.glob("csv/*/metrics.csv"))[-1:]:
        yield "curves", str(file)


def _load(export: Path) -> str:
    """The line of plain diffusers that takes an export."""
    for folder in ("unet", "transformer"):
        index = export / folder / "config.json"
        if index.is_file():
            kind = json.loads(index.read_text(encoding="utf-8"))["_class_name"]
            return f'{folder} = {kind}.from_pretrained("{export}", subfolder="{folder}")'
    return f'load_lora_weights("{export}")'
