"""An exponential moving average of the trained weights: pictures and exports that follow the training calmly."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lightning_modules.errors import ConfigError


class ExponentialMovingAverage:
    """After the n-th optimizer step a = d a + (1 - d) w, with d = min(decay, n / (n + 9)), and d = 0 for n = 1.

    So the average forgets the start of the training soon, and its decay reaches 0.999 at step 8991. The same as
    diffusers' ``EMAModel`` with its defaults.

    Args:
        decay: the most that is kept of the average in a step; in [0, 1).

    Raises:
        ConfigError: a decay out of range.
    """

    def __init__(self, decay: float = 0.9999) -> None:
        if not 0 <= decay < 1:
            raise ConfigError(f"ExponentialMovingAverage.decay must lie in [0, 1), got {decay}")
        self.decay = decay
        self.steps = 0
        self.weights: dict[str, Tensor] = {}
        self._in_place = False
        self._skips_next = False

    @torch.no_grad()
    def update(self, weights: Mapping[str, Tensor]) -> None:
        """Take in the weights after an optimizer step, unless that step was left out."""
        if self._skips_next:
            self._skips_next = False
            return
        self.steps += 1
        if self.steps == 1:
            self.weights = {name: value.detach().clone() for name, value in weights.items()}
            return
        kept = min(self.decay, self.steps / (self.steps + 9))
        # A checkpoint is read before the networks go to their device.
        self.weights = {name: self.weights[name].to(value.device) for name, value in weights.items()}
        torch._foreach_lerp_(list(self.weights.values()), [value.detach() for value in weights.values()], 1 - kept)

    def skip_next_update(self) -> None:
        """Pass over the next ``update``: its step leaves the weights as they are and is none for the average."""
        self._skips_next = True

    @contextmanager
    def in_place_of(self, weights: Mapping[str, Tensor]) -> Iterator[None]:
        """Within it the weights are the average, if there is one yet; afterwards they are as before, bit for bit."""
        if self._in_place or not self.weights:
            yield
            return
        self._swap(weights)
        self._in_place = True
        try:
            yield
        finally:
            self._swap(weights)
            self._in_place = False

    def _swap(self, weights: Mapping[str, Tensor]) -> None:
        for name, value in weights.items():
            value.data, self.weights[name] = self.weights[name].to(value.device), value.data

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps, "weights": self.weights}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.steps, self.weights = int(state["steps"]), dict(state["weights"])
