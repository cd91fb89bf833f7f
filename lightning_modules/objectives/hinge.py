"""SLiC's hinge (arXiv 2305.10425) on the diffusion margin."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_modules.batches import LatentPairs
from lightning_modules.errors import ConfigError
from lightning_modules.objectives.base import LossOutput
from lightning_modules.objectives.pairwise import (
    Gains,
    NoisedPairs,
    PairwiseObjective,
    check_label_smoothing,
    loss_output,
    smoothed,
)
from lightning_modules.schedules.base import Schedule


@dataclass(frozen=True)
class Hinge(PairwiseObjective):
    """L = max(0, 1 - beta m): a pair teaches until its margin has reached 1 / beta, then nothing (equation 4).

    Args:
        beta: multiplies the margin of mean squared errors, unhalved: a pair is learned at a margin of 1 / beta.
        label_smoothing: probability that a label is wrong, see ``smoothed``.

    Logged: what ``Gains`` logs.
    """

    beta: float = 5000.0
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        if self.beta <= 0:
            raise ConfigError(
                f"objective.beta must be above 0, got {self.beta}; a pair is learned at a margin of 1 / beta"
            )
        check_label_smoothing(self.label_smoothing)

    def loss(
        self,
        batch: LatentPairs,
        query: NoisedPairs,
        policy_output: Float[Tensor, "n c h w"],
        reference_output: Float[Tensor, "n c h w"] | None,
        schedule: Schedule,
    ) -> LossOutput:
        gains = Gains.of(query, policy_output, reference_output)
        per_pair = smoothed(lambda m: torch.relu(1 - self.beta * m), gains.margin, self.label_smoothing)
        return loss_output(per_pair, gains.metrics(query, schedule))
