"""How much noise a step of a rectified flow draws, and how much of the predicted noise it keeps.

Every rule's step from level s to s' < s has mean (1 - s') x_0(s) + k n(s) and standard deviation d, where x_0(s) and
n(s) are the network's predictions. With k = sqrt(s'^2 - d^2), which is a rule's unless it says otherwise, x' has signal
1 - s' and noise s' wherever the prediction is right (the coefficients are preserved, as DDIM's are). Levels are fp64
here, so that a difference of two near ones keeps its digits.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from lightning_modules.errors import ConfigError

Levels = Float[Tensor, " n"]


class StepRule(ABC):
    """The noise of a step as a strategy: subclass it as a frozen dataclass of its amount.

    ``eta`` is what a sampler asks for on top: 0 is Euler's step without noise, 1 the rule as it stands.
    """

    @abstractmethod
    def std(self, level: Levels, next_level: Levels, eta: float) -> Levels:
        """d of each step; 0 where it is certain."""

    def noise_factor(self, level: Levels, next_level: Levels, std: Levels) -> Levels:
        """k, the factor of the predicted noise in the mean."""
        return (next_level**2 - std**2).clamp(min=0).sqrt()  # rounding can leave a little less than 0


@dataclass(frozen=True)
class Ancestral(StepRule):
    """d = eta (s'/s) sqrt(s^2 - ((1 - s)/(1 - s'))^2 s'^2): DDPM's posterior, with DDIM's eta.

    What SPO draws on Stable Diffusion (arXiv 2010.02502, equation 16), in the coordinates of a flow. The same as
    ``Precise`` with a = sqrt(2).
    """

    def std(self, level: Levels, next_level: Levels, eta: float) -> Levels:
        kept = (1 - level) / (1 - next_level) * next_level
        return eta * next_level / level * (level**2 - kept**2).clamp(min=0).sqrt()


@dataclass(frozen=True)
class CPS(StepRule):
    """d = s' sin(eta a pi/2): coefficients-preserving sampling (arXiv 2509.05952); the same share of every level.

    Attributes:
        a: noise level in (0, 1]; the paper and flow_grpo's fast variants take 0.8.
    """

    a: float = 0.8

    def __post_init__(self) -> None:
        if not 0 < self.a <= 1:
            raise ConfigError(f"CPS: a must lie in (0, 1], got {self.a}; 0.8 is usual")

    def std(self, level: Levels, next_level: Levels, eta: float) -> Levels:
        return next_level * math.sin(eta * self.a * math.pi / 2)


@dataclass(frozen=True)
class Precise(StepRule):
    """d = s' sqrt(1 - r^((eta a)^2)), r = s'(1 - s)/(s(1 - s')): the SDE solved over the step (arXiv 2605.23522).

    Attributes:
        a: noise level above 0; the official default is 1.5.
    """

    a: float = 1.5

    def __post_init__(self) -> None:
        _check_positive("Precise", self.a, "1.5")

    def std(self, level: Levels, next_level: Levels, eta: float) -> Levels:
        ratio = next_level * (1 - level) / (level * (1 - next_level))
        return next_level * (1 - ratio ** ((eta * self.a) ** 2)).clamp(min=0).sqrt()


@dataclass(frozen=True)
class FlowSDE(StepRule):
    """Flow-GRPO's Euler-Maruyama step: d = g sqrt(s - s'), g^2 = (eta a)^2 s/(1 - s), k = s' - d^2/(2 s).

    Source: arXiv 2505.05470. For comparison with published numbers: it does **not** preserve coefficients. x' is
    noisier than s' says, by 4% in early steps and 27 times in the last but one of SD3's ten levels at a = 0.7, so that
    noise of about 0.24 is left in the finished latents, which rewards see. At s = 1 the 1 - s is taken as 1 - s', as
    in official sd3_sde_with_logprob.py: the first step's noise depends on the number of steps.

    Attributes:
        a: noise level above 0; 0.7 is usual.
    """

    a: float = 0.7

    def __post_init__(self) -> None:
        _check_positive("FlowSDE", self.a, "0.7")

    def std(self, level: Levels, next_level: Levels, eta: float) -> Levels:
        signal = (1 - level).where(level < 1, 1 - next_level)
        return eta * self.a * (level / signal * (level - next_level)).sqrt()

    def noise_factor(self, level: Levels, next_level: Levels, std: Levels) -> Levels:
        return next_level - std**2 / (2 * level)


def _check_positive(name: str, a: float, usual: str) -> None:
    if a <= 0:
        raise ConfigError(f"{name}: a must be above 0, got {a}; {usual} is usual")
