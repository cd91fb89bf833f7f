"""Who judges the candidates of a denoising step: a step-aware model, a latent one, any reward model, or chance."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cached_property

import torch
from jaxtyping import Float, Real
from torch import Tensor, nn

from lightning_modules.errors import ConfigError
from lightning_modules.policies.base import DiffusionPolicy
from lightning_modules.preference_views import check_latents
from lightning_modules.rewards.base import LatentStepRewardModel, StepRewardModel
from lightning_modules.rewards.function import Reward, as_reward_model

Decode = Callable[[Float[Tensor, "n c h w"]], Float[Tensor, "n 3 H W"]]


class StepCandidates:
    """k ways to have gone on for each of b prompts: n = k b rows, candidate-major (row i b + j is prompt j's i-th).

    What costs a network is computed when a scorer first asks for it, and once.

    Attributes:
        latents: the x_{t-1} in question.
        timesteps: the timestep at which they are, which is where the compared step ends; 0 where they are finished.
        started_at: the t that this step started from.
        prompts: length n.
        clean: their x0-predictions under the policy; finished latents are their own.
        images: ``clean`` decoded, in [0, 1].
        control_noise: standard normal numbers from a stream that is not the candidates' own.
    """

    def __init__(
        self,
        latents: Float[Tensor, "n c h w"],
        timesteps: Real[Tensor, " n"],
        started_at: Real[Tensor, " n"],
        prompts: tuple[str, ...],
        control_noise: Float[Tensor, "k b"],
        predict_clean: Callable[[], Float[Tensor, "n c h w"]],
        decode: Decode,
    ) -> None:
        self.latents, self.timesteps, self.started_at, self.prompts = latents, timesteps, started_at, prompts
        self.control_noise = control_noise
        self._predict_clean, self._decode = predict_clean, decode

    @cached_property
    def clean(self) -> Float[Tensor, "n c h w"]:
        return self._predict_clean()

    @cached_property
    def images(self) -> Float[Tensor, "n 3 H W"]:
        return self._decode(self.clean)

    def with_decoder(self, decode: Decode, prompts: int) -> StepCandidates:
        """The candidates of the first ``prompts`` prompts, their pictures made by another decoder."""
        k, b = self.control_noise.shape
        rows = torch.arange(k * b).reshape(k, b)[:, :prompts].flatten()
        here = rows.to(self.latents.device)
        texts = tuple(self.prompts[row] for row in rows.tolist())
        control_noise = self.control_noise[:, :prompts]
        return StepCandidates(
            self.latents[here],
            self.timesteps[here],
            self.started_at[here],
            texts,
            control_noise,
            lambda: self.clean[here],
            decode,
        )


class StepScorer(nn.Module, ABC):
    """Scores the candidates of a step; higher is better. Only differences between one prompt's candidates matter."""

    @property
    def sees_pictures(self) -> bool:
        """Whether it looks at decoded candidates."""
        return True

    @abstractmethod
    def score(self, candidates: StepCandidates) -> Float[Tensor, " n"]:
        """One score per row, fp32."""

    def judged_at(self, candidates: StepCandidates) -> Real[Tensor, " n"]:
        """The timestep at which it takes each row to be."""
        return candidates.timesteps

    def check(self, policy: DiffusionPolicy) -> None:
        """Before anything is sampled.

        Raises:
            ConfigError: it can't judge what this policy makes.
        """


class StepAwareScorer(StepScorer):
    """SPO's own (arXiv 2406.04314, section 3.2): a model that knows how finished a picture can be at each timestep.

    Args:
        model: judges decoded x0-predictions at their timestep.
    """

    def __init__(self, model: StepRewardModel) -> None:
        super().__init__()
        self.model = model

    def score(self, candidates: StepCandidates) -> Float[Tensor, " n"]:
        return self.model.score(candidates.images, candidates.prompts, candidates.timesteps)

    def check(self, policy: DiffusionPolicy) -> None:
        known, given = self.model.learned_kind, policy.schedule.kind
        if known is not None and known != given:
            raise ConfigError(
                f"StepAwareScorer: the model has learned the timesteps of a {known} schedule, and the policy "
                f"{type(policy).__name__} has a {given} schedule, with other noise at equal timesteps; train one with "
                "this policy (StepAwarePreferenceModule), or judge with RewardScorer"
            )


class LatentScorer(StepScorer):
    """LPO's (arXiv 2502.01051): a model that judges the noisy x_{t-1} themselves, without x0-prediction and decode.

    They are judged **at t**, where their step started, not where it ended (official multi_sample_pipeline.py:164-167 of
    Kwai-Kolors/LPO@9c2e8b8): at the timesteps that the model was trained at, the last ones at t = 1.

    Args:
        model: judges noisy latents.
    """

    def __init__(self, model: LatentStepRewardModel) -> None:
        super().__init__()
        self.model = model

    @property
    def sees_pictures(self) -> bool:
        return False

    def score(self, candidates: StepCandidates) -> Float[Tensor, " n"]:
        return self.model.score(candidates.latents, candidates.prompts, candidates.started_at)

    def judged_at(self, candidates: StepCandidates) -> Real[Tensor, " n"]:
        return candidates.started_at

    def check(self, policy: DiffusionPolicy) -> None:
        check_latents(policy, self.model)


class RewardScorer(StepScorer):
    """Any reward on the decoded x0-prediction, as if it were a finished picture.

    Args:
        reward: judges pictures: a reward model, or a function f(images, prompts) by its dotted name.
        scale: multiplies its scores. The sampler's threshold is on a softmax, so it has to fit the reward's units.
    """

    def __init__(self, reward: Reward, scale: float = 1.0) -> None:
        super().__init__()
        self.reward, self.scale = as_reward_model(reward), scale

    def score(self, candidates: StepCandidates) -> Float[Tensor, " n"]:
        return self.scale * self.reward.score(candidates.images, candidates.prompts)


class RandomScorer(StepScorer):
    """The control: standard normal scores that know nothing of the pictures, and cost neither network nor decode.

    The candidates are those that a real scorer would have seen with the same seed.

    Args:
        scale: standard deviation of the scores.
    """

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = scale

    @property
    def sees_pictures(self) -> bool:
        return False

    def score(self, candidates: StepCandidates) -> Float[Tensor, " n"]:
        return self.scale * candidates.control_noise.flatten()


class ShuffledScorer(StepScorer):
    """The stricter control: a real scorer's scores, shuffled among each prompt's candidates.

    Valid fraction, score gaps and timesteps are the real scorer's; what is lost is which candidate they belong to.

    Args:
        scorer: a scorer whose scores are shuffled.
    """

    def __init__(self, scorer: StepScorer) -> None:
        super().__init__()
        self.scorer = scorer

    @property
    def sees_pictures(self) -> bool:
        return self.scorer.sees_pictures

    def score(self, candidates: StepCandidates) -> Float[Tensor, " n"]:
        scores = self.scorer.score(candidates).reshape(candidates.control_noise.shape)
        return scores.gather(0, candidates.control_noise.argsort(dim=0)).flatten()

    def judged_at(self, candidates: StepCandidates) -> Real[Tensor, " n"]:
        return self.scorer.judged_at(candidates)

    def check(self, policy: DiffusionPolicy) -> None:
        self.scorer.check(policy)
