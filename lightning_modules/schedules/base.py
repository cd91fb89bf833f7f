"""What the rest of the framework may ask of a diffusion schedule, whether it counts timesteps or flows through levels.

x_t = signal(t) x_0 + noise(t) n. A timestep is a number: an integer of a table (``NoiseSchedule``), or a level of a
rectified flow; larger is noisier. A sampler's trajectory is a sequence of steps, and a step says where it starts and
where it ends. Everything is fp32; nothing here has state.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float, Real
from torch import Tensor

# Timesteps of a table of betas, or levels of a rectified flow. Of equal timesteps the noise is another.
ScheduleKind = Literal["diffusion", "flow"]


@dataclass(frozen=True)
class Step:
    """One step of a sampler.

    Attributes:
        index: its place in the trajectory, from 0.
        timestep: where it starts.
        next_timestep: where it ends; the schedule's ``clean`` where that is at clean latents.
    """

    index: int
    timestep: int | float
    next_timestep: int | float


class Schedule(ABC):
    """Noising, the network's target, and the sampler's step with its probability.

    Attributes:
        kind: what its timesteps are.
        clean: the timestep at which a trajectory ends, below every other.
        divides_by_gain: whether log-ratios of its steps are divided by ``gain`` unless an objective says otherwise.
    """

    kind: ClassVar[ScheduleKind]
    clean: int | float
    divides_by_gain: bool = False

    @property
    @abstractmethod
    def num_timesteps(self) -> int:
        """T, of which ``progress`` is a fraction."""

    @abstractmethod
    def trajectory(self, steps: int, cells: int | None = None) -> tuple[Step, ...]:
        """The steps of a ``steps``-step sampler, from noise to clean latents.

        Args:
            steps: how many.
            cells: height times width of the latents, for a schedule that depends on it.

        Raises:
            ConfigError: a number of steps that the schedule does not have.
        """

    @abstractmethod
    def draw(self, generators: Sequence[torch.Generator], device: torch.device | str = "cpu") -> Real[Tensor, " n"]:
        """Timesteps to train at; entry i is drawn from generator i alone."""

    @abstractmethod
    def signal_and_noise(self, timesteps: Real[Tensor, " n"]) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
        """The factors of x_0 and of the noise in x_t."""

    @abstractmethod
    def target(
        self, clean: Float[Tensor, "n c h w"], noise: Float[Tensor, "n c h w"], timesteps: Real[Tensor, " n"]
    ) -> Float[Tensor, "n c h w"]:
        """What the network should output at ``add_noise(clean, noise, timesteps)``."""

    @abstractmethod
    def predict_clean(
        self, output: Float[Tensor, "n c h w"], latents: Float[Tensor, "n c h w"], timesteps: Real[Tensor, " n"]
    ) -> tuple[Float[Tensor, "n c h w"], Float[Tensor, "n c h w"]]:
        """The x0-prediction and the noise that a raw network output at (``latents``, ``timesteps``) stands for."""

    @abstractmethod
    def step_std(
        self, timesteps: Real[Tensor, " n"], next_timesteps: Real[Tensor, " n"], eta: float
    ) -> Float[Tensor, " n"]:
        """Standard deviation of each step; 0 where it is certain whatever ``eta``."""

    @abstractmethod
    def step_distribution(
        self,
        output: Float[Tensor, "n c h w"],
        latents: Float[Tensor, "n c h w"],
        timesteps: Real[Tensor, " n"],
        next_timesteps: Real[Tensor, " n"],
        eta: float,
    ) -> tuple[Float[Tensor, "n c h w"], Float[Tensor, " n"]]:
        """Mean and standard deviation of p(x_next | x_t)."""

    def random_steps(self, trajectory: tuple[Step, ...]) -> int:
        """How many of a trajectory's first steps have a density; what follows is certain and compares nothing.

        Raises:
            ConfigError: a step is certain that should not be.
        """
        starts = torch.tensor([step.timestep for step in trajectory])
        self.require_random_steps(starts, torch.tensor([step.next_timestep for step in trajectory]))
        return len(trajectory)

    def gain(
        self, timesteps: Real[Tensor, " n"], next_timesteps: Real[Tensor, " n"], eta: float
    ) -> Float[Tensor, " n"]:
        """|d mean / d output| / std of each step: how much its log-ratio feels the network.

        On Stable Diffusion's 20 steps it is 0.6 to 1.1, but 5.4 in the last but one; on a flow's ten it goes from 0.04
        to 1.2.
        """
        none = torch.zeros(len(timesteps), 1, 1, 1, device=timesteps.device)
        at_one, std = self.step_distribution(none + 1, none, timesteps, next_timesteps, eta)
        at_zero, _ = self.step_distribution(none, none, timesteps, next_timesteps, eta)  # the mean is linear
        return (at_one - at_zero).abs().flatten() / std

    @abstractmethod
    def require_random_steps(self, timesteps: Real[Tensor, " n"], next_timesteps: Real[Tensor, " n"]) -> None:
        """
        Raises:
            ConfigError: one of the steps is certain, so that it has no density and candidates would not differ.
        """

    def progress(self, timesteps: Real[Tensor, " n"]) -> Float[Tensor, " n"]:
        """How far from clean, in [0, 1]."""
        return timesteps.float() / self.num_timesteps

    def add_noise(
        self, clean: Float[Tensor, "n c h w"], noise: Float[Tensor, "n c h w"], timesteps: Real[Tensor, " n"]
    ) -> Float[Tensor, "n c h w"]:
        """x_t = signal(t) clean + noise(t) noise."""
        signal, strength = self.signal_and_noise(timesteps)
        return per_sample(signal) * clean + per_sample(strength) * noise

    def step(
        self,
        output: Float[Tensor, "n c h w"],
        latents: Float[Tensor, "n c h w"],
        timesteps: Real[Tensor, " n"],
        next_timesteps: Real[Tensor, " n"],
        eta: float,
        noise: Float[Tensor, "n c h w"] | None = None,
    ) -> Float[Tensor, "n c h w"]:
        """One step to x_next; ``noise`` is read only where eta > 0."""
        mean, std = self.step_distribution(output, latents, timesteps, next_timesteps, eta)
        if eta == 0.0:
            return mean
        if noise is None:
            raise ValueError(f"a step with eta {eta} draws noise, and none was given")
        return mean + per_sample(std) * noise


def gaussian_log_prob(
    value: Float[Tensor, "n c h w"], mean: Float[Tensor, "n c h w"], std: Float[Tensor, " n"]
) -> Float[Tensor, " n"]:
    """log N(value; mean, std^2), **averaged** over c, h, w (not summed), as SPO's official code does.

    Source: arXiv 2406.04314, official ddim_with_logprob.py:119-127. With std = 0 there is no density: the result
    is not finite, and callers refuse that case.
    """
    scale = per_sample(std)
    log_density = -((value - mean) ** 2) / (2 * scale**2) - scale.log() - 0.5 * math.log(2 * math.pi)
    return log_density.mean(dim=(1, 2, 3))


def per_sample(values: Float[Tensor, " n"]) -> Float[Tensor, "n 1 1 1"]:
    """One number per sample, as a factor of latents."""
    return values.reshape(-1, 1, 1, 1)
