"""At which noise levels a flow model trains."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_modules.errors import ConfigError
from lightning_modules.randomness import rand, randn


class LevelDraw(ABC):
    """A distribution over [0, 1], the place in a schedule's table of levels: 0 is its noisiest row."""

    @abstractmethod
    def shares(self, generators: Sequence[torch.Generator]) -> Float[Tensor, " n"]:
        """Entry i is drawn from generator i alone; on the CPU."""


@dataclass(frozen=True)
class Uniform(LevelDraw):
    """Every row of the table alike."""

    def shares(self, generators: Sequence[torch.Generator]) -> Float[Tensor, " n"]:
        return rand(generators)


@dataclass(frozen=True)
class LogitNormal(LevelDraw):
    """sigmoid(N(mean, std^2)): levels in the middle most often, as SD3 was trained (arXiv 2403.03206, section 3.1).

    flow_grpo's Flow-DPO takes mean 0 and std 1.

    Attributes:
        mean: above 0 moves training towards **clean** pictures: a share of 0 is noise.
        std: of the normal distribution.
    """

    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self) -> None:
        if self.std <= 0:
            raise ConfigError(f"LogitNormal: std must be above 0, got {self.std}; 1 is usual")

    def shares(self, generators: Sequence[torch.Generator]) -> Float[Tensor, " n"]:
        return torch.sigmoid(self.mean + self.std * randn((), generators))
