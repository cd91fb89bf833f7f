"""DSPO: direct score preference optimisation (ICLR 2025, openreview xyfb9HHvMe), as published for SD 1.5."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_modules.batches import LatentPairs
from lightning_modules.errors import ConfigError
from lightning_modules.objectives.base import LossOutput
from lightning_modules.objectives.pairwise import Gains, NoisedPairs, PairwiseObjective, loss_output
from lightning_modules.schedules.base import Schedule


@dataclass(frozen=True)
class DSPO(PairwiseObjective):
    """L = mean ((o - target) - beta (1 - sigmoid(u)) (o - o_ref))^2, o the output on the chosen picture.

    u = beta m / 2, m the margin of ``Gains``; the mean goes over pairs and c, h, w, the gradient through the sigmoid,
    too. Source: huaishengzhu/DSPO train.py:1141-1162, the branch for SD 1.5; the code's other formula, for SDXL, is not
    this one and is left out.

    **At the default beta this is SFT on the chosen picture.** u stays below 1e-5, so that the bend is 0.0005 times
    (o - o_ref), and the rejected picture's gradient 1e-9 of the chosen one's (on the known answer's outputs).

    Args:
        beta: multiplies both the margin of **mean** squared errors (halved) and the bend. 0.001 is the official value,
            searched among 0.001, 0.01 and 0.05.

    Logged: what ``Gains`` logs, and ``reward_margin`` (u).
    """

    beta: float = 0.001

    def __post_init__(self) -> None:
        if self.beta <= 0:
            raise ConfigError(f"objective.beta must be above 0, got {self.beta}; DSPO uses 0.001, and is SFT there")

    def loss(
        self,
        batch: LatentPairs,
        query: NoisedPairs,
        policy_output: Float[Tensor, "n c h w"],
        reference_output: Float[Tensor, "n c h w"] | None,
        schedule: Schedule,
    ) -> LossOutput:
        gains = Gains.of(query, policy_output, reference_output)
        assert reference_output is not None
        output, reference, target = (rows.chunk(2)[0] for rows in (policy_output, reference_output, query.target))
        u = 0.5 * self.beta * gains.margin
        bend = self.beta * torch.sigmoid(-u).reshape(-1, 1, 1, 1) * (output - reference)
        per_pair = (output - target - bend).square().mean(dim=(1, 2, 3))
        return loss_output(per_pair, gains.metrics(query, schedule) | {"reward_margin": u.mean()})
