"""Hashes that a pool's folder is named after, so that no other pool is taken for it."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import nn


def digest(value: Any) -> str:
    """A short hash of plain values."""
    return hashlib.blake2b(repr(value).encode(), digest_size=6).hexdigest()


def fingerprint(module: nn.Module) -> str:
    """A hash of a network: of all weights under training, of some numbers of each frozen tensor, of its settings.

    The frozen ones change only with the settings that name them, so that a few numbers tell them apart, and reading
    all of a large model for every pool would take longer than its prompts' first step.
    """
    found = hashlib.blake2b(digest_size=8)
    for name, part in module.named_modules():
        plain = {key: value for key, value in vars(part).items() if isinstance(value, bool | int | float | str)}
        shown = sorted((key, value) for key, value in plain.items() if not key.startswith("_") and key != "training")
        found.update(repr((name, type(part).__name__, shown)).encode())
    for name, parameter in module.named_parameters():
        values = parameter.detach().reshape(-1)
        if not parameter.requires_grad:
            values = values[:: max(1, len(values) // 64)]
        found.update(repr((name, tuple(parameter.shape), str(parameter.dtype))).encode())
        found.update(values.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()
