"""One shard of pairs, ordered anew by a reward's scores."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from datamodules.shards.bad_samples import BadSampleError
from datamodules.shards.manifest import ShardInfo
from datamodules.shards.reader import ShardSet
from datamodules.shards.samples import Sample, pixel_members
from datamodules.shards.writer import write_shard
from experiments.cli.workers import batches_ahead
from experiments.relabelling.agreement import Agrees, Judged
from lightning_modules.errors import UserError
from lightning_modules.rewards.base import RewardModel

MAX_NAMED = 20  # damaged pairs of a shard that are named
SIDES = ("chosen", "rejected")


@dataclass(frozen=True)
class Settings:
    """What decides the new shards, beside the old ones and the reward.

    Attributes:
        margin: pairs whose scores are closer than that are dropped.
        batch_size: pairs that are read and scored at a time; scores may depend on it in their last bits.
        agrees: keeps the order as it is stored, ties too, and drops the pairs that the reward does not agree with.
    """

    margin: float = 0.0
    batch_size: int = 8
    agrees: Agrees | None = None


@dataclass
class ShardResult:
    """What came of a shard.

    Attributes:
        shard: the new one; None where no pair is left.
        counts: of pairs, by what became of them.
        corrupt: the first damaged pairs, and why.
        captions: of the pairs that are left, each once.
        judged: every pair that was scored, in the order that it came in.
    """

    shard: ShardInfo | None = None
    counts: Counter[str] = field(default_factory=Counter)
    corrupt: list[str] = field(default_factory=list)
    captions: dict[str, None] = field(default_factory=dict)
    judged: list[Judged] = field(default_factory=list)


@dataclass(frozen=True)
class ReadPair:
    """A stored pair, decoded: full size, RGB.

    Attributes:
        human: how much people preferred the picture that comes first; not 0.5, unless the order is kept.
    """

    sample: Sample
    info: dict[str, Any]
    human: float
    images: tuple[Image.Image, Image.Image]


@dataclass(frozen=True)
class Relabelling:
    """Shards of pairs, and what orders them anew (Diffusion-DPO ``train.py:783-828, 1019``).

    People's ties are dropped before anything is scored; equal scores keep the order.

    Attributes:
        shards: of pixels.
        reward: on ``device``.
        settings: see ``Settings``.
        folder: for the new shards.
        device: for the pictures.
    """

    shards: ShardSet
    reward: RewardModel
    settings: Settings
    folder: Path
    device: torch.device

    def relabel(self, number: int, advance: Callable[[int], None]) -> ShardResult:
        """Read shard ``number`` and write what is left of it, under its number.

        Args:
            number: of the shard.
            advance: told how many of the shard's pairs are done.

        Raises:
            UserError: a score that is not finite; a damaged shard.
        """
        result = ShardResult()
        samples = self._ordered(number, result, advance)
        first = next(samples, None)
        if first is not None:
            result.shard = write_shard(self.folder / f"{number:05d}.tar", chain([first], samples))
        return result

    def _ordered(
        self, number: int, result: ShardResult, advance: Callable[[int], None]
    ) -> Iterator[tuple[int, dict[str, bytes]]]:
        """The new samples with their numbers; what is dropped goes into ``result``."""
        agrees = self.settings.agrees
        for batch in batches_ahead(_read(self.shards, number, result, agrees is not None), self.settings.batch_size):
            for pair, scores in zip(batch, score_pairs(self.reward, batch, self.device), strict=True):
                result.judged.append(Judged(pair.human, *scores))
                if agrees is not None:
                    kept = agrees.keeps(pair.human, scores[0] - scores[1])
                    result.counts["pairs" if kept else "disagreeing_dropped"] += 1
                    if kept:
                        result.captions[pair.info["caption"]] = None
                        yield int(pair.sample.key), kept_members(pair, scores, self.reward.name)
                    continue
                if abs(scores[0] - scores[1]) < self.settings.margin:
                    result.counts["below_margin_dropped"] += 1
                    continue
                result.counts["pairs"] += 1
                result.counts["flipped"] += scores[1] > scores[0]
                result.counts["equal_scores"] += scores[1] == scores[0]
                result.captions[pair.info["caption"]] = None
                yield int(pair.sample.key), ordered_members(pair, scores, self.reward.name)
            advance(len(batch))
        advance(self.shards.sizes[number] - len(result.judged))


def _read(shards: ShardSet, number: int, result: ShardResult, as_stored: bool) -> Iterator[ReadPair]:
    """The whole pairs on which people have decided; ``as_stored`` all whole ones, with the labels that they have."""
    for row in range(shards.sizes[number]):
        result.counts["rows_read"] += 1
        try:
            sample = shards.read(number, row)
            info = sample.info()
            # That of a pair that was ordered by a reward before is kept beside its label.
            key = "human_label" if "human_label" in info and not as_stored else "label"
            human = sample.number(info, key, 0.0, 1.0)
            if human == 0.5 and not as_stored:
                result.counts["ties_dropped"] += 1
                continue
            yield ReadPair(sample, info, human, (sample.image("chosen"), sample.image("rejected")))
        except BadSampleError as error:
            result.counts["corrupt_dropped"] += 1
            if len(result.corrupt) < MAX_NAMED:
                bad = error.sample
                result.corrupt.append(f"{Path(bad.shard).name}, sample {bad.key}: {bad.why}")


def score_pairs(reward: RewardModel, pairs: Sequence[ReadPair], device: torch.device) -> list[tuple[float, float]]:
    """Scores of both pictures of each pair; pictures of one size are scored together.

    Raises:
        UserError: one is not finite.
    """
    places: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for n, pair in enumerate(pairs):
        for side in (0, 1):
            places.setdefault(pair.images[side].size, []).append((n, side))
    found = [[0.0, 0.0] for _ in pairs]
    for members in places.values():
        arrays = np.stack([np.asarray(pairs[n].images[side]) for n, side in members])
        images = torch.from_numpy(arrays).to(device).permute(0, 3, 1, 2).float() / 255
        scores = reward.score(images, [pairs[n].info["caption"] for n, _ in members])
        for (n, side), score in zip(members, scores.tolist(), strict=True):
            if not np.isfinite(score):
                sample = pairs[n].sample
                raise UserError(
                    f"reward {reward.name} gave {score} to the {SIDES[side]} picture of {sample.shard}, sample "
                    f"{sample.key}, {pairs[n].info['caption'][:60]!r}; finished shards are kept"
                )
            found[n][side] = score
    return [(first, second) for first, second in found]


def ordered_members(pair: ReadPair, scores: tuple[float, float], name: str) -> dict[str, bytes]:
    """The sample with the higher score as the chosen picture; both files untouched.

    Its record says "label" 1, what people said of the now chosen picture as "human_label" (1 or 0), the scores, and
    whose they are. Whatever stood there of either picture has changed sides with it.
    """
    flipped = scores[1] > scores[0]
    info = {key: value for key, value in pair.info.items() if not key.startswith(tuple(f"{side}_" for side in SIDES))}
    info |= {"label": 1.0, "human_label": 1.0 - pair.human if flipped else pair.human, "reward": name}
    sources = SIDES[::-1] if flipped else SIDES
    for side, other in zip(SIDES, sources):
        about = {key: value for key, value in pair.info.items() if key.startswith(f"{other}_")}
        info |= {f"{side}_{key.removeprefix(f'{other}_')}": value for key, value in about.items()}
        info[f"{side}_score"] = scores[SIDES.index(other)]
    return pixel_members(pair.sample.picture(sources[0]), pair.sample.picture(sources[1]), info)


def kept_members(pair: ReadPair, scores: tuple[float, float], name: str) -> dict[str, bytes]:
    """The sample as it was, with both scores in its record."""
    info = pair.info | {f"{side}_{name}": score for side, score in zip(SIDES, scores)}
    return pixel_members(pair.sample.picture("chosen"), pair.sample.picture("rejected"), info)
