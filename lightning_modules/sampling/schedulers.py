"""Pictures by diffusers' own samplers, for protocols that name one."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from jaxtyping import Float
from torch import Tensor

from lightning_modules.batches import DenoiserQuery
from lightning_modules.errors import ConfigError
from lightning_modules.policies.base import DiffusionPolicy
from lightning_modules.sampling.pictures import Denoise, Sampler
from lightning_modules.schedules.discrete import NoiseSchedule

# Samplers of models that were trained with betas; each takes any such model's scheduler configuration.
KNOWN = (
    "DDIMScheduler", "DDPMScheduler", "DEISMultistepScheduler", "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler", "EulerAncestralDiscreteScheduler", "EulerDiscreteScheduler",
    "HeunDiscreteScheduler", "KDPM2AncestralDiscreteScheduler", "KDPM2DiscreteScheduler", "LMSDiscreteScheduler",
    "PNDMScheduler", "UniPCMultistepScheduler",
)  # fmt: skip


@dataclass(frozen=True)
class SchedulerSampler(Sampler):
    """A sampler of diffusers with the policy's own scheduler configuration, as ``X.from_config`` makes it.

    Latents are never clipped (``clip_sample``), as in diffusers' pipelines of Stable Diffusion.

    Args:
        steps: as its ``set_timesteps`` takes them; samplers of second order ask the network more often.
        guidance_scale: classifier-free guidance against the empty prompt; 1 turns it off.
        eta: of samplers that have one, ``DDIMScheduler``; 0 for all others.
        scheduler: its class.

    Raises:
        ConfigError: no known sampler, or an eta for one that has none.
    """

    scheduler: str = "EulerDiscreteScheduler"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scheduler not in KNOWN:
            raise ConfigError(f"sampler: scheduler {self.scheduler!r} is not known; there are {', '.join(KNOWN)}")
        if self.eta and not self._takes("eta"):
            raise ConfigError(f"sampler: {self.scheduler} has no eta, got {self.eta}; set it to 0")

    def _takes(self, option: str) -> bool:
        return option in inspect.signature(getattr(diffusers, self.scheduler).step).parameters

    @torch.no_grad()
    def generate(
        self,
        policy: DiffusionPolicy,
        predict_noise: Denoise,
        prompts: Sequence[str],
        noise: Float[Tensor, "n c h w"],
        generators: Sequence[torch.Generator],
    ) -> Float[Tensor, "n 3 H W"]:
        """As ``Sampler.generate``.

        Raises:
            ConfigError: a policy that was made from no scheduler configuration of diffusers; too few steps.
        """
        scheduler = self._scheduler(policy)
        options: dict[str, Any] = {"generator": list(generators)} if self._takes("generator") else {}
        options |= {"eta": self.eta} if self._takes("eta") else {}
        cond = policy.encode_prompts(prompts)
        latents = noise.to(policy.device, torch.float32) * scheduler.init_noise_sigma
        for timestep in scheduler.timesteps:
            scaled = scheduler.scale_model_input(latents, timestep)
            query = DenoiserQuery(scaled, timestep.expand(len(prompts)), cond, self.guidance_scale)
            latents = scheduler.step(predict_noise(query), timestep, latents, **options).prev_sample
        return policy.decode(latents)

    def _scheduler(self, policy: DiffusionPolicy) -> Any:
        config: Mapping[str, Any] | None = getattr(policy, "scheduler_config", None)
        if config is None:
            raise ConfigError(
                f"sampler: {type(policy).__name__} has no scheduler configuration of diffusers; use Sampler, its own"
            )
        if not isinstance(policy.schedule, NoiseSchedule):
            raise ConfigError(
                f"sampler: {self.scheduler} is for models that were trained with betas, and {type(policy).__name__} is "
                "a flow; use Sampler, whose levels are those of its pipeline"
            )
        scheduler = getattr(diffusers, self.scheduler).from_config(dict(config))
        if getattr(scheduler.config, "clip_sample", False):
            scheduler.register_to_config(clip_sample=False)
        try:
            scheduler.set_timesteps(self.steps, device=policy.device)
        except (ValueError, IndexError, ZeroDivisionError) as error:
            raise ConfigError(f"sampler: {self.scheduler} can't take {self.steps} steps ({error})") from error
        return scheduler
