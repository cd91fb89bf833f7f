"""Trains SPO's step-aware preference model and LPO's latent one: which of two pictures will be liked, seen from any
timestep?"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Real
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from lightning_modules.batches import Conditioning, DenoiserQuery, PreferencePairs
from lightning_modules.errors import ConfigError
from lightning_modules.learning_rates import ConstantWithWarmup
from lightning_modules.policies.base import DiffusionPolicy
from lightning_modules.preference_loss import agreement, labels_from_scores, of_all_ranks, preference_loss
from lightning_modules.preference_views import DecodedPrediction, View
from lightning_modules.randomness import randint, randn
from lightning_modules.rewards.base import PreferenceModel, ReadPrompts, StepRewardModel
from lightning_modules.rewards.function import Reward, as_reward_model
from lightning_modules.training import TrainingModule


class LabelSource(ABC):
    """Who says which picture of a pair is preferred, as a strategy: subclass it as a frozen dataclass."""

    @abstractmethod
    def __call__(self, batch: PreferencePairs) -> Float[Tensor, " b"]:
        """Probability that ``batch.chosen`` is preferred: 1, 0, or 0.5 for a tie."""


@dataclass(frozen=True)
class HumanLabels(LabelSource):
    """The data set's own: 1, or 0.5 where ties were kept."""

    def __call__(self, batch: PreferencePairs) -> Float[Tensor, " b"]:
        return torch.ones_like(batch.chosen[:, 0, 0, 0]) if batch.labels is None else batch.labels


@dataclass(frozen=True)
class RewardLabels(LabelSource):
    """A reward model's, whatever the data set says: the recipe of SPO's SDXL model, with PickScore.

    Attributes:
        reward: scores the clean pictures: a reward model, or a function f(images, prompts) by its dotted name.
        threshold: a pair is a tie unless softmax([score, score]) differs by more than this, in [0, 1].
        scale: multiplies the scores before the softmax; it has to fit the reward's units (1 for PickScore's logits).
    """

    reward: Reward
    threshold: float = 0.1
    scale: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.threshold < 1 or self.scale <= 0:
            raise ConfigError(
                f"RewardLabels wants threshold in [0, 1) and scale above 0, got {self.threshold} and {self.scale}"
            )
        as_reward_model(self.reward)

    def __call__(self, batch: PreferencePairs) -> Float[Tensor, " b"]:
        reward = as_reward_model(self.reward).to(batch.chosen.device)  # no part of the module: it is in no checkpoint
        scores = [reward.score(pictures / 2 + 0.5, batch.prompts) for pictures in (batch.chosen, batch.rejected)]
        return labels_from_scores(self.scale * scores[0], self.scale * scores[1], self.threshold)


class StepAwarePreferenceModule(TrainingModule):
    """Trains ``preference`` on what it sees of noised pictures (arXiv 2406.04314, section 3.2; arXiv 2502.01051).

    Both pictures of a pair are noised to the same timestep; the preference model sees what ``sees`` makes of them, t
    and the prompt, and learns the label with ``preference_loss`` over the pairs of all ranks. All draws are keyed by
    ``seed`` and the pair's index.

    Logged: ``loss``, ``accuracy`` (ties of the labels are left out), ``margin`` (chosen score less rejected score) and
    ``tie_fraction``; in validation also ``accuracy/t0``, ..., and ``accuracy`` is their mean: stop when it falls.

    Args:
        policy: its VAE makes the latents, and it draws the x0-predictions that SPO's model sees; frozen here whatever
            its adaptation says.
        preference: the model under training.
        labels: who says which picture is preferred.
        optimizer: an optimizer of all of the preference model's parameters.
        lr_scheduler: stepped once per optimizer step.
        guidance_scale: classifier-free guidance of the policy's pass; the latent reward model has its own.
        in_batch_negatives: see ``preference_loss``.
        validation_timesteps: timesteps at which accuracy is measured; the same noise for all of them.
        vae_batch_size: pictures that go through the VAE at a time, to bound its memory.
        seed: the run's seed; the YAMLs set it to ``${seed_everything}``.
        sees: what of the noised pictures the preference model judges.
        sampler_steps: t is drawn from the timesteps of a sampler with as many steps, LPO's 20: 951, 901, ..., 1, but
            for one of pure noise, as a flow starts with. None draws as the policy's training would: from all alike,
            SPO's, or as a flow's ``policy.levels`` says, which ``Uniform`` makes SPO's.
        independent_noise: each picture of a pair has noise of its own, LPO's; SPO gives both the same.

    Raises:
        ConfigError: timesteps that the policy's schedule does not have; a preference model that is not in fp32, or that
            cannot judge what ``sees`` makes.
    """

    def __init__(
        self,
        policy: DiffusionPolicy,
        preference: PreferenceModel,
        labels: LabelSource,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_scheduler: LRSchedulerCallable = ConstantWithWarmup,
        guidance_scale: float = 5.0,
        in_batch_negatives: bool = False,
        validation_timesteps: tuple[int, ...] = (0, 251, 501, 701, 951),
        vae_batch_size: int = 8,
        seed: int = 0,
        sees: View = DecodedPrediction(),  # noqa: B008  # frozen
        sampler_steps: int | None = None,
        independent_noise: bool = False,
    ) -> None:
        super().__init__(optimizer, lr_scheduler, seed)
        total = policy.schedule.num_timesteps
        if not validation_timesteps or not all(0 <= t < total for t in validation_timesteps):
            raise ConfigError(f"model.validation_timesteps must lie in 0 .. {total - 1}, got {validation_timesteps}")
        if guidance_scale < 1 or vae_batch_size < 1:
            raise ConfigError(
                f"model wants guidance_scale and vae_batch_size >= 1, got {guidance_scale} and {vae_batch_size}"
            )
        sees.check(policy, preference)
        if isinstance(preference, StepRewardModel):
            preference.learned_kind = policy.schedule.kind
        self.candidates = None if sampler_steps is None else noisy_starts(policy, sampler_steps)
        self.policy = policy.requires_grad_(False)
        self.preference = preference.requires_grad_(True)
        self.labels, self.sees, self.guidance_scale = labels, sees, guidance_scale
        self.in_batch_negatives, self.independent_noise = in_batch_negatives, independent_noise
        self.validation_timesteps, self.vae_batch_size = validation_timesteps, vae_batch_size
        self.train()

    def train(self, mode: bool = True) -> StepAwarePreferenceModule:
        super().train(mode)
        self.policy.eval()
        return self

    # Steps

    def training_step(self, batch: PreferencePairs, batch_idx: int) -> Tensor:
        latents, noise = self._latents(batch, "train")
        timesteps = self._timesteps(self._generators(batch, "timestep")).to(self.device)
        seen = self.view(latents, noise, timesteps, self._conditioning(batch))
        labels, prompts = self.labels(batch), self.preference.read_prompts(batch.prompts)
        loss, metrics = self._judge(seen, prompts, timesteps, labels, batch.weights)
        self._means["train"].add({"loss": loss.detach()} | metrics, len(batch))
        return loss

    def validation_step(self, batch: PreferencePairs, batch_idx: int) -> None:
        latents, noise = self._latents(batch, "val")
        cond, labels = self._conditioning(batch), self.labels(batch)
        prompts = self.preference.read_prompts(batch.prompts)
        found = []
        for t in self.validation_timesteps:
            timesteps = torch.full((len(batch),), t, device=self.device)
            seen = self.view(latents, noise, timesteps, cond)
            loss, metrics = self._judge(seen, prompts, timesteps, labels, batch.weights)
            self._means["val"].add({f"accuracy/t{t}": metrics["accuracy"]}, len(batch))
            found.append({"loss": loss} | metrics)
        means = {name: torch.stack([metrics[name] for metrics in found]).mean() for name in found[0]}
        self._means["val"].add(means, len(batch))

    def _timesteps(self, generators: Sequence[torch.Generator]) -> Real[Tensor, " b"]:
        """Entry i is drawn from generator i alone."""
        if self.candidates is None:
            return self.policy.schedule.draw(generators)
        return self.candidates[randint(len(self.candidates), generators)]

    # Pictures

    @torch.no_grad()
    def view(
        self,
        latents: Float[Tensor, "n c h w"],
        noise: Float[Tensor, "n c h w"],
        timesteps: Real[Tensor, " b"],
        cond: Conditioning | None,
    ) -> Float[Tensor, "n ..."]:
        """What the preference model sees of the pictures, each noised to its pair's timestep.

        Args:
            latents: clean; b chosen pictures, then b rejected ones.
            noise: likewise.
            timesteps: one per pair.
            cond: one row per picture; None where the policy is not asked.
        """
        steps = timesteps.repeat(2)
        noisy = self.policy.schedule.add_noise(latents, noise, steps)

        def predict() -> Tensor:
            assert cond is not None, "this view asks the policy: its asks_policy must be True"
            return self.policy.predict_noise(DenoiserQuery(noisy, steps, cond, self.guidance_scale))

        return self.sees(self.policy, noisy, steps, predict, self._decode)

    def _decode(self, latents: Float[Tensor, "n c h w"]) -> Float[Tensor, "n 3 H W"]:
        return torch.cat([self.policy.decode(chunk) for chunk in latents.split(self.vae_batch_size)])

    @torch.no_grad()
    def _latents(self, batch: PreferencePairs, purpose: str) -> tuple[Tensor, Tensor]:
        """Latents drawn from the VAE's posterior, chosen first, and the noise of each."""
        draws = self._generators(batch, purpose, "posterior", "chosen")
        draws += self._generators(batch, purpose, "posterior", "rejected")
        pictures, size = torch.cat([batch.chosen, batch.rejected]), self.vae_batch_size
        chunks = [slice(start, start + size) for start in range(0, len(pictures), size)]
        latents = torch.cat([self.policy.encode_images(pictures[chunk], draws[chunk]) for chunk in chunks])
        noise = randn(latents.shape[1:], self._generators(batch, purpose, "noise"), latents.device)
        if not self.independent_noise:
            return latents, noise.repeat(2, 1, 1, 1)
        other = randn(latents.shape[1:], self._generators(batch, purpose, "noise", "rejected"), latents.device)
        return latents, torch.cat([noise, other])

    @torch.no_grad()
    def _conditioning(self, batch: PreferencePairs) -> Conditioning | None:
        """One row per picture, each with its own micro-conditioning; None where the policy is not asked."""
        if not self.sees.asks_policy:
            return None
        cond = self.policy.encode_prompts(batch.prompts)
        ids = (batch.chosen_time_ids, batch.rejected_time_ids)
        return Conditioning.cat([cond.with_time_ids(own) for own in ids])

    # Judgement

    def _judge(
        self,
        seen: Float[Tensor, "n ..."],
        prompts: ReadPrompts,
        timesteps: Real[Tensor, " b"],
        labels: Float[Tensor, " b"],
        weights: Float[Tensor, " b"] | None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss over the pairs of all ranks, and metrics over this rank's."""
        both = torch.arange(len(timesteps), device=self.device).repeat(2)
        chosen, rejected = self.preference.encode_seen(seen, timesteps.repeat(2), prompts[both]).chunk(2)
        scale, text = self.preference.logit_scale, prompts.text
        weights = torch.ones_like(labels) if weights is None else weights
        with torch.autocast(self.device.type, enabled=False):
            features = of_all_ranks(torch.stack([chosen, rejected, text]))
            targets = of_all_ranks(torch.stack([labels, weights]))
            loss = preference_loss(
                features[0], features[1], features[2], scale, targets[0], targets[1], self.in_batch_negatives
            )
        margin = (scale * ((chosen - rejected) * text).sum(-1)).detach()
        metrics = {
            "accuracy": agreement(margin, labels),
            "margin": margin.mean(),
            "tie_fraction": (labels == 0.5).float().mean(),
        }
        return loss, metrics


def noisy_starts(policy: DiffusionPolicy, sampler_steps: int) -> Real[Tensor, " steps"]:
    """Where a sampler's steps start, but for pure noise, in which the two pictures of a pair are one."""
    cells = (policy.image_size // policy.downscale) ** 2
    starts = torch.tensor([step.timestep for step in policy.schedule.trajectory(sampler_steps, cells)])
    signal, _ = policy.schedule.signal_and_noise(starts)
    return starts[signal > 0]
