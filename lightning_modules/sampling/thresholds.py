"""How far two scores must lie apart for a comparison to become a pair."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch

from lightning_modules.errors import ConfigError
from lightning_modules.schedules.base import Schedule, Step


class Threshold(ABC):
    """The gap softmax([best, worst])[0] - [1] that a pair needs, step by step; subclass it as a frozen dataclass."""

    @abstractmethod
    def at(self, trajectory: tuple[Step, ...], schedule: Schedule) -> list[float]:
        """One number in [0, 1) for each step of the trajectory.

        Raises:
            ConfigError: this threshold has none for such steps.
        """


@dataclass(frozen=True)
class AlongSigma(Threshold):
    """low + (high - low) (s_t - s_min) / (s_max - s_min), s_t = sigma of the step at eta 1: LPO's (arXiv 2502.01051).

    Noisy steps need a larger gap. Official compare_funcs.py:5-63 of Kwai-Kolors/LPO@9c2e8b8 reads s from a table of
    four digits for 20 steps, which moves thresholds by up to 1.7e-5 and is wrong for another number of steps; here it
    is the schedule's.

    Attributes:
        low: threshold at the step with the least sigma; LPO takes 0.35 for SD 1.5 and 2.1, 0.45 for SDXL.
        high: threshold at the step with the largest; 0.5 and 0.6.
    """

    low: float = 0.35
    high: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.low <= self.high < 1:
            raise ConfigError(f"AlongSigma wants 0 <= low <= high < 1, got {self.low} and {self.high}")

    def at(self, trajectory: tuple[Step, ...], schedule: Schedule) -> list[float]:
        starts = torch.tensor([step.timestep for step in trajectory])
        ends = torch.tensor([step.next_timestep for step in trajectory])
        sigma = schedule.step_std(starts, ends, eta=1.0).double()
        if sigma.max() == sigma.min():
            raise ConfigError(
                f"AlongSigma: all of the {len(trajectory)} steps have one sigma; give a number as the threshold"
            )
        share = (sigma - sigma.min()) / (sigma.max() - sigma.min())
        found: list[float] = (self.low + (self.high - self.low) * share).tolist()
        return found
