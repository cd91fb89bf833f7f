"""SPO: step-aware preference optimisation on pairs of denoising steps (arXiv 2406.04314)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid

from lightning_modules.batches import Conditioning, DenoiserQuery, StepPairs
from lightning_modules.errors import ConfigError
from lightning_modules.objectives.base import LossOutput, Objective
from lightning_modules.objectives.pairwise import accuracy, by_quarter, loss_output
from lightning_modules.schedules.base import Schedule, gaussian_log_prob


@dataclass(frozen=True)
class SPO(Objective):
    """L = -log sigmoid(beta (log r_w - log r_l)), r = clamp(p_policy / p_reference, 1 - ratio_clip, 1 + ratio_clip).

    p is the density of the step x_t -> x_{t-1}, DDIM's or that of a flow's rule; log p is averaged over c, h, w, as in
    the official train_spo.py:551-586. Where chosen and rejected share x_t, policy and reference are evaluated there
    once, not twice as in the official step: same loss, same gradient, half the cost.

    Args:
        beta: multiplies the difference of **mean** log-ratios, which the clip keeps within
            log((1 + ratio_clip) / (1 - ratio_clip)): 10 is the official value for SD 1.5 and SDXL.
        ratio_clip: the official eps. A ratio beyond it passes no gradient, so that a pair of which both are clipped
            teaches nothing: watch ``clip_fraction``.
        eta: eta of the DDIM step; the sampler that made the pairs must have used the same, and above 0.
        guidance_scale: guidance of policy and reference alike, with gradient through both branches; the sampler's.
        normalise: whether a step's log-ratios are divided by its ``gain``, before anything else. None leaves it to the
            schedule: a flow's are, for there the gain grows thirtyfold from the first step to the last and no clip fits
            both; Stable Diffusion's are not, as in the paper.

    Logged: ``margin`` (log r_w - log r_l), ``accuracy`` (margin > 0, ties half), ``ratio_chosen`` and
    ``ratio_rejected`` (clipped), ``clip_fraction`` (of the 2 b ratios), ``score_gap`` (the scorer's, not the policy's),
    and ``margin``, ``accuracy`` and ``clip_fraction`` by quarter of the timesteps, NaN where a batch has none.

    Raises:
        ConfigError: a step without a density (eta 0, or a last step with sigma 0), or values out of range.
    """

    beta: float = 10.0
    ratio_clip: float = 0.1
    eta: float = 1.0
    guidance_scale: float = 5.0
    normalise: bool | None = None

    def __post_init__(self) -> None:
        if self.beta <= 0:
            raise ConfigError(f"objective.beta must be above 0, got {self.beta}; SPO uses 10")
        if not 0 < self.ratio_clip < 1:
            raise ConfigError(f"objective.ratio_clip must lie in (0, 1), got {self.ratio_clip}; SPO uses 0.1")
        if not 0 < self.eta <= 1:
            raise ConfigError(
                f"objective.eta must lie in (0, 1], got {self.eta}; a step without noise has no density, SPO uses 1"
            )
        if self.guidance_scale < 1:
            raise ConfigError(f"objective.guidance_scale must be at least 1, got {self.guidance_scale}; SPO uses 5")

    def query(
        self, batch: StepPairs, cond: Conditioning, schedule: Schedule, generators: Sequence[torch.Generator]
    ) -> DenoiserQuery:
        """One row per pair where the pair shares x_t, else two, chosen rows first. Nothing is drawn."""
        if batch.timesteps.device.type == "cpu":  # the sampler of a pool has looked already, and a device would wait
            schedule.require_random_steps(batch.timesteps, batch.next_timesteps)
        if batch.rejected_latents is None:
            return DenoiserQuery(batch.latents, batch.timesteps, cond, self.guidance_scale)
        return DenoiserQuery(
            latents=torch.cat([batch.latents, batch.rejected_latents]),
            timesteps=batch.timesteps.repeat(2),
            cond=Conditioning.cat([cond, cond]),
            guidance_scale=self.guidance_scale,
        )

    def loss(
        self,
        batch: StepPairs,
        query: DenoiserQuery,
        policy_output: Float[Tensor, "n c h w"],
        reference_output: Float[Tensor, "n c h w"] | None,
        schedule: Schedule,
    ) -> LossOutput:
        assert reference_output is not None
        policy = self._log_probs(batch, query, policy_output, schedule)
        reference = self._log_probs(batch, query, reference_output, schedule)
        free = policy - reference
        if schedule.divides_by_gain if self.normalise is None else self.normalise:
            free = free / schedule.gain(batch.timesteps, batch.next_timesteps, self.eta)
        # Clipping r is clipping log r, and stays finite however far the policy has gone.
        low, high = math.log1p(-self.ratio_clip), math.log1p(self.ratio_clip)
        log_ratio = free.clamp(low, high)
        margin = log_ratio[0] - log_ratio[1]
        clipped = ((free < low) | (free > high)).float().mean(dim=0)
        per_pair = {"margin": margin, "accuracy": accuracy(margin), "clip_fraction": clipped}
        metrics = {name: value.mean() for name, value in per_pair.items()} | {
            "ratio_chosen": log_ratio[0].exp().mean(),
            "ratio_rejected": log_ratio[1].exp().mean(),
            "score_gap": batch.score_gap.float().mean(),
        }
        metrics |= by_quarter(per_pair, batch.timesteps, schedule)
        return loss_output(-logsigmoid(self.beta * margin), metrics)

    def _log_probs(
        self, batch: StepPairs, query: DenoiserQuery, output: Float[Tensor, "n c h w"], schedule: Schedule
    ) -> Float[Tensor, "2 b"]:
        """log p of the chosen (row 0) and the rejected x_{t-1} (row 1), fp32."""
        pairs = len(batch)
        ends = batch.next_timesteps.repeat(query.latents.shape[0] // pairs)
        mean, std = schedule.step_distribution(output.float(), query.latents.float(), query.timesteps, ends, self.eta)
        # Of a shared x_t the first and the last rows are the same rows.
        chosen = gaussian_log_prob(batch.chosen.float(), mean[:pairs], std[:pairs])
        rejected = gaussian_log_prob(batch.rejected.float(), mean[-pairs:], std[-pairs:])
        return torch.stack([chosen, rejected])
