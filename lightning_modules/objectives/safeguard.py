"""SDPO's safeguard: the rejected picture's gradient is held back before it harms the chosen one (arXiv 2511.03317)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_modules.batches import LatentPairs
from lightning_modules.errors import ConfigError
from lightning_modules.objectives.around import AroundObjective
from lightning_modules.objectives.base import LossOutput
from lightning_modules.objectives.pairwise import NoisedPairs, PairwiseObjective
from lightning_modules.schedules.base import Schedule


@dataclass(frozen=True)
class Safeguard(AroundObjective):
    """``objective``'s loss, whose gradient through the rejected picture is multiplied by lambda; its value stays.

    With d = output - target, lambda = clamp((1 - mu) |d_w|^2 / <d_w, d_l>, 0, 1), and 1 where <d_w, d_l> <= 0: then the
    rejected picture's gradient does not raise the chosen one's error (in first order, for gradients in the outputs).
    Source: AIDC-AI/Diffusion-SDPO train.py:84-129, 1187-1193, without the 1e-9 that it adds to the denominator, which
    makes lambda 0.04 to 0.3% smaller at the sizes of SD 1.5 and SDXL.

    Args:
        objective: DPO, DMPO or DSPO, or another on pairs with a reference. In DSPO it acts through the sigmoid alone,
            so that at beta 0.001 it does nothing.
        mu: how much is held back. Official: 0.9 (SD 1.5: DPO with beta 5000, DMPO), 0.2 (SD 1.5: DSPO), 0.6 (SDXL).
        per: what shares a lambda. "batch", as published, is the batch of one device, so that the batch size, the number
            of devices and accumulation change it; "pair" bounds each pair, and none of them does.

    Logged: what ``objective`` logs, and ``safeguard`` (lambda).
    """

    objective: PairwiseObjective
    mu: float = 0.9
    per: Literal["batch", "pair"] = "batch"

    def __post_init__(self) -> None:
        self.check_objective()
        if not 0 <= self.mu <= 1:
            raise ConfigError(f"objective.mu must lie in [0, 1], got {self.mu}; Diffusion-SDPO uses 0.2 to 0.9")

    def loss(
        self,
        batch: LatentPairs,
        query: NoisedPairs,
        policy_output: Float[Tensor, "n c h w"],
        reference_output: Float[Tensor, "n c h w"] | None,
        schedule: Schedule,
    ) -> LossOutput:
        share = self.shares((policy_output - query.target).detach())
        chosen, rejected = policy_output.chunk(2)
        held = rejected.detach() + share.reshape(-1, 1, 1, 1) * (rejected - rejected.detach())
        output = self.objective.loss(batch, query, torch.cat([chosen, held]), reference_output, schedule)
        return LossOutput(output.loss, output.metrics | {"safeguard": share.mean()})

    def shares(self, residuals: Float[Tensor, "n c h w"]) -> Float[Tensor, " b"]:
        """lambda of each pair, from the network's output less its target."""
        chosen, rejected = residuals.flatten(1).chunk(2)
        size, inner = chosen.square().sum(dim=1), (chosen * rejected).sum(dim=1)
        if self.per == "batch":
            size, inner = size.sum().expand_as(size), inner.sum().expand_as(inner)
        allowed = ((1 - self.mu) * size / inner.where(inner > 0, 1.0)).clamp(max=1.0)
        return allowed.where(inner > 0, 1.0)
