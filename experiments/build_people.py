"""People's preferences, and judges that learn from them alone: where the fair comparison of docs/results.md starts.

    python -m experiments.build_people
    python -m experiments.ablate fair_tiny --seeds 0 1 2 3 4

Every step is a command of its own, printed before it runs. A second call makes what is missing: preferences that were
begun with other settings are refused, a pipeline or a CLIP that is there is taken as it is, and named.

- an early checkpoint: the base's denoiser and text encoder after 1500 steps of training, on the base's autoencoder;
- preferences (``collect_preferences``) between pictures of the early and the late checkpoint and of an artist, two sets
  to learn from and one to validate on, as shards; for the control of each seed, the same pairs ordered by a coin;
- a CLIP that has learned from drawings which prompt a picture belongs to, and no preference (``build_preference``);
- SPO's judge (``spm_tiny``), which starts from that CLIP and learns from these preferences alone;
- LPO's judge (``lrm_tiny``), which starts from the base's UNet and text encoder and learns from them alone, too.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from experiments import prepare_pickapic, relabel, run
from experiments.ablate import show
from experiments.cli.command import run_command
from experiments.shapes import build_pipeline, build_preference, collect_preferences
from lightning_modules.terminal import literal

EARLY = 1500  # steps of the early checkpoint; the base had 5000
TRAIN = {"people": (0, 4096), "people-2": (2, 4096)}  # seed and pairs of each set
VALIDATION = {"people-val": (1, 512)}
MATCHING = 3000  # steps of the CLIP's training
CLIP = "runs/shapes_clip"
# Folder -> words for run. SPO's was the better of two tries on the first weights, LPO's is the one that was tried.
JUDGES = {
    "runs/people_spm": (
        "--config=spm_tiny",
        f"--model.preference.pretrained={CLIP}",
        "--model.optimizer.lr=1e-4",
        "--trainer.max_steps=800",
        "--trainer.val_check_interval=100",
    ),
    "runs/people_lrm": ("--config=lrm_tiny",),
}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.build_people",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4], metavar="SEED", help="of the controls (0 1 2 3 4)"
    )
    seeds = parser.parse_args(argv).seeds
    early_checkpoint(Path("runs/early"))
    for name, (seed, pairs) in (TRAIN | VALIDATION).items():
        preferences(Path("data/shapes") / name, seed, pairs)
    for seed in seeds:
        for name in TRAIN:
            coin(Path("data/shapes") / f"{name}-pairs", seed)
    matching = ["--matching", f"--steps={MATCHING}", "--output", CLIP]
    unless(Path(CLIP), build_preference.main, "shapes.build_preference", *matching)
    for folder, settings in JUDGES.items():
        judge(folder, settings)


def unless(made: Path, command: Callable[..., Any], name: str, *words: Any) -> None:
    """Run a command that refuses a folder that exists, unless what it makes is there."""
    if made.exists():
        Console().print(literal(f"{made} is there already and is taken as it is"), soft_wrap=True)
    else:
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
    show(collect_preferences.main, "shapes.collect_preferences", *made)
    show(prepare_pickapic.main, "prepare_pickapic", "--input", folder, "--output", shards)


def coin(shards: Path, seed: int) -> None:
    """The same pairs, ordered at random: what a control learns from."""
    output = shards.with_name(f"{shards.name}-coin{seed}")
    words = ["--shards", shards, "--reward=RandomReward", f"--reward.seed={seed}", "--output", output]
    show(relabel.main, "relabel", *words)


def judge(folder: str, settings: Sequence[str]) -> None:
    learned = ", ".join(f"data/shapes/{name}-pairs" for name in TRAIN)
    (validation,) = VALIDATION
    data = [f"--data.shards=[{learned}]", f"--data.val_shards=data/shapes/{validation}-pairs"]
    show(run.main, "run", *settings, *data, "--run_dir", folder, "--ckpt_path", "auto")


if __name__ == "__main__":
    run_command(main)
