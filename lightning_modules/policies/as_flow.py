"""Stable Diffusion as a rectified flow: a noise predictor is a velocity network in other coordinates."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_modules.batches import Conditioning
from lightning_modules.errors import ConfigError
from lightning_modules.policies.adaptation import Adaptation
from lightning_modules.policies.stable_diffusion import StableDiffusion
from lightning_modules.schedules.base import Schedule, per_sample
from lightning_modules.schedules.discrete import NoiseSchedule
from lightning_modules.schedules.flow import FlowSchedule, in_fp64
from lightning_modules.schedules.level_draws import LevelDraw, LogitNormal
from lightning_modules.schedules.step_rules import Ancestral, StepRule
from lightning_modules.weights.pretrained import Pretrained


class StableDiffusionAsFlow(StableDiffusion):
    """Trains and samples a Stable Diffusion of noise prediction as a flow; further arguments as ``StableDiffusion``'s.

    For trying flow objectives and samplers without a flow's weights: what it exports is a Stable Diffusion as before.

    At level s the ratio of noise to signal is r = s / (1 - s), which the table of betas has at a timestep between two
    rows (log r is interpolated). The network sees x scaled to variance-preserving coordinates at that timestep and
    gives the noise e; x_0 = x / (1 - s) - r e, and the velocity is (x - x_0) / s. Above the table's largest r
    (s = 0.936 for Stable Diffusion's) it sees x shrunk to that level, so that sampling starts at pure noise, s = 1.
    Below the smallest it is told t = 0.

    Args:
        pretrained: the pipeline of a noise predictor.
        adaptation: what trains.
        shift: of the levels, in sampling and in training.
        levels, step_rule: as ``FlowTransformer``'s.

    Raises:
        ConfigError: a base model that predicts something else than noise.
    """

    alphas_cumprod: Tensor

    def __init__(
        self,
        pretrained: str,
        adaptation: Adaptation,
        shift: float = 1.0,
        levels: LevelDraw | None = None,
        step_rule: StepRule | None = None,
        **options: Any,
    ) -> None:
        if shift <= 0:
            raise ConfigError(f"model.policy.shift must be above 0, got {shift}; 1 leaves the levels even")
        self.shift, self._levels, self._step_rule = shift, levels, step_rule
        super().__init__(pretrained, adaptation, **options)

    def _load_schedule(self, pipeline: Pretrained) -> Schedule:
        learned = super()._load_schedule(pipeline)
        assert isinstance(learned, NoiseSchedule)
        if learned.prediction_type != "epsilon":
            raise ConfigError(
                f"StableDiffusionAsFlow: the base predicts {learned.prediction_type}; give one that predicts noise"
            )
        self.register_buffer("alphas_cumprod", learned.alphas_cumprod, persistent=False)
        return FlowSchedule(
            self.shift,
            own_levels=True,
            levels=LogitNormal() if self._levels is None else self._levels,
            rule=Ancestral() if self._step_rule is None else self._step_rule,
        )

    def _denoise(
        self, network: Any, latents: Float[Tensor, "n c h w"], timesteps: Tensor, cond: Conditioning
    ) -> Float[Tensor, "n c h w"]:
        level = in_fp64(timesteps) / self.schedule.num_timesteps
        table = _ratios(self.alphas_cumprod)
        highest = table[-1] / (1 + table[-1])
        seen = level.clamp(max=highest)  # the level that the network is told
        ratio = seen / (1 - seen)
        position = _position(table.log(), ratio.log())
        signal = torch.rsqrt(1 + ratio.clamp(min=table[0]) ** 2)  # sqrt(a) there

        def factor(values: Float[Tensor, " n"]) -> Float[Tensor, "n 1 1 1"]:
            return per_sample(values.float().to(latents.device))

        shrunk = latents * factor(highest / level.clamp(min=highest))
        told = position.float().to(latents.device)
        noise = super()._denoise(network, shrunk * factor(signal / (1 - seen)), told, cond)
        clean = shrunk * factor(1 / (1 - seen)) - factor(ratio) * noise
        above = (latents - clean) / factor(level.clamp(min=highest))
        known = (level <= highest).reshape(-1, 1, 1, 1).to(latents.device)
        return torch.where(known, noise - clean, above)  # equal but for what was shrunk


def _ratios(alphas_cumprod: Float[Tensor, " T"]) -> Float[Tensor, " T"]:
    """Noise to signal at every row, fp64."""
    a = in_fp64(alphas_cumprod)
    return ((1 - a) / a).sqrt()


def _position(table: Float[Tensor, " T"], values: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """Where between the rows of a rising table each value lies; at an end where it lies beyond."""
    after = torch.searchsorted(table, values).clamp(1, len(table) - 1)
    share = (values - table[after - 1]) / (table[after] - table[after - 1])
    return (after - 1 + share).clamp(0, len(table) - 1)
