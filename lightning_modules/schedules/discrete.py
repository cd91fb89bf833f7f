"""The diffusion schedule: noising, the network's target, and the DDIM step with its probability.

Notation of this file, after DDIM (arXiv 2010.02502): ``a_t`` is the cumulative product that DDIM calls alpha_t and
DDPM alpha-bar_t; x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) noise. Everything is fp32; nothing here has state, and each
step names both its timesteps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, cast, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lightning_modules.errors import ConfigError

PredictionType = Literal["epsilon", "v_prediction", "sample"]
Spacing = Literal["leading", "trailing", "linspace"]


@dataclass(frozen=True)
class NoiseSchedule:
    """A discrete noise schedule of T steps.

    Attributes:
        alphas_cumprod: a_t for t = 0 .. T - 1, fp32.
        final_alpha_cumprod: a of the step before t = 0: a_0 (Stable Diffusion, ``set_alpha_to_one=False``) or 1.
        prediction_type: what the network's raw output means.
        spacing, steps_offset: how ``inference_timesteps`` picks its timesteps, as in diffusers.
    """

    alphas_cumprod: Float[Tensor, " T"]
    final_alpha_cumprod: float
    prediction_type: PredictionType = "epsilon"
    spacing: Spacing = "leading"
    steps_offset: int = 1

    @property
    def num_timesteps(self) -> int:
        """T."""
        return self.alphas_cumprod.shape[0]

    @staticmethod
    def from_scheduler_config(config: Mapping[str, Any]) -> NoiseSchedule:
        """The schedule of a diffusers ``scheduler_config.json``, whichever sampler it names.

        Keys that a sampler does not write keep diffusers' ``DDIMScheduler`` defaults, except
        ``set_alpha_to_one``, which is False: Stable Diffusion's own value.

        Raises:
            ConfigError: a beta schedule, prediction type or spacing that is none of the known ones.
        """
        alphas_cumprod = torch.cumprod(1.0 - _betas(config), dim=0)
        prediction_type = config.get("prediction_type", "epsilon")
        spacing = config.get("timestep_spacing", "leading")
        _require("prediction_type", prediction_type, get_args(PredictionType))
        _require("timestep_spacing", spacing, get_args(Spacing))
        final = 1.0 if config.get("set_alpha_to_one", False) else alphas_cumprod[0].item()
        return NoiseSchedule(
            alphas_cumprod,
            final,
            cast(PredictionType, prediction_type),
            cast(Spacing, spacing),
            config.get("steps_offset", 0),
        )

    def inference_timesteps(self, steps: int) -> tuple[Int[Tensor, " steps"], Int[Tensor, " steps"]]:
        """Timesteps of a ``steps``-step sampler, falling, and the timesteps each step arrives at.

        The last arrival is negative where the last step ends at clean latents (``final_alpha_cumprod``).
        Equal to diffusers' ``DDIMScheduler.set_timesteps`` for each spacing.
        """
        total = self.num_timesteps
        if not 0 < steps <= total:
            raise ConfigError(f"sampling steps: want 1 to {total}, got {steps}; lower the sampler's `steps`")
        if self.spacing == "leading":
            timesteps = torch.arange(steps - 1, -1, -1) * (total // steps) + self.steps_offset
        elif self.spacing == "trailing":
            timesteps = (total - torch.arange(steps, dtype=torch.float64) * (total / steps)).round().long() - 1
        else:
            timesteps = torch.linspace(0, total - 1, steps, dtype=torch.float64).round().long().flip(0)
        return timesteps, timesteps - total // steps

    def alpha_cumprod(self, timesteps: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
        """a_t a sample; ``final_alpha_cumprod`` where t < 0."""
        known = self.alphas_cumprod.to(timesteps.device)[timesteps.clamp(min=0)]
        return torch.where(timesteps < 0, torch.full_like(known, self.final_alpha_cumprod), known)

    def add_noise(
        self, clean: Float[Tensor, "n c h w"], noise: Float[Tensor, "n c h w"], timesteps: Int[Tensor, " n"]
    ) -> Float[Tensor, "n c h w"]:
        """x_t = sqrt(a_t) clean + sqrt(1 - a_t) noise."""
        a = _spread(self.alpha_cumprod(timesteps))
        return a.sqrt() * clean + (1 - a).sqrt() * noise

    def target(
        self, clean: Float[Tensor, "n c h w"], noise: Float[Tensor, "n c h w"], timesteps: Int[Tensor, " n"]
    ) -> Float[Tensor, "n c h w"]:
        """What the network should output at ``add_noise(clean, noise, timesteps)``.

        The noise; or the velocity sqrt(a_t) noise - sqrt(1 - a_t) clean (arXiv 2202.00512, appendix D); or the
        clean latents.
        """
        if self.prediction_type == "epsilon":
            return noise
        if self.prediction_type == "sample":
            return clean
        a = _spread(self.alpha_cumprod(timesteps))
        return a.sqrt() * noise - (1 - a).sqrt() * clean

    def predict_clean(
        self, output: Float[Tensor, "n c h w"], latents: Float[Tensor, "n c h w"], timesteps: Int[Tensor, " n"]
    ) -> tuple[Float[Tensor, "n c h w"], Float[Tensor, "n c h w"]]:
        """The x0-prediction and the noise that a raw network output at (``latents``, ``timesteps``) stands for."""
        a = _spread(self.alpha_cumprod(timesteps))
        if self.prediction_type == "epsilon":
            return (latents - (1 - a).sqrt() * output) / a.sqrt(), output
        if self.prediction_type == "sample":
            return output, (latents - a.sqrt() * output) / (1 - a).sqrt()
        return a.sqrt() * latents - (1 - a).sqrt() * output, a.sqrt() * output + (1 - a).sqrt() * latents

    def step_distribution(
        self,
        output: Float[Tensor, "n c h w"],
        latents: Float[Tensor, "n c h w"],
        timesteps: Int[Tensor, " n"],
        prev_timesteps: Int[Tensor, " n"],
        eta: float,
    ) -> tuple[Float[Tensor, "n c h w"], Float[Tensor, " n"]]:
        """Mean and standard deviation of the DDIM step p(x_prev | x_t): arXiv 2010.02502, equations 12 and 16.

        mean = sqrt(a_prev) x0 + sqrt(1 - a_prev - s^2) eps,  s = eta sqrt((1 - a_prev) / (1 - a_t) (1 - a_t / a_prev)).
        """
        a_t, a_prev = self.alpha_cumprod(timesteps), self.alpha_cumprod(prev_timesteps)
        std = eta * ((1 - a_prev) / (1 - a_t) * (1 - a_t / a_prev)).sqrt()
        clean, noise = self.predict_clean(output, latents, timesteps)
        direction = (1 - a_prev - std**2).clamp(min=0).sqrt()
        return _spread(a_prev.sqrt()) * clean + _spread(direction) * noise, std

    def require_random_steps(self, prev_timesteps: Int[Tensor, " n"]) -> None:
        """Refuse the one step that is certain even with eta > 0: the last, where ``final_alpha_cumprod`` is 1.

        Its standard deviation is 0, so that it has neither candidates to choose from nor a density. The official SPO
        code never meets it, because it clamps the arrival to t = 0.

        Raises:
            ConfigError: such a step is among those that arrive at ``prev_timesteps``.
        """
        if self.final_alpha_cumprod >= 1 and bool((prev_timesteps < 0).any()):
            raise ConfigError(
                "SPO: the last DDIM step has sigma 0, since the scheduler's set_alpha_to_one is true; "
                'write "set_alpha_to_one": false into the pipeline\'s scheduler_config.json'
            )

    def step(
        self,
        output: Float[Tensor, "n c h w"],
        latents: Float[Tensor, "n c h w"],
        timesteps: Int[Tensor, " n"],
        prev_timesteps: Int[Tensor, " n"],
        eta: float,
        noise: Float[Tensor, "n c h w"] | None = None,
    ) -> Float[Tensor, "n c h w"]:
        """One DDIM step to x_prev; ``noise`` is read only where eta > 0."""
        mean, std = self.step_distribution(output, latents, timesteps, prev_timesteps, eta)
        if eta == 0.0:
            return mean
        if noise is None:
            raise ValueError(f"a DDIM step with eta {eta} draws noise, and none was given")
        return mean + _spread(std) * noise


def gaussian_log_prob(
    value: Float[Tensor, "n c h w"], mean: Float[Tensor, "n c h w"], std: Float[Tensor, " n"]
) -> Float[Tensor, " n"]:
    """log N(value; mean, std^2), **averaged** over c, h, w (not summed), as SPO's official code does.

    Source: arXiv 2406.04314, official ddim_with_logprob.py:119-127. With std = 0 there is no density: the result
    is not finite, and callers refuse that case.
    """
    scale = _spread(std)
    log_density = -((value - mean) ** 2) / (2 * scale**2) - scale.log() - 0.5 * math.log(2 * math.pi)
    return log_density.mean(dim=(1, 2, 3))


def _spread(per_sample: Float[Tensor, " n"]) -> Float[Tensor, "n 1 1 1"]:
    return per_sample.reshape(-1, 1, 1, 1)


def _require(key: str, value: object, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ConfigError(f"scheduler config: {key} must be one of {', '.join(known)}, got {value!r}")


def _betas(config: Mapping[str, Any]) -> Float[Tensor, " T"]:
    """beta_1 .. beta_T as diffusers' schedulers compute them."""
    kind, steps = config.get("beta_schedule", "linear"), config.get("num_train_timesteps", 1000)
    start, end = config.get("beta_start", 0.0001), config.get("beta_end", 0.02)
    _require("beta_schedule", kind, ("linear", "scaled_linear", "squaredcos_cap_v2"))
    if kind == "linear":
        betas = torch.linspace(start, end, steps, dtype=torch.float32)
    elif kind == "scaled_linear":
        betas = torch.linspace(start**0.5, end**0.5, steps, dtype=torch.float32) ** 2
    else:
        cosine = [math.cos((i / steps + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(steps + 1)]
        betas = torch.tensor([min(1 - after / before, 0.999) for before, after in pairwise(cosine)])
    return _rescale_zero_terminal_snr(betas) if config.get("rescale_betas_zero_snr", False) else betas


def _rescale_zero_terminal_snr(betas: Float[Tensor, " T"]) -> Float[Tensor, " T"]:
    """Shift and scale sqrt(a_t) so that a_{T-1} = 0: arXiv 2305.08891, algorithm 1."""
    root = torch.cumprod(1.0 - betas, dim=0).sqrt()
    root = (root - root[-1]) * (root[0] / (root[0] - root[-1]))
    a = root**2
    return 1 - torch.cat([a[:1], a[1:] / a[:-1]])
