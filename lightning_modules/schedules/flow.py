"""The schedule of a rectified flow: SD3's, SD3.5's and FLUX's.

s is the noise level, 1 for pure noise and 0 for the picture; a timestep is T s, T = 1000, in fp32.
x_s = (1 - s) x_0 + s n, without square roots. Networks give the velocity v = n - x_0, from picture to noise.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal

import torch
from jaxtyping import Float, Real
from torch import Tensor

from lightning_modules.errors import ConfigError
from lightning_modules.schedules.base import Schedule, Step, per_sample
from lightning_modules.schedules.level_draws import LevelDraw, LogitNormal
from lightning_modules.schedules.step_rules import Ancestral, StepRule

CELLS_PER_TOKEN = 4  # latent cells that a transformer of patch size 2 reads as one token


@dataclass(frozen=True)
class DynamicShift:
    """A shift that grows with the picture: mu is linear in the number of its tokens, also beyond both ends.

    Attributes:
        base_shift, max_shift: mu at ``base_tokens`` and at ``max_tokens``.
        kind: the factor is e^mu, or mu itself.
    """

    base_shift: float = 0.5
    max_shift: float = 1.15
    base_tokens: int = 256
    max_tokens: int = 4096
    kind: Literal["exponential", "linear"] = "exponential"

    def factor(self, cells: int) -> float:
        """k of ``shifted`` for latents of that many cells."""
        slope = (self.max_shift - self.base_shift) / (self.max_tokens - self.base_tokens)
        mu = self.base_shift + slope * (cells // CELLS_PER_TOKEN - self.base_tokens)
        return math.exp(mu) if self.kind == "exponential" else mu


@dataclass(frozen=True)
class FlowSchedule(Schedule):
    """Levels of a flow model and its steps.

    Training levels are rows of a table, i/T for i = T ... 1, shifted where the shift is a fixed one.

    Attributes:
        shift: k of s -> k s / (1 + (k - 1) s); or one that depends on the size of the picture, which then shifts
            sampling alone.
        own_levels: whether a sampler's N levels lie evenly from 1 to 1/N before the shift (the pipelines of FLUX,
            Qwen-Image, Z-Image), or from 1 to the **shifted** end of the table (SD3's): there the last level is shifted
            twice, whatever N is (0.0089 at shift 3), and the step to it is a long one.
        terminal: the last level above 0, to which all are stretched; None leaves them.
        levels: which rows training draws.
        rule: how much noise a step draws.
        num_timesteps: T.
    """

    kind = "flow"
    clean = 0.0
    divides_by_gain = True

    shift: float | DynamicShift = 1.0
    own_levels: bool = False
    terminal: float | None = None
    levels: LevelDraw = field(default_factory=LogitNormal)
    rule: StepRule = field(default_factory=Ancestral)
    num_timesteps: int = 1000

    @staticmethod
    def from_scheduler_config(
        config: Mapping[str, Any], own_levels: bool, levels: LevelDraw | None = None, rule: StepRule | None = None
    ) -> FlowSchedule:
        """The schedule of a diffusers ``FlowMatchEulerDiscreteScheduler``.

        Args:
            config: its ``scheduler_config.json``; missing keys have diffusers' defaults.
            own_levels, levels, rule: see the attributes; no part of that file.

        Raises:
            ConfigError: another scheduler, or spacings that are not supported.
        """
        if config.get("_class_name") != "FlowMatchEulerDiscreteScheduler":
            raise ConfigError(
                f"scheduler config: {config.get('_class_name')} is no rectified flow's; give a base model such as "
                "Stable Diffusion 3.5 or FLUX.1, whose scheduler is a FlowMatchEulerDiscreteScheduler"
            )
        for name in ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "invert_sigmas",
                     "stochastic_sampling"):  # fmt: skip
            if config.get(name):
                raise ConfigError(
                    f'scheduler config: {name} is not supported; write "{name}": false into scheduler_config.json'
                )
        shift: float | DynamicShift = float(config.get("shift", 1.0))
        if config.get("use_dynamic_shifting"):
            shift = DynamicShift(
                config.get("base_shift", 0.5),
                config.get("max_shift", 1.15),
                config.get("base_image_seq_len", 256),
                config.get("max_image_seq_len", 4096),
                config.get("time_shift_type", "exponential"),
            )
        return FlowSchedule(
            shift,
            own_levels,
            config.get("shift_terminal") or None,
            LogitNormal() if levels is None else levels,
            Ancestral() if rule is None else rule,
            config.get("num_train_timesteps", 1000),
        )

    def trajectory(self, steps: int, cells: int | None = None) -> tuple[Step, ...]:
        """Equal to diffusers' ``set_timesteps`` as the model's pipeline calls it; the last step ends at s = 0."""
        if steps < 1:
            raise ConfigError(f"sampling steps: want 1 or more, got {steps}; raise the sampler's `steps`")
        if isinstance(self.shift, DynamicShift):
            if cells is None:
                raise ValueError("a dynamic shift depends on the size of the latents, and no cells were given")
            factor, end = self.shift.factor(cells), 1 / self.num_timesteps
        else:
            factor, end = self.shift, float(shifted(torch.tensor(1 / self.num_timesteps).double(), self.shift))
        levels = shifted(torch.linspace(1, 1 / steps if self.own_levels else end, steps, dtype=torch.float64), factor)
        if self.terminal is not None:
            levels = 1 - (1 - levels) * (1 - self.terminal) / (1 - levels[-1])
        times = [*(self.num_timesteps * levels).float().tolist(), self.clean]
        return tuple(Step(i, start, end) for i, (start, end) in enumerate(pairwise(times)))

    def draw(self, generators: Sequence[torch.Generator], device: torch.device | str = "cpu") -> Float[Tensor, " n"]:
        """Rows of the table, as ``levels`` says."""
        return self.at(self.levels.shares(generators)).to(device)

    def at(self, shares: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
        """The timestep in row int(T u) of the table, whose first row is s = 1; a u that rounds to 1 is the last row."""
        rows = (shares * self.num_timesteps).long().clamp(max=self.num_timesteps - 1)
        levels = 1 - rows.double() / self.num_timesteps
        factor = 1.0 if isinstance(self.shift, DynamicShift) else self.shift
        return (self.num_timesteps * shifted(levels, factor)).float()

    def signal_and_noise(self, timesteps: Real[Tensor, " n"]) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
        """1 - s and s."""
        level = self._level(timesteps)
        return (1 - level).float().to(timesteps.device), level.float().to(timesteps.device)

    def target(
        self, clean: Float[Tensor, "n c h w"], noise: Float[Tensor, "n c h w"], timesteps: Real[Tensor, " n"]
    ) -> Float[Tensor, "n c h w"]:
        """v = n - x_0, at every level."""
        return noise - clean

    def predict_clean(
        self, output: Float[Tensor, "n c h w"], latents: Float[Tensor, "n c h w"], timesteps: Real[Tensor, " n"]
    ) -> tuple[Float[Tensor, "n c h w"], Float[Tensor, "n c h w"]]:
        """x_0 = x - s v and n = x + (1 - s) v."""
        signal, noise = self.signal_and_noise(timesteps)
        return latents - per_sample(noise) * output, latents + per_sample(signal) * output

    def step_std(
        self, timesteps: Real[Tensor, " n"], next_timesteps: Real[Tensor, " n"], eta: float
    ) -> Float[Tensor, " n"]:
        """As ``rule`` says."""
        return self.rule.std(self._level(timesteps), self._level(next_timesteps), eta).float().to(timesteps.device)

    def step_distribution(
        self,
        output: Float[Tensor, "n c h w"],
        latents: Float[Tensor, "n c h w"],
        timesteps: Real[Tensor, " n"],
        next_timesteps: Real[Tensor, " n"],
        eta: float,
    ) -> tuple[Float[Tensor, "n c h w"], Float[Tensor, " n"]]:
        """(1 - s') x_0(s) + k n(s), with k and d as ``rule`` says; Euler's step at eta 0."""
        level, next_level = self._level(timesteps), self._level(next_timesteps)
        std = self.rule.std(level, next_level, eta)
        factor = self.rule.noise_factor(level, next_level, std)
        signal, factor, std = (number.float().to(timesteps.device) for number in (1 - next_level, factor, std))
        clean, noise = self.predict_clean(output, latents, timesteps)
        return per_sample(signal) * clean + per_sample(factor) * noise, std

    def random_steps(self, trajectory: tuple[Step, ...]) -> int:
        """The last step ends at the picture and is certain with every rule that preserves coefficients."""
        starts = torch.tensor([step.timestep for step in trajectory])
        std = self.step_std(starts, torch.tensor([step.next_timestep for step in trajectory]), eta=1.0)
        certain = (std == 0).nonzero().flatten().tolist()
        return certain[0] if certain else len(trajectory)

    def require_random_steps(self, timesteps: Real[Tensor, " n"], next_timesteps: Real[Tensor, " n"]) -> None:
        certain = self.step_std(timesteps, next_timesteps, eta=1.0) == 0
        if bool(certain.any()):
            raise ConfigError(
                f"SPO: the step from t = {float(timesteps[certain][0]):.4g} to {float(next_timesteps[certain][0]):.4g} "
                "is certain and has no density; train on pairs of the steps before it, as StepSampler makes them"
            )

    def _level(self, timesteps: Real[Tensor, " n"]) -> Float[Tensor, " n"]:
        """s, ``in_fp64``."""
        return in_fp64(timesteps) / self.num_timesteps


def in_fp64(values: Real[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """The same, on the CPU where the device has no such numbers (Apple's); elsewhere that would wait for the device."""
    return (values.cpu() if values.device.type == "mps" else values).double()


def shifted(levels: Float[Tensor, "*n"], factor: float) -> Float[Tensor, "*n"]:
    """k s / (1 + (k - 1) s): k above 1 moves levels towards noise."""
    return factor * levels / (1 + (factor - 1) * levels)
