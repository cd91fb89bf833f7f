"""Diffusion-KTO: single pictures, each liked or not, instead of pairs (arXiv 2404.04465)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor, distributed

from lightning_modules.batches import Conditioning, LabelledLatents
from lightning_modules.errors import ConfigError
from lightning_modules.objectives.base import LossOutput, Objective
from lightning_modules.objectives.pairwise import NoisedPairs, accuracy, by_quarter, loss_output, noised
from lightning_modules.schedules.base import Schedule


@dataclass(frozen=True)
class KTO(Objective):
    """L = mean w (1 - sigmoid(y beta (g - z))), g = e_reference - e_policy, y = 1 for a liked picture, else -1.

    z = max(0, mean of g over the batch of all ranks), liked and unliked together and without gradient: what counts is
    how much better a picture has become than the batch's have. So the loss depends on how many pictures a batch of all
    ranks has, and with accumulation on more than the step's number. Source: equation 8; jacklishufan/diffusion-kto
    train_kto_sd_v1.5.py:1371-1521, of its losses the sigmoid with one baseline.

    Args:
        beta: multiplies g, of **mean** squared errors and not halved: 1000 there. DPO's 2000 has the same slope at 0.
        liked_weight, unliked_weight: w of either kind, 1 there.

    Logged: ``baseline`` (z), ``gain_liked`` and ``gain_unliked`` (mean g - z of either kind, NaN where a batch has
    none), ``liked`` (their share), ``error`` (e_policy), and ``accuracy`` (y (g - z) > 0, ties half), also by quarter
    of the timesteps.
    """

    beta: float = 1000.0
    liked_weight: float = 1.0
    unliked_weight: float = 1.0

    single_pictures = True

    def __post_init__(self) -> None:
        for name in ("beta", "liked_weight", "unliked_weight"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"objective.{name} must be above 0, got {getattr(self, name)}; KTO uses 1000, 1, 1")

    def query(
        self, batch: LabelledLatents, cond: Conditioning, schedule: Schedule, generators: Sequence[torch.Generator]
    ) -> NoisedPairs:
        """At each picture, with a timestep and a noise of its own."""
        return noised([batch.latents], [cond.with_time_ids(batch.time_ids)], schedule, generators)

    def loss(
        self,
        batch: LabelledLatents,
        query: NoisedPairs,
        policy_output: Float[Tensor, "n c h w"],
        reference_output: Float[Tensor, "n c h w"] | None,
        schedule: Schedule,
    ) -> LossOutput:
        assert reference_output is not None
        error, liked = query.errors(policy_output), batch.liked
        gain = query.errors(reference_output) - error
        baseline = mean_over_ranks(gain.detach()).clamp(min=0)
        beyond = gain - baseline
        ahead = beyond.where(liked, -beyond)
        weight = torch.where(liked, self.liked_weight, self.unliked_weight)
        right = {"accuracy": accuracy(ahead)}
        metrics = {
            "baseline": baseline,
            "gain_liked": _mean_of(beyond, liked),
            "gain_unliked": _mean_of(beyond, ~liked),
            "liked": liked.float().mean(),
            "error": error.mean(),
            "accuracy": right["accuracy"].mean(),
        }
        metrics |= by_quarter(right, query.timesteps, schedule)
        return loss_output(weight * torch.sigmoid(-self.beta * ahead), metrics)


def mean_over_ranks(values: Float[Tensor, " b"]) -> Float[Tensor, ""]:
    """The mean over all processes' values, however many each has; every process must ask."""
    total = torch.stack([values.sum(), values.new_tensor(float(len(values)))])
    if distributed.is_available() and distributed.is_initialized():
        distributed.all_reduce(total)
    return total[0] / total[1]


def _mean_of(values: Float[Tensor, " b"], which: Bool[Tensor, " b"]) -> Float[Tensor, ""]:
    """NaN where there is none; picking rows out would wait for the device."""
    return values.where(which, 0.0).sum() / which.sum()
