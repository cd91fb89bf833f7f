"""People's preferences, and the judges that learn from them: what the fair comparison of docs/results.md starts with.

    python -m experiments.shapes.build_judges

Every step is a command of its own, printed before it runs; what is there already is not made again:

- an early checkpoint: the base's denoiser and text encoder after a tenth of their training, on the base's autoencoder;
- preferences (``collect_preferences``) between pictures of the early and the late checkpoint and of an artist, two sets
  to learn from and one to validate on, as shards;
- a CLIP that has learned from drawings which prompt a picture belongs to, and no preference (``build_preference``);
- SPO's judge, which starts from that CLIP (``spm_tiny``), and LPO's, which starts from the base's UNet (``lrm_tiny``):
  each learns from these preferences, and of rewards from nothing else.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from experiments import prepare_pickapic, run
from experiments.ablate import show
from experiments.cli.command import run_command
from experiments.shapes import build_pipeline, build_preference, collect_preferences

EARLY = 1500  # steps of the early checkpoint; the base had 5000
SETS = {"people": (0, 4096), "people-2": (2, 4096), "people-val": (1, 512)}  # seed and pairs of each set
MATCHING = 3000  # steps of the CLIP's training
JUDGES = ("spm_tiny", "lrm_tiny")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.shapes.build_judges",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.parse_args(argv)
    early_checkpoint(Path("runs/early"))
    for name, (seed, pairs) in SETS.items():
        preferences(Path("data/shapes") / name, seed, pairs)
    clip = Path("runs/shapes_clip")
    unless(
        clip, build_preference.main, "shapes.build_preference", "--matching", f"--steps={MATCHING}", "--output", clip
    )
    for judge in JUDGES:
        show(run.main, "run", "--config", judge, "--ckpt_path", "auto")


def unless(made: Path, command: Callable[..., Any], name: str, *words: Any) -> None:
    """Run a command, unless what it makes is there."""
    if not made.exists():
        show(command, name, *words)


def early_checkpoint(folder: Path) -> None:
    start, training = folder.with_name(f"{folder.name}_start"), folder.with_name(f"{folder.name}_training")
    untrained = ["--trained", "embedded/shapes", "--untrained", "unet", "text_encoder", "--output", start]
    unless(start, build_pipeline.main, "shapes.build_pipeline", *untrained)
    export = training / "export" / f"step={EARLY:07d}"
    settings = ["--config", "pretrain_shapes", f"--model.policy.pretrained={start}", f"--trainer.max_steps={EARLY}"]
    unless(export, run.main, "run", *settings, "--run_dir", training, "--ckpt_path", "auto")
    unless(folder, build_pipeline.main, "shapes.build_pipeline", "--trained", start, export, "--output", folder)


def preferences(folder: Path, seed: int, pairs: int) -> None:
    shards = folder.with_name(f"{folder.name}-pairs")
    made = ["--pipelines", "embedded/shapes", "runs/early", f"--seed={seed}", f"--pairs={pairs}", "--output", folder]
    unless(shards / "manifest.json", collect_preferences.main, "shapes.collect_preferences", *made)
    prepared = ["--input", folder, "--output", shards]
    unless(shards / "manifest.json", prepare_pickapic.main, "prepare_pickapic", *prepared)


if __name__ == "__main__":
    run_command(main)
