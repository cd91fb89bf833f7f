"""Supervised fine-tuning: the diffusion loss itself, on the preferred picture alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_modules.batches import Conditioning, DenoiserQuery, LatentPairs
from lightning_modules.objectives.base import LossOutput, Objective
from lightning_modules.randomness import randint, randn
from lightning_modules.schedules.discrete import NoiseSchedule


@dataclass(frozen=True, kw_only=True)
class SFTQuery(DenoiserQuery):
    """A query with what the network should answer."""

    target: Float[Tensor, "n c h w"]


@dataclass(frozen=True)
class SFT(Objective):
    """L = mean |output - target|^2 on the chosen picture, t uniform over all timesteps (arXiv 2006.11239, eq. 14).

    No hyper-parameters, no reference. The baseline of every preference method, and how the embedded pipeline was
    pretrained.
    """

    needs_reference = False
    needs_rejected = False

    def query(
        self, batch: LatentPairs, cond: Conditioning, schedule: NoiseSchedule, generators: Sequence[torch.Generator]
    ) -> SFTQuery:
        clean = batch.chosen
        timesteps = randint(schedule.num_timesteps, generators, clean.device)
        noise = randn(clean.shape[1:], generators, clean.device)
        return SFTQuery(
            latents=schedule.add_noise(clean, noise, timesteps),
            timesteps=timesteps,
            cond=cond.with_time_ids(batch.chosen_time_ids),
            target=schedule.target(clean, noise, timesteps),
        )

    def loss(
        self,
        batch: LatentPairs,
        query: SFTQuery,
        policy_output: Float[Tensor, "n c h w"],
        reference_output: Float[Tensor, "n c h w"] | None,
        schedule: NoiseSchedule,
    ) -> LossOutput:
        error = (policy_output - query.target).square().mean(dim=(1, 2, 3))
        return LossOutput(error.mean(), {"chosen_error": error.detach().mean()})
