"""Learning-rate schedules by optimiser step, as classes that a YAML can name."""

from __future__ import annotations

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


class ConstantWithWarmup(LambdaLR):
    """Linear from 0 over ``warmup_steps``, then constant; the schedule of every official recipe here.

    Step s trains at lr * min(1, s / warmup_steps), so the very first step at 0: diffusers' ``constant_with_warmup``.
    """

    def __init__(self, optimizer: Optimizer, warmup_steps: int = 0) -> None:
        super().__init__(optimizer, lambda step: min(1.0, step / max(1, warmup_steps)) if warmup_steps else 1.0)


class CosineWithWarmup(LambdaLR):
    """Linear from 0 over ``warmup_steps``, then a half cosine that reaches 0 at ``total_steps``."""

    def __init__(self, optimizer: Optimizer, total_steps: int, warmup_steps: int = 0) -> None:
        def factor(step: int) -> float:
            if step < warmup_steps:
                return step / warmup_steps
            progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
            return 0.5 * (1 + math.cos(math.pi * progress))

        super().__init__(optimizer, factor)
