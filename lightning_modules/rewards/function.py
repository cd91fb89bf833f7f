"""A plain function as a reward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from lightning_modules.errors import ConfigError
from lightning_modules.rewards.base import RewardModel

# What a setting that wants a reward takes: a reward model, or a function f(images, prompts) by its dotted name.
Reward = RewardModel | Callable[..., Any]


class FunctionReward(RewardModel):
    """``function(images, prompts)`` as a reward model.

    Args:
        function: takes RGB pictures in [0, 1], ``[n 3 h w]``, and n prompts; returns n numbers, higher is better.

    Attributes:
        path: the function's module and name, which tell its pools and folders apart from another's; of what the
            function does, they know nothing.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.name = getattr(function, "__name__", type(function).__name__)
        self.path = f"{getattr(function, '__module__', '')}.{getattr(function, '__qualname__', self.name)}"
        self._function = function

    def score(self, images: Float[Tensor, "n 3 h w"], prompts: Sequence[str]) -> Any:
        return self._function(images, prompts)  # what comes is checked by the base

    def described(self) -> dict[str, Any]:
        return {**super().described(), "function": self.path}


def as_reward_model(reward: Reward) -> RewardModel:
    """The reward model itself, or the one that a function makes.

    Raises:
        ConfigError: neither.
    """
    if isinstance(reward, RewardModel):
        return reward
    if isinstance(reward, (nn.Module, type)) or not callable(reward):
        raise ConfigError(
            f"a reward is a RewardModel or a function f(images, prompts), got {getattr(reward, '__name__', reward)!r}"
        )
    return FunctionReward(reward)
