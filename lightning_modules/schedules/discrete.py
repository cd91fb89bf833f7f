"""The discrete diffusion schedule: noising, the network's target, and the DDIM step with its probability.

Notation of this file, after DDIM (arXiv 2010.02502): ``a_t`` is the cumulative product that DDIM calls alpha_t and
DDPM alpha-bar_t; x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) noise.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, cast, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lightning_modules.errors import ConfigError
from lightning_modules.randomness import randint
from lightning_modules.schedules.base import Schedule, Step, per_sample

PredictionType = Literal["epsilon", "v_prediction", "sample"]
Spacing = Literal["leading", "trailing", "linspace"]


@dataclass(frozen=True)
class NoiseSchedule(Schedule):
    """A discrete noise schedule of T steps.

    Attributes:
        alphas_cumprod: a_t for t = 0 .. T - 1, fp32.
        final_alpha_cumprod: a of the step before t = 0: a_0 (Stable Diffusion, ``set_alpha_to_one=False``) or 1.
        prediction_type: what the network's raw output means.
        spacing, steps_offset: how ``trajectory`` picks its timesteps, as in diffusers.
    """

    kind = "diffusion"
    clean = -1

    alphas_cumprod: Float[Tensor, " T"]
    final_alpha_cumprod: float
    prediction_type: PredictionType = "epsilon"
    spacing: Spacing = "leading"
    steps_offset: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "_tables", {})  # alphas_cumprod by device: no field, since it says nothing new

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
            ConfigError: a beta schedule, prediction type or spacing that is none of the known ones; thresholding; a
                scheduler that has no betas at all, such as a rectified flow's.
        """
        _check_family(config)
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

    def trajectory(self, steps: int, cells: int | None = None) -> tuple[Step, ...]:
        """Equal to diffusers' ``DDIMScheduler.set_timesteps`` for each spacing; a step is T / steps long."""
        total = self.num_timesteps
        if not 0 < steps <= total:
            raise ConfigError(f"sampling steps: want 1 to {total}, got {steps}; lower the sampler's `steps`")
        if self.spacing == "leading":
            timesteps = torch.arange(steps - 1, -1, -1) * (total // steps) + self.steps_offset
        elif self.spacing == "trailing":
            timesteps = (total - torch.arange(steps, dtype=torch.float64) * (total / steps)).round().long() - 1
        else:
            timesteps = torch.linspace(0, total - 1, steps, dtype=torch.float64).round().long().flip(0)
        starts = timesteps.tolist()
        return tuple(Step(i, t, max(self.clean, t - total // steps)) for i, t in enumerate(starts))

    def draw(self, generators: Sequence[torch.Generator], device: torch.device | str = "cpu") -> Int[Tensor, " n"]:
        """Uniform over 0 .. T - 1."""
        return randint(self.num_timesteps, generators, device)

    def alpha_cumprod(self, timesteps: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
        """a_t per sample; ``final_alpha_cumprod`` at clean latents."""
        tables: dict[torch.device, Tensor] = vars(self)["_tables"]
        if timesteps.device not in tables:
            with torch.inference_mode(False):  # a validation may ask first, and training use it later
                tables[timesteps.device] = self.alphas_cumprod.to(timesteps.device)
        known = tables[timesteps.device][timesteps.clamp(min=0)]
        return torch.where(timesteps < 0, torch.full_like(known, self.final_alpha_cumprod), known)

    def signal_and_noise(self, timesteps: Int[Tensor, " n"]) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
        """sqrt(a_t) and sqrt(1 - a_t)."""
        a = self.alpha_cumprod(timesteps)
        return a.sqrt(), (1 - a).sqrt()

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
        a = per_sample(self.alpha_cumprod(timesteps))
        return a.sqrt() * noise - (1 - a).sqrt() * clean

    def predict_clean(
        self, output: Float[Tensor, "n c h w"], latents: Float[Tensor, "n c h w"], timesteps: Int[Tensor, " n"]
    ) -> tuple[Float[Tensor, "n c h w"], Float[Tensor, "n c h w"]]:
        """The x0-prediction and the noise that a raw network output at (``latents``, ``timesteps``) stands for."""
        a = per_sample(self.alpha_cumprod(timesteps))
        if self.prediction_type == "epsilon":
            return (latents - (1 - a).sqrt() * output) / a.sqrt(), output
        if self.prediction_type == "sample":
            return output, (latents - a.sqrt() * output) / (1 - a).sqrt()
        return a.sqrt() * latents - (1 - a).sqrt() * output, a.sqrt() * output + (1 - a).sqrt() * latents

    def step_std(
        self, timesteps: Int[Tensor, " n"], next_timesteps: Int[Tensor, " n"], eta: float
    ) -> Float[Tensor, " n"]:
        """s = eta sqrt((1 - a_next) / (1 - a_t) (1 - a_t / a_next)): arXiv 2010.02502, equation 16."""
        a_t, a_next = self.alpha_cumprod(timesteps), self.alpha_cumprod(next_timesteps)
        return eta * ((1 - a_next) / (1 - a_t) * (1 - a_t / a_next)).sqrt()

    def step_distribution(
        self,
        output: Float[Tensor, "n c h w"],
        latents: Float[Tensor, "n c h w"],
        timesteps: Int[Tensor, " n"],
        next_timesteps: Int[Tensor, " n"],
        eta: float,
    ) -> tuple[Float[Tensor, "n c h w"], Float[Tensor, " n"]]:
        """Mean and standard deviation of the DDIM step p(x_next | x_t): arXiv 2010.02502, equations 12 and 16.

        mean = sqrt(a_next) x0 + sqrt(1 - a_next - s^2) eps, with s of ``step_std``.
        """
        a_next, std = self.alpha_cumprod(next_timesteps), self.step_std(timesteps, next_timesteps, eta)
        clean, noise = self.predict_clean(output, latents, timesteps)
        direction = (1 - a_next - std**2).clamp(min=0).sqrt()
        return per_sample(a_next.sqrt()) * clean + per_sample(direction) * noise, std

    def require_random_steps(self, timesteps: Int[Tensor, " n"], next_timesteps: Int[Tensor, " n"]) -> None:
        """
        Where ``set_alpha_to_one`` is true, or the last step starts at t = 0 and ends at a_0, its sigma is 0. The
        official code never meets it, because it clamps the arrival to t = 0.
        """
        certain = self.step_std(timesteps, next_timesteps, eta=1.0) == 0
        if bool(certain.any()):
            reason = (
                'the scheduler\'s set_alpha_to_one is true; write "set_alpha_to_one": false into'
                if self.final_alpha_cumprod >= 1
                else 'it starts at t = 0 and ends there; write "steps_offset": 1 and leading spacing into'
            )
            raise ConfigError(
                f"SPO: the DDIM step from t = {int(timesteps[certain][0])} has sigma 0, since {reason} the pipeline's "
                "scheduler_config.json"
            )


def _require(key: str, value: object, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ConfigError(f"scheduler config: {key} must be one of {', '.join(known)}, got {value!r}")


def _check_family(config: Mapping[str, Any]) -> None:
    name = config.get("_class_name")
    has_betas = any(config.get(key) is not None for key in ("beta_schedule", "beta_start", "trained_betas"))
    if (name is not None and not has_betas) or config.get("use_flow_sigmas"):
        raise ConfigError(
            f"scheduler config: {name} is no discrete diffusion with betas; give a base model that was trained as one, "
            "such as Stable Diffusion 1.x, 2.x or XL"
        )
    if config.get("thresholding"):
        raise ConfigError(
            "scheduler config: thresholding is for models of pixels and is not supported; "
            'write "thresholding": false into scheduler_config.json'
        )


def _betas(config: Mapping[str, Any]) -> Float[Tensor, " T"]:
    """beta_1 .. beta_T as diffusers' schedulers compute them."""
    kind, steps = config.get("beta_schedule", "linear"), config.get("num_train_timesteps", 1000)
    start, end = config.get("beta_start", 0.0001), config.get("beta_end", 0.02)
    trained = config.get("trained_betas")
    if trained is not None:
        return torch.tensor(trained, dtype=torch.float32)
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
