"""Supervised fine-tuning: the diffusion loss itself, on the preferred picture alone."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from lightning_modules.batches import LatentPairs
from lightning_modules.objectives.base import LossOutput
from lightning_modules.objectives.pairwise import NoisedPairs, PairwiseObjective, loss_output
from lightning_modules.schedules.base import Schedule


@dataclass(frozen=True)
class SFT(PairwiseObjective):
    """L = mean |output - target|^2 on the chosen picture, t uniform over all timesteps (arXiv 2006.11239, eq. 14).

    No hyper-parameters, no reference. The baseline of every preference method, and how the embedded pipeline was
    pretrained.
    """

    needs_reference = False
    needs_rejected = False

    def loss(
        self,
        batch: LatentPairs,
        query: NoisedPairs,
        policy_output: Float[Tensor, "n c h w"],
        reference_output: Float[Tensor, "n c h w"] | None,
        schedule: Schedule,
    ) -> LossOutput:
        error = query.errors(policy_output)
        return loss_output(error, {"chosen_error": error.mean()})
