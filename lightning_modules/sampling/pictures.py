"""Pictures from prompts: DDIM, or a flow's steps, with classifier-free guidance; one loop for policy and reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_modules.batches import DenoiserQuery
from lightning_modules.errors import ConfigError
from lightning_modules.policies.base import DiffusionPolicy
from lightning_modules.randomness import generator, randn

Denoise = Callable[[DenoiserQuery], Tensor]


@dataclass(frozen=True)
class Sampler:
    """How pictures are made; an evaluation freezes and records one of these.

    Args:
        steps: DDIM steps, or a flow's.
        guidance_scale: classifier-free guidance against the empty prompt (arXiv 2207.12598); 1 turns it off.
        eta: 0 is deterministic (DDIM, Euler for a flow), 1 has DDPM's variance (arXiv 2010.02502, equation 16), or all
            of the noise of a flow's step rule.
    """

    steps: int = 20
    guidance_scale: float = 5.0
    eta: float = 0.0

    def __post_init__(self) -> None:
        if self.guidance_scale < 1 or not 0 <= self.eta <= 1:
            raise ConfigError(
                f"sampler wants guidance_scale >= 1 and eta in [0, 1], got {self.guidance_scale} and {self.eta}"
            )

    @torch.no_grad()
    def generate(
        self,
        policy: DiffusionPolicy,
        predict_noise: Denoise,
        prompts: Sequence[str],
        noise: Float[Tensor, "n c h w"],
        generators: Sequence[torch.Generator],
    ) -> Float[Tensor, "n 3 H W"]:
        """One picture per prompt, in [0, 1].

        Args:
            policy: encodes the prompts and decodes the latents.
            predict_noise: ``policy.predict_noise`` or a reference's.
            prompts: length n.
            noise: the initial latents, standard normal.
            generators: one per picture; read only where eta > 0.
        """
        cond = policy.encode_prompts(prompts)
        latents = noise.to(policy.device, torch.float32)
        for step in policy.schedule.trajectory(self.steps, latents.shape[-2] * latents.shape[-1]):
            start = torch.full((len(prompts),), step.timestep, device=latents.device)
            end = torch.full_like(start, step.next_timestep)
            output = predict_noise(DenoiserQuery(latents, start, cond, self.guidance_scale))
            fresh = randn(latents.shape[1:], generators, latents.device) if self.eta else None
            latents = policy.schedule.step(output, latents, start, end, self.eta, fresh)
        return policy.decode(latents)


def initial_noise(
    policy: DiffusionPolicy, keys: Sequence[tuple[int | str, ...]], image_size: int | None = None
) -> tuple[Float[Tensor, "n c h w"], list[torch.Generator]]:
    """Initial latents for one picture per key, and the generators that drew them, ready for the sampler's own draws."""
    side = (image_size or policy.image_size) // policy.downscale
    generators = [generator(*key) for key in keys]
    return randn((policy.latent_channels, side, side), generators, policy.device), generators
