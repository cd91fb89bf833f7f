"""Checkpoint files: written whole or not at all, and the newest whole one of a folder."""

from __future__ import annotations

import os
import pickle
import re
import struct
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from lightning_modules.errors import DataError
from lightning_modules.files import atomic_file


class AtomicCheckpointIO(TorchCheckpointIO):
    """A checkpoint appears under its name complete or not at all, see ``atomic_file``."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any | None = None
    ) -> None:
        """
        Raises:
            DataError: the disk does not take it; what was there under this name before is whole.
        """
        try:
            with atomic_file(Path(path)) as file:
                torch.save(checkpoint, file)
        except DataError as error:
            older = "the older checkpoints are intact; " if any(Path(path).parent.glob("*.ckpt")) else ""
            raise DataError(f"{error}; {older}then resume with --resume auto") from error


def newest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint in ``folder`` that was written last; ``last.ckpt`` where it is as new as any."""
    return next(iter(_newest_first(folder)), None)


@dataclass(frozen=True)
class Found:
    """What a folder offers to go on from.

    Attributes:
        checkpoint: the newest whole one, or None.
        damaged: what is wrong with the newer ones, by file, newest first.
    """

    checkpoint: Path | None
    damaged: dict[Path, str]


def newest_whole_checkpoint(folder: Path) -> Found:
    """The newest checkpoint that nothing is wrong with."""
    damaged: dict[Path, str] = {}
    for file in _newest_first(folder):
        reason = damage(file)
        if reason is None:
            return Found(file, damaged)
        damaged[file] = reason
    return Found(None, damaged)


def damage(file: Path) -> str | None:
    """What is wrong with a checkpoint file, or None.

    All of it is read and its checksums compared, which finds a file that is empty, cut short anywhere, overwritten, or
    has a changed byte in any weight; then its structure is loaded, without the weights. The folders that sharded
    strategies write are not looked into.
    """
    if file.is_dir():
        return None
    try:
        if file.stat().st_size == 0:
            return "is empty"
        with zipfile.ZipFile(file) as archive:
            broken = archive.testzip()
    except OSError as error:
        return f"cannot be read ({error.strerror or error})"
    except _UNREADABLE:
        return "is cut short or no checkpoint"
    if broken is not None:
        return f"is damaged (checksum of {broken})"
    try:
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except (*_UNREADABLE, pickle.UnpicklingError, OSError):
        return "is no checkpoint that can be loaded"
    if not isinstance(content, dict) or not {"state_dict", "loops", "global_step"} <= content.keys():
        return "holds something other than a run's checkpoint"
    return None


# What zipfile, and torch's reader, raise for bytes that mean nothing.
_UNREADABLE = (zipfile.BadZipFile, zlib.error, struct.error, EOFError, LookupError, ValueError, OverflowError,
               RuntimeError, AttributeError, TypeError)  # fmt: skip
STEP_NAME = re.compile(r"step=\d+\.ckpt")  # as RunCheckpoint calls them


def _newest_first(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.ckpt"), key=lambda file: (written(file), file.name == "last.ckpt"), reverse=True)


def written(file: Path) -> int:
    """When, in nanoseconds."""
    return file.stat().st_mtime_ns
