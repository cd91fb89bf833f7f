"""AI feedback on pairs that people chose from: a reward orders them anew, or drops those that it cannot tell apart.

    python -m experiments.relabel --shards data/pickapic --reward PickScore --output data/pickapic-pickscore
    python -m experiments.relabel --shards data/pickapic --reward HPSv2 --margin 0.005 --output data/pickapic-hps
    python -m experiments.relabel --shards data/ties --reward CLIPScore --agree 0 0.03 --output data/agreed

As the Diffusion-DPO paper does it: people's ties go first, a pair is scored as it is stored (full size, before any crop
or flip), the higher score becomes the chosen picture, and equal scores keep the order, which here is people's. The
record of each pair keeps what people said as "human_label", and both scores. Pictures pass through untouched.

With --agree A B nothing is ordered anew: of people's pairs those are kept whose preferred picture scores more than A
above the other, and of their ties those whose first picture scores less than B above the second. The next reward takes
what this one has left; LPO trains on what an aesthetic (-0.5 0.2), a CLIP (0 0.03) and a VQA score (0 0.07) agree with.

Shards are made one by one, whole or not at all; the same command again goes on, another one is refused. What comes out
depends neither on --workers nor on interruptions. At the end it tells how the reward agrees with people.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from jsonargparse import DefaultHelpFormatter
from rich.console import Console
from rich.table import Table

from datamodules.pools.fingerprint import fingerprint
from datamodules.prompts import is_prompt
from datamodules.shards.locate import open_shards
from datamodules.shards.manifest import MANIFEST, Manifest
from datamodules.shards.reader import ShardSet
from experiments.cli.command import run_command
from experiments.cli.compose import import_named
from experiments.cli.configured_policy import device_of_this_process
from experiments.cli.experiment_cli import OneLineParser
from experiments.cli.setting_errors import one_line
from experiments.prepare_pickapic import CAPTIONS, job_hash, output_folder, refuse_other
from experiments.relabelling.agreement import THRESHOLDS, Agrees, Judged, accuracy, agreement, by_gap
from experiments.relabelling.scoring import MAX_NAMED, Relabelling, Settings, ShardResult
from experiments.relabelling.units import forget, relabel_all
from lightning_modules.errors import ConfigError, DataError
from lightning_modules.files import atomic_file, resolved_path
from lightning_modules.progress import Work
from lightning_modules.rewards.base import RewardModel
from lightning_modules.rewards.function import Reward, as_reward_model
from lightning_modules.terminal import literal

COUNTS = {
    "rows_read": "pairs read",
    "pairs": "pairs kept",
    "flipped": "of them with the order changed",
    "equal_scores": "of them with equal scores, in people's order",
    "ties_dropped": "people's ties dropped",
    "below_margin_dropped": "pairs closer than the margin dropped",
    "disagreeing_dropped": "pairs that the reward does not agree with dropped",
    "corrupt_dropped": "damaged pairs dropped",
}


def main(argv: Sequence[str] | None = None) -> Manifest:
    """Relabel as the command line says; the new manifest.

    Raises:
        UserError: something that the user can mend; the command line shows it as one line.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    parsed = _parser(words).parse_args(words)
    if parsed.workers is not None and parsed.workers < 1:
        raise ConfigError(f"--workers must be at least 1, got {parsed.workers}")
    console, folder = Console(), resolved_path(parsed.output)
    workers = parsed.workers or max(1, torch.cuda.device_count())
    relabelling = make(words)
    job = describe_job(relabelling.shards, relabelling.reward, relabelling.settings)
    if (folder / MANIFEST).exists():
        manifest = Manifest.read(folder / MANIFEST)
        refuse_other(folder, manifest.settings, job)
        console.print(literal(f"{folder} is complete already"))
        return manifest
    with output_folder(folder, job):
        with Work("scoring pair", len(relabelling.shards), first_line=True, keep=True) as work:
            results = relabel_all(relabelling, workers, make, words, work)
        if not any(result.shard for result in results):
            forget(folder)
        manifest = _merged(results, job, parsed.shards)
        captions = dict.fromkeys(caption for result in results for caption in result.captions if is_prompt(caption))
        with atomic_file(folder / CAPTIONS) as file:
            file.write(json.dumps(list(captions), ensure_ascii=False, indent=0).encode())
        manifest.write(folder)
    for table in tables([pair for result in results for pair in result.judged], manifest, folder):
        console.print(table)
    for name in manifest.corrupt:
        console.print(literal(f"damaged: {name}"))
    return manifest


def make(words: Sequence[str]) -> Relabelling:
    """What the command line says, ready on this process's device.

    Raises:
        ConfigError: settings without meaning, or shards that hold no pictures.
    """
    parser = _parser(words)
    parsed = parser.parse_args(list(words))
    if parsed.batch_size < 1 or not 0 <= parsed.margin < float("inf"):
        raise ConfigError(f"want --batch_size of 1 or more and --margin of 0 or more, got {parsed.batch_size} and "
                          f"{parsed.margin}")  # fmt: skip
    if parsed.agree is not None and (parsed.margin or len(parsed.agree) != 2):
        raise ConfigError(f"--agree takes two numbers and no --margin, got {parsed.agree} and {parsed.margin}")
    shards = open_shards(parsed.shards)
    if shards.kind != "pixels":
        raise ConfigError(f"{parsed.shards} holds {shards.kind}, and a reward judges pictures; give shards of pixels")
    device = torch.device(device_of_this_process())
    with one_line("--reward"):
        reward = as_reward_model(parser.instantiate(parsed).reward).to(device)
    agrees = None if parsed.agree is None else Agrees(*parsed.agree)
    settings = Settings(parsed.margin, parsed.batch_size, agrees)
    return Relabelling(shards, reward, settings, resolved_path(parsed.output), device)


def describe_job(shards: ShardSet, reward: RewardModel, settings: Settings) -> dict[str, Any]:
    """Everything that decides the result."""
    weights = fingerprint(reward, frozen_in_full=True)
    job = {"shards": shards.fingerprint(), "reward": reward.described(), "reward's weights": weights,
           "margin": settings.margin, "batch_size": settings.batch_size}  # fmt: skip
    return job if settings.agrees is None else job | {"agrees": asdict(settings.agrees)}


def _merged(results: Sequence[ShardResult], job: dict[str, Any], source: str) -> Manifest:
    counts = {name: sum(result.counts[name] for result in results) for name in COUNTS}
    if "agrees" not in job:
        counts.pop("disagreeing_dropped")
    corrupt = tuple(name for result in results for name in result.corrupt)[:MAX_NAMED]
    shards = tuple(result.shard for result in results if result.shard is not None)
    if not shards:
        said = ", ".join(f"{COUNTS[name]} {number}" for name, number in counts.items() if number)
        first = f"; the first: {corrupt[0]}" if corrupt else ""
        raise DataError(f"no pair of {source} is left ({said}){first}; lower --margin, or give other --shards")
    judged = [pair for result in results for pair in result.judged]
    return Manifest("pixels", shards, counts, job, job_hash(job), corrupt, None, {"agreement": agreement(judged)})


def tables(judged: Sequence[Judged], manifest: Manifest, folder: Path) -> list[Table]:
    """What became of the pairs, and how the reward agrees with people."""
    size = sum(shard.bytes for shard in manifest.shards) / 1e6
    kept = Table(title=literal(f"{folder}: {len(manifest.shards)} shards, {size:.1f} MB"), show_header=False)
    for name, number in manifest.counts.items():
        kept.add_row(COUNTS[name], str(number))
    agreed = Table("distance of scores", "pairs", "agreement", title="Agreement with people, equal scores count half")
    for group in by_gap(judged):
        agreed.add_row(f"{group.low:.4g} to {group.high:.4g}", str(group.pairs), f"{group.agreement:.1%}")
    agreed.add_row("all", str(len(judged)), f"{agreement(judged):.1%}", style="bold")
    rule = Table("a tie up to", "accuracy", title="PickScore's accuracy rule, for scores that are logits")
    for threshold in THRESHOLDS:
        rule.add_row(f"{threshold:.1f}", f"{accuracy(judged, threshold):.1%}")
    return [kept, agreed, rule]


class _AsWritten(argparse.RawDescriptionHelpFormatter, DefaultHelpFormatter):
    """The text around the options as it stands above."""


def _parser(words: Sequence[str]) -> OneLineParser:
    import_named({}, words)  # so that a reward's short name is known
    description, _, details = (__doc__ or "").partition("\n")
    parser = OneLineParser(
        prog="python -m experiments.relabel", description=description, epilog=details, formatter_class=_AsWritten
    )
    add = parser.add_argument
    add("--shards", type=str, required=True, help="a prepared folder, or tar files of pairs")
    add("--reward", type=Reward, required=True, help="reward model, or function f(images, prompts) by its dotted name")
    add("--output", type=str, required=True, help="folder for the new shards; made where needed")
    add("--margin", type=float, default=0.0, help="drop pairs whose scores are closer than this")
    add("--agree", type=float, nargs=2, default=None, help="keep the order, and the pairs that the reward agrees with")
    add("--batch_size", type=int, default=8, help="pairs scored at a time")
    add("--workers", type=int | None, default=None, help="processes; one per GPU where it is not given")
    return parser


if __name__ == "__main__":
    run_command(main)
