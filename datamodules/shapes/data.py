"""The embedded world's data: captioned drawings as preference pairs. Every pair is a pure function of (seed, index)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any

import lightning as L
import torch
from jaxtyping import UInt8
from torch import Tensor

from datamodules.shapes.drawing import draw_imperfect, prompt_splits, random_numbers, random_prompts
from lightning_modules.batches import PreferencePairs
from lightning_modules.errors import ConfigError
from lightning_modules.lightning_internals import batches_trained
from lightning_modules.randomness import generator
from lightning_modules.shapes.reward import ShapesReward
from lightning_modules.shapes.world import SIDE, Scene

TIME_IDS = (float(SIDE), float(SIDE), 0.0, 0.0, float(SIDE), float(SIDE))  # no crop: the order of PreferencePairs


class ShapesPairs:
    """A fixed data set of imperfect pairs, drawn once and kept as bytes, so that drawing never bounds training.

    Pair j is two independent drawings of its prompt, a pure function of (seed, purpose, j, prompt).
    """

    def __init__(self, prompts: Sequence[str], seed: int, ranked: bool, purpose: str = "train") -> None:
        self.prompts = tuple(prompts)
        self.pictures = torch.stack([self._drawn(j, seed, purpose) for j in range(len(self))])  # uint8 [n, 2, 3, h, w]
        if ranked:
            self._rank()

    def _drawn(self, j: int, seed: int, purpose: str) -> UInt8[Tensor, "2 3 h w"]:
        scene = Scene.parse(self.prompts[j])
        return torch.stack(
            [draw_imperfect(scene, random_numbers(seed, "shapes", purpose, "drawing", j, k)) for k in (0, 1)]
        )

    def _rank(self) -> None:
        """Puts the picture with the higher exact reward first."""
        reward = ShapesReward()
        for start in range(0, len(self), 1024):
            block, prompts = self.pictures[start : start + 1024], self.prompts[start : start + 1024]
            first, second = (reward.score(block[:, k].float() / 255, prompts) for k in (0, 1))
            worse = first < second
            block[worse] = block[worse].flip(1)

    def __len__(self) -> int:
        return len(self.prompts)

    def batch(self, rows: list[int], indices: list[int]) -> PreferencePairs:
        """The pairs ``rows`` of the data set, as the samples ``indices`` of the run."""
        pictures = self.pictures[rows].float().div_(127.5).sub_(1)
        time_ids = torch.tensor(TIME_IDS).expand(len(rows), 6)
        prompts = tuple(self.prompts[row] for row in rows)
        return PreferencePairs(pictures[:, 0], pictures[:, 1], prompts, time_ids, time_ids, torch.tensor(indices))


class _Epoch:
    """The batches of one rank, from the current position of the run to the end of its epoch.

    A plain iterable: the data lies in memory, and Lightning leaves its sampling alone. Each ``iter`` asks for the
    position again, so that a resumed run continues where it stopped and a second ``iter`` does no harm.
    """

    def __init__(self, length: int, position: Callable[[], int], make: Callable[[int], PreferencePairs]) -> None:
        self.length, self.position, self.make = length, position, make

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[PreferencePairs]:
        start = self.position()
        for m in range(start, (start // self.length + 1) * self.length):
            yield self.make(m)

    def state_dict(self) -> dict[str, Any]:
        """Nothing: the position is derived. Its presence tells Lightning that stopping within an epoch is safe."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to restore."""


class ShapesDataModule(L.LightningDataModule):
    """Preference pairs of the embedded world, for pretraining and for quick experiments without files.

    Sample n of the run is pair ``order(epoch)[n mod size]`` of the fixed data set: a pure function of (seed, n),
    whatever the batch size, the number of ranks and the history of the run. Validation gives the pictures of the
    held-out validation prompts, 4 pairs each, in order.

    Args:
        batch_size: pairs per batch and rank.
        batches_per_epoch: batches a rank and epoch.
        size: pairs in the fixed data set; 1,000 take about a second to draw.
        seed: seed of the data and of its order.
        ranked: whether the picture with the higher exact reward is ``chosen``; False leaves the pairs as drawn,
            for pretraining on the data as it is.
    """

    def __init__(
        self, batch_size: int = 32, batches_per_epoch: int = 100, size: int = 8192, seed: int = 0, ranked: bool = True
    ) -> None:
        super().__init__()
        for name, value in (("batch_size", batch_size), ("batches_per_epoch", batches_per_epoch), ("size", size)):
            if value < 1:
                raise ConfigError(f"data.{name} must be at least 1, got {value}")
        self.batch_size, self.batches_per_epoch, self.size = batch_size, batches_per_epoch, size
        self.seed, self.ranked = seed, ranked
        self._train: ShapesPairs | None = None

    @property
    def train(self) -> ShapesPairs:
        """The data set, drawn at first use."""
        if self._train is None:
            self._train = ShapesPairs(random_prompts("train", self.size, self.seed), self.seed, self.ranked)
        return self._train

    def setup(self, stage: str) -> None:
        if stage == "fit":
            _ = self.train

    def sample_row(self, n: int) -> int:
        """The pair of the data set that sample n of the run is."""
        epoch, place = divmod(n, self.size)
        return _order(self.seed, epoch, self.size)[place]

    def train_batch(self, m: int, rank: int = 0, world: int = 1) -> PreferencePairs:
        """Batch m of a rank: the samples (m world + rank) batch_size ... of the run."""
        first = (m * world + rank) * self.batch_size
        indices = list(range(first, first + self.batch_size))
        return self.train.batch([self.sample_row(n) for n in indices], indices)

    def train_dataloader(self) -> _Epoch:
        trainer = self.trainer
        if trainer is None:
            return _Epoch(self.batches_per_epoch, lambda: 0, self.train_batch)
        rank, world = trainer.global_rank, trainer.world_size
        return _Epoch(
            self.batches_per_epoch,
            lambda: batches_trained(trainer),
            lambda m: self.train_batch(m, rank, world),
        )

    def val_dataloader(self) -> _Epoch:
        pairs = _validation_pairs(prompt_splits()["validation"], self.seed)
        blocks = [list(range(start, min(start + 48, len(pairs)))) for start in range(0, len(pairs), 48)]
        return _Epoch(len(blocks), lambda: 0, lambda m: pairs.batch(blocks[m], blocks[m]))


@lru_cache(maxsize=4)
def _order(seed: int, epoch: int, size: int) -> list[int]:
    order: list[int] = torch.randperm(size, generator=generator(seed, "shapes order", epoch)).tolist()
    return order


@lru_cache(maxsize=2)
def _validation_pairs(prompts: tuple[str, ...], seed: int) -> ShapesPairs:
    return ShapesPairs(prompts * 4, seed, ranked=False, purpose="validation")
