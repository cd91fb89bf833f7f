"""SPO's official iteration in plain words, from the paper's formulas: what a user would run in this framework's place.

A pool as in the official multi_sample_pipeline.py: UNet with guidance, at every branched step all candidates decoded
at once and scored, the prompt's text encoded again for each of them. A training step as in train_spo.py:538-600: policy
and reference evaluated on the chosen and again on the rejected sample, the reference a second UNet.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from lightning_modules.batches import Conditioning, DenoiserQuery, StepPairs
from lightning_modules.objectives import SPO
from lightning_modules.policies.latent_diffusion import LatentDiffusion
from lightning_modules.rewards.step_aware import StepAwarePreferenceModel
from lightning_modules.sampling.step_sampler import SeededDraws, StepSampler
from lightning_modules.schedules.base import Step, gaussian_log_prob


@dataclass
class OfficialPool:
    """Samples step pairs of some prompts; with the same draws they are the framework's."""

    policy: LatentDiffusion
    judge: StepAwarePreferenceModel
    sampler: StepSampler
    prompts: list[str]

    @torch.no_grad()
    def pairs(self, draws: SeededDraws) -> list[tuple[Tensor, Tensor, Tensor, int, int, str]]:
        """(x_t, chosen, rejected, t, next t, prompt) of every valid comparison."""
        policy, k, b = self.policy.eval(), self.sampler.candidates, len(self.prompts)
        shape = (policy.latent_channels, *(policy.image_size // policy.downscale,) * 2)
        latents = draws.randn(1, shape)[0].to(policy.device)
        cond = policy.encode_prompts(self.prompts)
        steps = policy.schedule.trajectory(self.sampler.steps)
        found = []
        output = None
        for step in steps:
            if output is None:
                output = self._predict(latents, step.timestep, cond)
            if step.index < self.sampler.branch_from_step:
                latents = self._advance(latents, output, step, draws, 1)
                output = None
                continue
            start, ends = latents, self._advance(latents.repeat(k, 1, 1, 1), output.repeat(k, 1, 1, 1), step, draws, k)
            last = step is steps[-1]
            clean, outputs = ends, None
            if not last:
                outputs = self._predict(ends, step.next_timestep, cond)
                times = torch.full((len(ends),), step.next_timestep, device=policy.device)
                clean = policy.schedule.predict_clean(outputs, ends, times)[0]
            draws.control_noise(k)  # no scorer of a real run reads it
            scores = self._score(self._decode(clean), 0 if last else step.next_timestep).reshape(k, b)
            best, worst = scores.argmax(0), scores.argmin(0)
            rows = torch.arange(b, device=policy.device)
            gap = torch.stack([scores[best, rows], scores[worst, rows]]).softmax(0).diff(dim=0)[0].neg()
            split = ends.reshape(k, b, *shape)
            for row in (gap > self.sampler.threshold).nonzero().flatten().tolist():
                both = split[best[row], row], split[worst[row], row]
                found.append((start[row], *both, step.timestep, step.next_timestep, self.prompts[row]))
            if not last:
                goes_on = draws.randint(k).to(policy.device) * b + rows
                latents, output = ends[goes_on], outputs[goes_on]
        policy.train()
        return found

    def _predict(self, latents: Tensor, timestep: float, cond: Conditioning) -> Tensor:
        copies = len(latents) // len(self.prompts)
        times = torch.full((len(latents),), timestep, device=latents.device)
        rows = Conditioning.cat([cond] * copies)
        return self.policy.predict_noise(DenoiserQuery(latents, times, rows, self.sampler.guidance_scale))

    def _advance(self, latents: Tensor, output: Tensor, step: Step, draws: SeededDraws, copies: int) -> Tensor:
        noise = draws.randn(copies, latents.shape[1:]).flatten(0, 1).to(latents.device)
        start = torch.full((len(latents),), step.timestep, device=latents.device)
        end = torch.full_like(start, step.next_timestep)
        return self.policy.schedule.step(output, latents, start, end, self.sampler.eta, noise)

    def _decode(self, latents: Tensor) -> Tensor:
        """All at once on any device; a CPU takes longer for it than for one after the other, as the framework does."""
        images = self.policy.vae.decode(latents / self.policy.vae.config.scaling_factor).sample
        return (images / 2 + 0.5).clamp(0, 1)

    def _score(self, images: Tensor, timestep: float) -> Tensor:
        texts = self.judge.encode_text(self.prompts * self.sampler.candidates)
        times = torch.full((len(images),), timestep, device=images.device)
        return self.judge.logit_scale * (self.judge.encode_images(images, times) * texts).sum(-1)


@dataclass
class OfficialStep:
    """The loss of a batch of step pairs: four passes with guidance in place of two."""

    policy: LatentDiffusion
    reference_unet: torch.nn.Module
    objective: SPO

    def loss(self, pairs: StepPairs) -> Tensor:
        schedule, clip = self.policy.schedule, self.objective.ratio_clip
        log_ratios = []
        for end in (pairs.chosen, pairs.rejected):
            cond = self.policy.encode_prompts(pairs.prompts)
            query = DenoiserQuery(pairs.latents, pairs.timesteps, cond, self.objective.guidance_scale)
            with torch.no_grad():
                reference = self.policy.predict_noise(query, denoiser=self.reference_unet)
            log_probs = []
            for output in (self.policy.predict_noise(query), reference):
                mean, std = schedule.step_distribution(
                    output, pairs.latents, pairs.timesteps, pairs.next_timesteps, self.objective.eta
                )
                log_probs.append(gaussian_log_prob(end, mean, std))
            log_ratios.append((log_probs[0] - log_probs[1]).exp().clamp(1 - clip, 1 + clip).log())
        return -logsigmoid(self.objective.beta * (log_ratios[0] - log_ratios[1])).mean()
