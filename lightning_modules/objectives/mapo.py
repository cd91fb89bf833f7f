"""MaPO: margin-aware preference optimisation without a reference (arXiv 2406.06424)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid

from lightning_modules.batches import LatentPairs
from lightning_modules.errors import ConfigError
from lightning_modules.objectives.base import LossOutput
from lightning_modules.objectives.pairwise import NoisedPairs, PairwiseObjective, accuracy, by_quarter, loss_output
from lightning_modules.schedules.base import Schedule


@dataclass(frozen=True)
class MaPO(PairwiseObjective):
    """L = mean e(w) - beta log sigmoid(T (f(c e(w)) - f(c e(l)))), f(x) = x / (e^x - 1), T the number of timesteps.

    Learns the chosen picture and keeps it ahead of the rejected one; no reference, no second network. f falls from 1,
    so a smaller error is a higher score. Source: mapo-t2i/mapo utils.py:286-301, which writes f without ``expm1``: in
    fp32 that is off by 0.012 in the argument of the sigmoid at an error of 0.01.

    Args:
        beta: multiplies the margin's term, outside of the logarithm: 0.1 in the official README, for SDXL.
        scale: c of f, ``snr_value`` there, 0.5.

    Logged: ``chosen_error``, ``rejected_error``, ``margin`` (the argument of the sigmoid) and ``accuracy`` (margin > 0,
    ties half), these two also by quarter of the timesteps.
    """

    beta: float = 0.1
    scale: float = 0.5

    needs_reference = False

    def __post_init__(self) -> None:
        for name, value, official in (("beta", self.beta, 0.1), ("scale", self.scale, 0.5)):
            if value <= 0:
                raise ConfigError(f"objective.{name} must be above 0, got {value}; MaPO uses {official}")

    def loss(
        self,
        batch: LatentPairs,
        query: NoisedPairs,
        policy_output: Float[Tensor, "n c h w"],
        reference_output: Float[Tensor, "n c h w"] | None,
        schedule: Schedule,
    ) -> LossOutput:
        chosen, rejected = query.errors(policy_output).chunk(2)
        margin = schedule.num_timesteps * (_score(self.scale * chosen) - _score(self.scale * rejected))
        per_pair = {"margin": margin, "accuracy": accuracy(margin)}
        metrics = {name: value.mean() for name, value in per_pair.items()}
        metrics |= {"chosen_error": chosen.mean(), "rejected_error": rejected.mean()}
        metrics |= by_quarter(per_pair, query.timesteps.chunk(2)[0], schedule)
        return loss_output(chosen - self.beta * logsigmoid(margin), metrics)


def _score(x: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
    """x / (e^x - 1), which is 1 at 0."""
    inside = x.where(x > 0, 1.0)
    return torch.where(x > 0, inside / torch.expm1(inside), 1 - x / 2)
