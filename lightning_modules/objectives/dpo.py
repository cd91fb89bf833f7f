"""Diffusion-DPO: preference optimisation on pairs of pictures (arXiv 2311.12908)."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid

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
class DPO(PairwiseObjective):
    """L = -log sigmoid(beta m / 2): the policy should beat the reference by more on the chosen picture.

    m is the margin of ``Gains``. Source: arXiv 2311.12908, equation 14, with its T and weight in beta; official
    train.py:1135.

    Args:
        beta: multiplies the difference of **mean** squared errors, and is halved as in the official code, so that 5000
            here is 5000 there and 2500 in the diffusers example. 5000 as a mean over SD 1.5's 4x64x64 latents is
            0.153 as a sum.
        label_smoothing: probability that a label is wrong, see ``smoothed``.

    Logged: what ``Gains`` logs, and ``reward_margin`` (beta m / 2).
    """

    beta: float = 5000.0
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        if self.beta <= 0:
            raise ConfigError(f"objective.beta must be above 0, got {self.beta}; Diffusion-DPO uses 2000 to 5000")
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
        margin = gains.margin
        per_pair = smoothed(lambda m: -logsigmoid(0.5 * self.beta * m), margin, self.label_smoothing)
        reward_margin = {"reward_margin": 0.5 * self.beta * margin.mean()}
        return loss_output(per_pair, gains.metrics(query, schedule) | reward_margin)
