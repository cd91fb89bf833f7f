"""The control of whatever is ordered by a reward: numbers drawn at random, one per picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_modules.randomness import generator, rand
from lightning_modules.rewards.base import RewardModel


class RandomReward(RewardModel):
    """Uniform in [0, 1), whatever a picture shows, and always the same for the same picture (as eight bits per colour).

    Pairs relabelled with it are those of a real reward but for which picture wins. Step pools have controls of their
    own: ``RandomScorer``, ``ShuffledScorer``.

    Args:
        seed: another one orders the same pictures otherwise.
    """

    name = "random"

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.seed = seed

    def score(self, images: Float[Tensor, "n 3 h w"], prompts: Sequence[str]) -> Float[Tensor, " n"]:
        pictures = (images.float().clamp(0, 1) * 255).round().to(torch.uint8).cpu()
        return rand([generator(self.seed, "random reward", picture.numpy().tobytes().hex()) for picture in pictures])

    def described(self) -> dict[str, Any]:
        return {**super().described(), "seed": self.seed}
