"""IPO: identity preference optimisation (arXiv 2310.12036) on the diffusion margin."""

from __future__ import annotations

from dataclasses import dataclass

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
class IPO(PairwiseObjective):
    """L = (m - 1 / (2 tau))^2: the margin should reach a finite goal, and go no further (equation 17).

    Args:
        tau: sets the goal, 1 / (2 tau), in units of mean squared error; larger keeps the policy closer to the
            reference. 5000 asks for a margin of 1e-4. It is not DPO's beta: nothing is multiplied by it.
        label_smoothing: probability that a label is wrong, see ``smoothed``.

    Logged: what ``Gains`` logs.
    """

    tau: float = 5000.0
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        if self.tau <= 0:
            raise ConfigError(f"objective.tau must be above 0, got {self.tau}; the margin aimed at is 1 / (2 tau)")
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
        per_pair = smoothed(lambda m: (m - 1 / (2 * self.tau)).square(), gains.margin, self.label_smoothing)
        return loss_output(per_pair, gains.metrics(query, schedule))
