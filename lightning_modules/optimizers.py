"""Optimizers that need a package of their own, and moments out of a checkpoint."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_modules.errors import ConfigError


def lay_out_moments(optimizer: Optimizer) -> None:
    """Have each moment lie in memory as its weight does, where a checkpoint of another layout was read.

    Fused optimizers go through both in the order of memory and do not look: they would pair other numbers.
    """
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            alike = isinstance(value, Tensor) and value.shape == parameter.shape
            if alike and value.stride() != parameter.stride():
                state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


class AdamW8bit(Optimizer):
    """AdamW with its two moments in 8 bits each: 2 bytes per trained weight in place of 8 (arXiv 2110.02861).

    It is bitsandbytes' ``AdamW8bit``, by a name that can be composed without the package; tensors below 4,096 elements
    keep moments of 32 bits. Its results are close to AdamW's, not the same.

    Args:
        params: Parameters to train.
        lr: Learning rate.
        betas: Decay of the running means of gradient and squared gradient.
        eps: Added to the denominator.
        weight_decay: Decoupled weight decay.

    Raises:
        ConfigError: the package is not installed.
    """

    def __new__(  # type: ignore[misc]  # the class is bitsandbytes', which may be absent
        cls,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ) -> Optimizer:
        try:
            from bitsandbytes.optim import AdamW8bit as Kept
        except ImportError as error:
            raise ConfigError(
                "AdamW8bit needs the package bitsandbytes: pip install bitsandbytes, or use --model.optimizer=AdamW"
            ) from error
        made: Optimizer = Kept(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        return made
