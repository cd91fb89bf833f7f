"""Weights that are published as one file: a state dict in ``.bin``, ``.pt``, ``.pth`` or ``.safetensors``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from lightning_modules.errors import ConfigError
from lightning_modules.weights.audit import UNREADABLE
from lightning_modules.weights.pretrained import Pretrained

SUFFIXES = (".bin", ".pt", ".pth", ".safetensors")


def find_weights(name: str, whose: str, suffixes: Sequence[str] = SUFFIXES) -> Path:
    """A file, or ``organisation/name/file`` on the hub, fetched.

    Args:
        name: the file's name.
        whose: who wants it, for messages.
        suffixes: kinds of files that are taken from the hub.

    Raises:
        ConfigError: neither, or a hub that does not answer.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return path
    try:
        source = Pretrained.find(str(path.parent))
    except ConfigError:
        source = None
    if source is None or source.local or path.suffix not in suffixes:
        raise ConfigError(
            f"{whose}: no checkpoint {name!r}; give a {' or '.join(suffixes)} file, or a file on the hub as "
            "organisation/name/file"
        )

    def fetch(location: str, local_files_only: bool, **options: Any) -> str:
        return hf_hub_download(location, path.name, **options)

    return Path(source.load(fetch))


def read_state_dict(file: Path, whose: str) -> dict[str, Tensor]:
    """Its tensors by name, on the CPU; those under ``state_dict`` where the file wraps them. Nothing is unpickled.

    Raises:
        ConfigError: the file is damaged, or holds something else.
    """
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        weights = torch.load(file, map_location="cpu", weights_only=True)
    except UNREADABLE as error:
        raise damaged(file, whose, error) from error
    if isinstance(weights, dict) and isinstance(weights.get("state_dict"), dict):
        weights = weights["state_dict"]
    if not isinstance(weights, dict) or not all(_is_plain(*item) for item in weights.items()):
        raise damaged(file, whose, "it holds no state dict")
    return dict(weights)


def read_keys(file: Path, whose: str) -> list[str]:
    """Names of the tensors in a ``.safetensors`` file, whose weights stay unread.

    Raises:
        ConfigError: the file is damaged.
    """
    try:
        with safe_open(file, "pt") as opened:
            return list(opened.keys())
    except UNREADABLE as error:
        raise damaged(file, whose, error) from error


def _is_plain(name: object, value: object) -> bool:
    if not isinstance(name, str) or not isinstance(value, Tensor):
        return False
    return value.layout == torch.strided and value.device.type == "cpu" and not value.is_quantized


def damaged(file: Path, whose: str, reason: object) -> ConfigError:
    """What is said of a file of weights that cannot be read."""
    said = " ".join(str(reason).split())[:200]
    return ConfigError(f"{whose}: {file} cannot be read; download it again. ({said})")
