"""Pairs of imperfect drawings for prompts that no training of the embedded world shows."""

from __future__ import annotations

import torch
from torch import Tensor

from datamodules.shapes.drawing import as_unit, draw_imperfect, prompt_splits, random_numbers
from lightning_modules.shapes.world import Scene


def drawn_pairs(times: int) -> tuple[list[str], Tensor]:
    """The validation prompts, each ``times`` times, and two pictures in [0, 1] of each: all first, then all second."""
    prompts = prompt_splits()["validation"] * times
    pictures = [
        draw_imperfect(Scene.parse(text), random_numbers(1, n, k), 0.2)
        for k in (0, 1)
        for n, text in enumerate(prompts)
    ]
    return prompts, as_unit(torch.stack(pictures))
