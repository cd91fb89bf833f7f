r"""Collects preferences as Pick-a-Pic's were: pictures of several generators, and the noisy choices of people.

    python -m experiments.shapes.collect_preferences --output data/shapes/people --pairs 4096
    python -m experiments.prepare_pickapic --input data/shapes/people --output data/shapes/people-pairs

The pictures of a pair are of one prompt and two different generators: each pipeline of ``--pipelines`` (an early and
the late checkpoint, say) at several guidance scales and with few and many steps, and an artist's imperfect drawings.
People prefer the picture with the higher exact reward, the more surely the further apart the two are: Bradley and
Terry's model with the ties of Rao and Kupper (1967). The first is preferred where

    sharpness (r_0 - r_1) + z > tie,

the second where it is below -tie, z of the standard logistic distribution; else it is a tie. Told at the end is the
ceiling that this noise leaves: how often the exact reward itself agrees with the choices.
Row j depends on the settings and j alone; the same command again makes the missing parts.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from jaxtyping import Float, UInt8
from rich.console import Console
from torch import Tensor

from callbacks.evaluation.pictures import PictureRequest, draw
from datamodules.pools.fingerprint import fingerprint
from datamodules.prompts import prompt_texts
from datamodules.shapes.drawing import as_unit, draw_imperfect, random_numbers
from datamodules.shards.pictures import decode_picture
from experiments.cli.command import run_command
from experiments.preparation.parts import PART, MakeRow, write_parts
from experiments.preparation.pickapic_schema import pair_row
from experiments.shapes.prepare import MISREAD
from lightning_modules.errors import ConfigError
from lightning_modules.files import resolved_path
from lightning_modules.folder_lock import locked_folder
from lightning_modules.policies import Frozen, StableDiffusion
from lightning_modules.randomness import derive_seed, generator, rand
from lightning_modules.sampling.eight_bit import eight_bit
from lightning_modules.sampling.pictures import Sampler
from lightning_modules.shapes.reward import ShapesReward
from lightning_modules.shapes.world import Scene
from lightning_modules.terminal import literal

WAYS = ((20, 1.0), (20, 1.5), (20, 2.0), (20, 3.0), (8, 2.0))  # DDIM steps and guidance scale of each pipeline
Key = tuple[int | str, ...]
Pictures = UInt8[np.ndarray, "n H W 3"]


@dataclass(frozen=True)
class People:
    """How people choose; see the module.

    Args:
        sharpness: per unit of reward.
        tie: what a preference has to exceed.
    """

    sharpness: float
    tie: float

    def choose(self, rewards: Float[Tensor, "n 2"], keys: Sequence[Key]) -> list[float]:
        """Labels of the pairs: 1, 0 or 0.5, each drawn by its key."""
        uniform = rand([generator(*key) for key in keys]).double().clamp(1e-9, 1 - 1e-9)
        felt = self.sharpness * (rewards[:, 0] - rewards[:, 1]).double() + uniform.logit()
        return [0.5 if abs(value) <= self.tie else float(value > 0) for value in felt.tolist()]


@dataclass(frozen=True)
class Maker:
    """A generator of pictures, and what rows call it."""

    name: str
    draw: Callable[[Sequence[str], Sequence[Key]], Pictures]


def artist(texts: Sequence[str], keys: Sequence[Key]) -> Pictures:
    scenes = zip(map(Scene.parse, texts), keys)
    drawn = [draw_imperfect(scene, random_numbers(*key), MISREAD) for scene, key in scenes]
    return torch.stack(drawn).permute(0, 2, 3, 1).numpy()


def pipeline(policy: StableDiffusion, sampler: Sampler, texts: Sequence[str], keys: Sequence[Key]) -> Pictures:
    requests = [PictureRequest(text, key) for text, key in zip(texts, keys)]
    return eight_bit(draw(policy, sampler, policy.predict_noise, requests), texts)


def makers_of(policies: Mapping[str, StableDiffusion]) -> list[Maker]:
    drawn = [
        Maker(f"{name}, {steps} steps, guidance {scale:g}", partial(pipeline, policy, Sampler(steps, scale)))
        for name, policy in policies.items()
        for steps, scale in WAYS
    ]
    return [*drawn, Maker("artist", artist)]


@dataclass(frozen=True)
class Collection:
    """What is collected, and of whom.

    Attributes:
        prompts: asked for in turn.
        pairs: rows in all.
    """

    prompts: Sequence[str]
    makers: Sequence[Maker]
    people: People
    pairs: int
    seed: int

    def rows(self, numbers: range) -> list[MakeRow]:
        """What makes the rows ``numbers``. Each maker draws all of its pictures at once."""
        captions = [self.prompts[j % len(self.prompts)] for j in numbers]
        makers = [self._two_makers(j) for j in numbers]
        pictures = self._pictures(numbers, captions, makers)
        rewards = torch.stack([rewards_of(pictures[:, side], captions) for side in (0, 1)], dim=1)
        labels = self.people.choose(rewards, [(self.seed, "people's choice", j) for j in numbers])
        examples = Counter(self.prompts[j % len(self.prompts)] for j in range(self.pairs))
        return [
            partial(pair_row, j, self.seed, captions[i], pictures[i], labels[i], examples[captions[i]],
                    (makers[i][0].name, makers[i][1].name))
            for i, j in enumerate(numbers)
        ]  # fmt: skip

    def _two_makers(self, j: int) -> tuple[Maker, Maker]:
        first, second, *_ = torch.randperm(len(self.makers), generator=generator(self.seed, "makers", j)).tolist()
        return self.makers[first], self.makers[second]

    def _pictures(
        self, numbers: range, captions: Sequence[str], makers: Sequence[tuple[Maker, Maker]]
    ) -> UInt8[np.ndarray, "n 2 H W 3"]:
        found: dict[tuple[int, int], np.ndarray] = {}
        for maker in self.makers:
            places = [(i, side) for i, pair in enumerate(makers) for side in (0, 1) if pair[side] is maker]
            if places:
                keys = [(self.seed, "people's picture", numbers[i], side) for i, side in places]
                found |= dict(zip(places, maker.draw([captions[i] for i, _ in places], keys)))
        return np.stack([np.stack([found[i, 0], found[i, 1]]) for i in range(len(numbers))])


def rewards_of(pictures: Pictures, captions: Sequence[str]) -> Float[Tensor, " n"]:
    return ShapesReward().score(as_unit(torch.from_numpy(pictures).permute(0, 3, 1, 2)), captions)


@dataclass
class Ceiling:
    """How far choices can be foretold: by the exact reward, which knows everything but people's noise."""

    pairs: int = 0
    ties: int = 0
    agreed: int = 0

    def read(self, file: Path) -> None:
        """Count a part's choices."""
        table = pq.read_table(file, columns=["caption", "jpg_0", "jpg_1", "label_0"]).to_pydict()
        first, second = (
            rewards_of(np.stack([np.asarray(decode_picture(data)) for data in table[side]]), table["caption"])
            for side in ("jpg_0", "jpg_1")
        )
        labels = torch.tensor(table["label_0"])
        chosen = labels != 0.5
        self.pairs += len(labels)
        self.ties += int((~chosen).sum())
        self.agreed += int(((first > second) == (labels == 1))[chosen].sum())

    def __str__(self) -> str:
        rest = max(1, self.pairs - self.ties)
        return (f"{self.pairs} pairs, {self.ties / self.pairs:.1%} of them ties; the exact reward agrees with "
                f"{self.agreed / rest:.1%} of the other choices")  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.shapes.collect_preferences",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output", type=resolved_path, required=True, help="folder for the parquet files")
    parser.add_argument("--pairs", type=int, default=4096, help="%(default)s")
    parser.add_argument("--prompts", default="embedded/prompts/shapes_train.txt", help="%(default)s")
    parser.add_argument(
        "--pipelines", nargs="+", default=["embedded/shapes"], help="that draw, beside the artist (%(default)s)"
    )
    parser.add_argument("--sharpness", type=float, default=5.0, help="of people's choices (%(default)s)")
    parser.add_argument("--tie", type=float, default=0.5, help="what a preference has to exceed (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    if options.pairs < 1 or options.sharpness < 0 or options.tie < 0:
        raise ConfigError("want --pairs of at least 1, --sharpness and --tie of at least 0")
    if len(set(options.pipelines)) < len(options.pipelines):
        raise ConfigError(f"--pipelines {' '.join(options.pipelines)}: one is named twice; leave it out")
    with locked_folder(options.output, "wait for it, or name another --output"):
        policies = {name: StableDiffusion(name, Frozen()).eval() for name in options.pipelines}
        people, prompts = People(options.sharpness, options.tie), prompt_texts(options.prompts)
        collection = Collection(prompts, makers_of(policies), people, options.pairs, options.seed)
        weights = [fingerprint(policy, frozen_in_full=True) for policy in policies.values()]
        job = {"prompts": derive_seed(*prompts), "pipelines": weights, "people": repr(people), "seed": options.seed,
               "pairs": options.pairs, "makers": [maker.name for maker in collection.makers]}  # fmt: skip
        write_parts(options.output, job, options.pairs, PART, collection.rows)
    ceiling = Ceiling()
    for file in sorted(options.output.glob("*.parquet")):
        ceiling.read(file)
    Console().print(literal(str(ceiling)), soft_wrap=True)


if __name__ == "__main__":
    run_command(main)
