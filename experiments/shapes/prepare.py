"""Draws preference pairs of the embedded world as parquet in Pick-a-Pic's schema, so that they take real data's road.

python -m experiments.shapes.prepare --output data/shapes --pairs 2000 --seed 0
python -m experiments.prepare_pickapic --input data/shapes --output data/shapes-shards
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from datamodules.shapes.drawing import as_unit, draw_imperfect, prompt_splits, random_numbers
from experiments.cli.command import run_command
from experiments.preparation.pickapic_schema import SCHEMA, label_of, pair_row
from lightning_modules.errors import ConfigError
from lightning_modules.files import atomic_folder
from lightning_modules.progress import tracked
from lightning_modules.randomness import derive_seed
from lightning_modules.shapes.reward import ShapesReward
from lightning_modules.shapes.world import Scene

TIE = 0.02  # rewards closer than that are called equal, as people's would be
MISREAD = 0.2  # of the pictures get one word of the prompt wrong: content must be there to be preferred, beside looks
_BLOCK = 500  # pairs drawn, scored and written at a time


def rows(first: int, last: int, seed: int, counts: Counter[str], captions: list[str]) -> list[dict[str, Any]]:
    """The rows first .. last - 1 of the data set; row j is a pure function of (seed, j), but for its prompt's count."""
    pictures = torch.stack(
        [
            draw_imperfect(Scene.parse(captions[j]), random_numbers(seed, "preference pairs", j, k), MISREAD)
            for j in range(first, last)
            for k in (0, 1)
        ]
    )
    rewards = ShapesReward().score(as_unit(pictures), [captions[j] for j in range(first, last) for _ in (0, 1)])
    return [
        pair_row(
            j,
            seed,
            captions[j],
            pictures[2 * i : 2 * i + 2].permute(0, 2, 3, 1).numpy(),
            label_of(rewards[2 * i : 2 * i + 2].tolist(), TIE),
            counts[captions[j]],
            ("shapes", "shapes"),
        )
        for i, j in enumerate(range(first, last))
    ]


def prepare(output: Path, pairs: int, seed: int) -> None:
    """Writes ``output``, whole or not at all.

    Raises:
        ConfigError: no pairs asked for, or ``output`` exists.
    """
    if pairs < 1:
        raise ConfigError(f"--pairs must be at least 1, got {pairs}")
    if output.exists():
        raise ConfigError(f"{output} exists already: name a new folder, or delete it first")
    prompts = prompt_splits()["train"]
    captions = [prompts[derive_seed(seed, "preference prompts", j) % len(prompts)] for j in range(pairs)]
    counts = Counter(captions)
    with (
        atomic_folder(output) as unfinished,
        pq.ParquetWriter(unfinished / "train-00000-of-00001.parquet", SCHEMA) as writer,
    ):
        for first in tracked(range(0, pairs, _BLOCK), "drawing pairs, block"):
            block = rows(first, min(first + _BLOCK, pairs), seed, counts, captions)
            writer.write_table(pa.Table.from_pylist(block, schema=SCHEMA))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder to make; must not exist")
    parser.add_argument("--pairs", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    prepare(options.output, options.pairs, options.seed)


if __name__ == "__main__":
    run_command(main)
