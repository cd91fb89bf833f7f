"""MPS, the Multi-dimensional Preference Score (arXiv 2405.14705), which cannot be read safely."""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

from lightning_modules.errors import ConfigError
from lightning_modules.rewards.base import RewardModel

REFUSAL = (
    "MPS: its weights are published only as a pickled module, and reading one runs whatever code it holds; score with "
    "it in an environment of its own, behind HttpReward"
)


class MPS(RewardModel):
    """Refused by name: its weights are published only as a pickled module, and unpickling runs code out of the file.

    Raises:
        ConfigError: always.
    """

    name = "mps"

    def __init__(self, pretrained: str | None = None) -> None:
        super().__init__()
        raise ConfigError(REFUSAL)

    def score(self, images: Float[Tensor, "n 3 h w"], prompts: Sequence[str]) -> Float[Tensor, " n"]:
        raise ConfigError(REFUSAL)
