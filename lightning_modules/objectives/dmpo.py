"""DMPO: divergence minimisation on pairs of pictures, as Diffusion-SDPO publishes it (arXiv 2511.03317)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid

from lightning_modules.batches import LatentPairs
from lightning_modules.errors import ConfigError
from lightning_modules.objectives.base import LossOutput
from lightning_modules.objectives.pairwise import Gains, NoisedPairs, PairwiseObjective, loss_output
from lightning_modules.schedules.base import Schedule

LEAST_ALPHA = 1e-6


@dataclass(frozen=True)
class DMPO(PairwiseObjective):
    """L = KL(Bernoulli(sigmoid(u)) || Bernoulli(1 - alpha)), u = beta m / 2: a finite goal, approached from both sides.

    m is the margin of ``Gains``. The least loss, 0, is at u = ln((1 - alpha) / alpha), 4.6 for alpha 0.01: pairs beyond
    it are pulled back. At u = 0 the loss is 1.61. Source: AIDC-AI/Diffusion-SDPO train.py:1220-1236.

    Args:
        beta: multiplies the difference of **mean** squared errors, and is halved, as DPO's: 2000 for SD 1.5, 6000 for
            SDXL (Diffusion-SDPO, scripts/train).
        alpha: probability that a label is wrong, 0.01 there. At least 1e-6, to where the official code clamps it.

    Logged: what ``Gains`` logs, and ``reward_margin`` (u).
    """

    beta: float = 2000.0
    alpha: float = 0.01

    def __post_init__(self) -> None:
        if self.beta <= 0:
            raise ConfigError(f"objective.beta must be above 0, got {self.beta}; DMPO uses 2000 to 6000")
        if not LEAST_ALPHA <= self.alpha < 0.5:
            raise ConfigError(f"objective.alpha must lie in [{LEAST_ALPHA}, 0.5), got {self.alpha}; DMPO uses 0.01")

    def loss(
        self,
        batch: LatentPairs,
        query: NoisedPairs,
        policy_output: Float[Tensor, "n c h w"],
        reference_output: Float[Tensor, "n c h w"] | None,
        schedule: Schedule,
    ) -> LossOutput:
        gains = Gains.of(query, policy_output, reference_output)
        u = 0.5 * self.beta * gains.margin
        right, wrong = logsigmoid(u), logsigmoid(-u)
        per_pair = right.exp() * (right - math.log1p(-self.alpha)) + wrong.exp() * (wrong - math.log(self.alpha))
        return loss_output(per_pair, gains.metrics(query, schedule) | {"reward_margin": u.mean()})
