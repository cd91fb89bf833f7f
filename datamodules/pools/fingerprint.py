"""Hashes that a pool's folder is named after, so that no other pool is taken for it."""

from __future__ import annotations

import hashlib
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from lightning_modules.weights.sharding import own_class


def digest(value: Any) -> str:
    """A short hash of plain values."""
    return hashlib.blake2b(repr(value).encode(), digest_size=6).hexdigest()


def fingerprint(module: nn.Module, frozen_in_full: bool = False) -> str:
    """A hash of a network: all weights under training, some numbers of each frozen tensor, its settings.

    The frozen ones change only with the settings that name them, so that a few numbers tell them apart, and reading
    all of a large model for every pool would take longer than its prompts' first step.

    Args:
        module: the network.
        frozen_in_full: read frozen tensors whole, where a name may have got other weights since.
    """
    found = hashlib.blake2b(digest_size=8)
    for name, part in module.named_modules():
        plain = {key: value for key, value in vars(part).items() if _is_plain(value)}
        shown = sorted((key, value) for key, value in plain.items() if not key.startswith("_") and key != "training")
        found.update(repr((name, own_class(part).__name__, shown)).encode())
    for named in (*module.named_parameters(), *module.named_buffers()):
        for name, tensor in _stored(*named):
            values = tensor.detach().reshape(-1)
            if not (tensor.requires_grad or frozen_in_full):
                values = values[:: max(1, len(values) // 64)]
            found.update(repr((name, tuple(tensor.shape), str(tensor.dtype))).encode())
            found.update(_bytes(values))
    return found.hexdigest()


def _stored(name: str, tensor: Tensor) -> list[tuple[str, Tensor]]:
    """The plain tensors that it is stored as: a quantised one of torchao is several."""
    if isinstance(tensor, DTensor) or not is_traceable_wrapper_subclass(tensor):
        return [(name, tensor)]
    return [(f"{name}.{part}", getattr(tensor, part)) for part in tensor.__tensor_flatten__()[0]]


def schedule_fingerprint(schedule: Any) -> str:
    """A hash of a noise schedule: of every field of it, tables in full."""
    found = hashlib.blake2b(repr(type(schedule).__name__).encode(), digest_size=8)
    for field in fields(schedule):
        value = getattr(schedule, field.name)
        shown = (tuple(value.shape), str(value.dtype)) if isinstance(value, Tensor) else value
        found.update(repr((field.name, shown)).encode())
        if isinstance(value, Tensor):
            found.update(_bytes(value))
    return found.hexdigest()


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple):  # a list may be a state
        return all(_is_plain(entry) for entry in value)
    return isinstance(value, bool | int | float | str)


def _bytes(values: Tensor) -> bytes:
    # A clone: numpy takes hold of a tensor's memory, which gathered weights are to be freed from.
    return values.detach().cpu().clone().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
