"""What every reward model answers: how good is this picture for this prompt?"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from jaxtyping import Float, Int
from torch import Tensor, nn


class RewardModel(nn.Module, ABC):
    """Scores pictures against prompts; higher is better. Always frozen, always in eval mode.

    Subclasses set ``name``, the word that appears in metric names such as ``val/win_rate/<name>``.
    """

    name: str

    @abstractmethod
    def score(self, images: Float[Tensor, "n 3 h w"], prompts: Sequence[str]) -> Float[Tensor, " n"]:
        """One score a picture, in fp32 on the pictures' device.

        Args:
            images: pictures in [0, 1], RGB.
            prompts: one prompt a picture.

        Raises:
            UserError: a prompt that this reward cannot judge.
        """

    def parts(self, images: Float[Tensor, "n 3 h w"], prompts: Sequence[str]) -> dict[str, Float[Tensor, " n"]]:
        """The score's named components, where it has any; reported beside it and never trained on."""
        return {}


class StepRewardModel(nn.Module, ABC):
    """Scores x0-predictions against prompts, told the timestep they were predicted at; higher is better.

    SPO's step-aware preference model (arXiv 2406.04314, section 3.2) is one. Frozen and in eval mode while it scores.
    """

    @abstractmethod
    def score(
        self, images: Float[Tensor, "n 3 h w"], prompts: Sequence[str], timesteps: Int[Tensor, " n"]
    ) -> Float[Tensor, " n"]:
        """One score a picture, in fp32 on the pictures' device.

        Args:
            images: decoded x0-predictions in [0, 1], RGB.
            prompts: one prompt a picture; the same one comes many times and is worth remembering.
            timesteps: the t of each prediction; 0 for a finished picture.
        """
