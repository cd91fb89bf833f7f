"""The whole pipeline in one command, without network or GPU: align the embedded model, judge it on held-out prompts.

    python -m experiments.demo
    python -m experiments.demo --methods dpo spo shuffled --seeds 0 1 2

What ``make demo`` runs is SPO, judged by the exact reward of the candidates' x0-predictions (``spo_exact``); ``spo``
is judged by the step-aware preference model that ships. ``d3po``, ``lpo`` and ``spo_flow`` draw their own pictures,
too. The others learn from pictures that the base draws first and the exact reward orders: ``kto`` from single ones,
the rest from pairs. What ends in ``shuffled`` is a control: the judge's scores dealt at random (``shuffled`` is
SPO's), or pairs ordered at random, anew for every seed. Every step is a command of its own, printed before it runs; a
second call resumes where the first one stopped. Several runs are compared at the end. Further ``--key=value``
settings go to every training, as with ``experiments.run``.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path

from experiments import prepare_feedback, prepare_pickapic, prepare_pictures, relabel
from experiments.ablate import Trial, check_words, show, train_and_compare
from experiments.cli.command import run_command
from lightning_modules.errors import ConfigError
from lightning_modules.files import resolved_path

EXACT = "--config spo_tiny --data.sampler.threshold=0.15 --model.optimizer.lr=5e-5"
# Settings as docs/results_first_weights.md says they were chosen, where it does.
METHODS = {
    "dpo": "--config dpo_tiny",
    "ipo": "--config dpo_tiny --model.objective=IPO --model.objective.tau=500",
    "dmpo": "--config dpo_tiny --model.objective=DMPO --model.objective.beta=1000",
    "dspo": "--config dpo_tiny --model.objective=DSPO",
    "sdpo": "--config dpo_tiny --model.objective=Safeguard --model.objective.objective=DPO"
    " --model.objective.objective.beta=1000 --model.objective.mu=0.2",
    "mapo": "--config dpo_tiny --model.objective=MaPO",
    "automatic_beta": "--config dpo_tiny --model.objective=AutomaticBeta --model.objective.objective=DPO"
    " --model.objective.highest=8",
    "sft": "--config dpo_tiny --config sft",
    "dpo_flow": "--config dpo_flow_tiny",
    "dpo_shuffled": "--config dpo_tiny",
    "dpo_flow_shuffled": "--config dpo_flow_tiny",
    "kto": "--config kto_tiny",
    "d3po": "--config d3po_tiny",
    "lpo": "--config lpo_tiny",
    "spo": "--config spo_tiny",
    "spo_flow": "--config spo_flow_tiny",
    "shuffled": "--config spo_tiny --config spo_tiny_shuffled",
    "spo_exact": f"{EXACT} --data.scorer=RewardScorer --data.scorer.reward=ShapesReward --data.scorer.scale=8.0",
    "spo_exact_shuffled": f"{EXACT} --data.scorer=ShuffledScorer --data.scorer.scorer=RewardScorer"
    " --data.scorer.scorer.reward=ShapesReward --data.scorer.scorer.scale=8.0",
    "spo_flow_shuffled": "--config spo_flow_tiny --data.scorer=ShuffledScorer --data.scorer.scorer=RewardScorer"
    " --data.scorer.scorer.reward=ShapesReward --data.scorer.scorer.scale=8.0",
}
ON_PICTURES = list(METHODS)[: list(METHODS).index("d3po")]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--methods", nargs="+", choices=METHODS, default=["spo_exact"], help="What to train (spo_exact)."
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[42], metavar="SEED", help="Of the trainings (42).")
    parser.add_argument(
        "--data", type=resolved_path, default="data", help="Folder for the base's pictures (%(default)s)."
    )
    parser.add_argument("--runs", type=resolved_path, default="runs", help="Folder for the runs (%(default)s).")
    parser.add_argument("--pairs", type=int, default=768, help="Pairs of the base's pictures to draw (%(default)s).")
    args, overrides = parser.parse_known_args(argv)
    check_words("the command line", overrides)
    flows = [method for method in args.methods if "flow" in method]
    if 0 < len(flows) < len(args.methods):
        raise ConfigError(
            f"--methods: {', '.join(flows)} start from the base as a flow, which draws other pictures: runs of both "
            "cannot be compared; call the demo for flows and for the others"
        )
    trials = []
    for method in args.methods:
        for seed in args.seeds:
            words = [*shlex.split(METHODS[method]), f"--seed_everything={seed}"]
            if method in ON_PICTURES:
                words += _pictures(args.data / "shapes", args.pairs, method, seed)
            trials.append(Trial(method, args.runs / f"demo-{method}-seed{seed}", (*words, *overrides)))
    train_and_compare(trials, args.runs / "demo-comparison")


def _pictures(data: Path, number: int, method: str, seed: int) -> list[str]:
    """The settings that name what a method learns from; what is not there yet is drawn and prepared."""
    pairs = data / "feedback-pairs"
    if not _prepared(pairs):
        feedback = ["--config", "dpo_tiny", "--prompts", "embedded/prompts/shapes_train.txt"]
        feedback += ["--reward", "ShapesReward", "--sampler.guidance_scale=2.5", "--candidates=4", f"--pairs={number}"]
        show(prepare_feedback.main, "prepare_feedback", *feedback, f"--output={data / 'feedback'}")
        show(prepare_pickapic.main, "prepare_pickapic", "--input", data / "feedback", "--output", pairs)
    if method == "kto":
        return _single_pictures(pairs, data / "feedback-pictures")
    if not method.endswith("shuffled"):
        return [f"--data.shards={pairs}"]
    shuffled = data / f"feedback-shuffled-seed{seed}"
    if not _prepared(shuffled):
        coin = ["--reward=RandomReward", f"--reward.seed={seed}"]
        show(relabel.main, "relabel", "--shards", pairs, *coin, "--output", shuffled)
    return [f"--data.shards={shuffled}"]


def _single_pictures(pairs: Path, folder: Path) -> list[str]:
    sides = [folder / side for side in prepare_pictures.SIDES]
    if not all(map(_prepared, sides)):
        show(prepare_pictures.main, "prepare_pictures", "--input", pairs, "--output", folder)
    return [f"--data.{side.name}={side}" for side in sides]


def _prepared(folder: Path) -> bool:
    return (folder / "manifest.json").exists()


if __name__ == "__main__":
    run_command(main)
