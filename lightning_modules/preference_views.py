"""What a preference model sees of noised pictures before it says which one is preferred."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float, Real
from torch import Tensor

from lightning_modules.errors import ConfigError
from lightning_modules.policies.base import DiffusionPolicy
from lightning_modules.rewards.base import LatentStepRewardModel, PreferenceModel


class View(ABC):
    """Noisy latents as the preference model reads them, as a strategy: subclass it as a frozen dataclass.

    Attributes:
        asks_policy: whether it reads what the policy predicts.
    """

    asks_policy: ClassVar[bool] = True

    @abstractmethod
    def __call__(
        self,
        policy: DiffusionPolicy,
        latents: Float[Tensor, "n c h w"],
        timesteps: Real[Tensor, " n"],
        predict: Callable[[], Float[Tensor, "n c h w"]],
        decode: Callable[[Float[Tensor, "n c h w"]], Float[Tensor, "n 3 H W"]],
    ) -> Float[Tensor, "n ..."]:
        """
        Args:
            policy: frozen.
            latents: noisy.
            timesteps: t of each.
            predict: the policy's output there, with guidance.
            decode: latents to pictures in [0, 1].
        """

    @abstractmethod
    def check(self, policy: DiffusionPolicy, preference: PreferenceModel) -> None:
        """
        Raises:
            ConfigError: the preference model can't read what this view makes of the policy's latents.
        """


@dataclass(frozen=True)
class DecodedPrediction(View):
    """The picture that the policy expects behind the noise, SPO's (arXiv 2406.04314, section 3.2): its x0-prediction,
    decoded, in [0, 1]."""

    def __call__(
        self,
        policy: DiffusionPolicy,
        latents: Float[Tensor, "n c h w"],
        timesteps: Real[Tensor, " n"],
        predict: Callable[[], Float[Tensor, "n c h w"]],
        decode: Callable[[Float[Tensor, "n c h w"]], Float[Tensor, "n 3 H W"]],
    ) -> Float[Tensor, "n 3 H W"]:
        clean, _ = policy.schedule.predict_clean(predict(), latents, timesteps)
        return decode(clean)

    def check(self, policy: DiffusionPolicy, preference: PreferenceModel) -> None:
        if isinstance(preference, LatentStepRewardModel):
            raise ConfigError(
                f"model.sees DecodedPrediction makes pictures, and {type(preference).__name__} judges noisy latents; "
                "use NoisyLatents, as lrm_sd15 does"
            )


@dataclass(frozen=True)
class NoisyLatents(View):
    """The noisy latents themselves, LPO's (arXiv 2502.01051): neither denoiser nor decoder is asked."""

    asks_policy = False

    def __call__(
        self,
        policy: DiffusionPolicy,
        latents: Float[Tensor, "n c h w"],
        timesteps: Real[Tensor, " n"],
        predict: Callable[[], Float[Tensor, "n c h w"]],
        decode: Callable[[Float[Tensor, "n c h w"]], Float[Tensor, "n 3 H W"]],
    ) -> Float[Tensor, "n c h w"]:
        return latents

    def check(self, policy: DiffusionPolicy, preference: PreferenceModel) -> None:
        if not isinstance(preference, LatentStepRewardModel):
            raise ConfigError(
                f"model.sees NoisyLatents, and {type(preference).__name__} judges pictures; use DecodedPrediction, or "
                "a LatentRewardModel"
            )
        check_latents(policy, preference)


def check_latents(policy: DiffusionPolicy, model: LatentStepRewardModel) -> None:
    """Whether a model that judges latents knows those of this policy.

    Raises:
        ConfigError: they are noised by another kind of schedule, have another number of channels, or the model is of
            another kind of base.
    """
    name = type(model).__name__
    if policy.schedule.kind != model.learned_kind:
        raise ConfigError(
            f"{name} knows noisy latents and timesteps of a {model.learned_kind} schedule, and the policy "
            f"{type(policy).__name__} has a {policy.schedule.kind} schedule, with others; judge pictures instead: "
            "train a StepAwarePreferenceModel with DecodedPrediction, or sample with RewardScorer"
        )
    if policy.latent_channels != model.latent_channels:
        raise ConfigError(
            f"{name} reads latents of {model.latent_channels} channels, and the policy's VAE makes "
            f"{policy.latent_channels}; give one that was trained on this policy's latents"
        )
    kind = getattr(policy, "added_conditions", model.added_conditions)
    if kind != model.added_conditions:
        known, given = ("SDXL" if found == "text_time" else "Stable Diffusion 1.x or 2.x" for found in
                        (model.added_conditions, kind))  # fmt: skip
        raise ConfigError(
            f"{name} was trained on latents of {known}, and the policy is of {given}, whose latents are others; give "
            "one that was trained on this policy's"
        )
