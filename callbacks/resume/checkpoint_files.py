"""Checkpoint files: written whole or not at all, and the newest whole one of a folder."""

from __future__ import annotations

import os
import pickle
import re
import struct
import zipfile
import zlib
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from lightning_modules.errors import DataError


class AtomicCheckpointIO(TorchCheckpointIO):
    """A checkpoint appears under its name complete or not at all.

    Written beside its target (a rename is atomic only within one file system; a temporary folder may be on
    another), flushed to the disk, renamed. What a killed writer leaves behind ends in ``.part``.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any | None = None
    ) -> None:
        """
        Raises:
            DataError: the disk does not take it; what was there under this name before is whole.
        """
        target = Path(path)
        part = target.with_name(target.name + ".part")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with part.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            part.replace(target)
        except (OSError, RuntimeError) as error:
            # torch's writer follows a failed write with an error of its own.
            reason = error if isinstance(error, OSError) else error.__context__
            if not isinstance(reason, OSError):
                raise
            raise DataError(
                f"cannot write the checkpoint {target}: {reason.strerror or reason}; older checkpoints there are "
                "whole: make room or move the run folder, then go on with --ckpt_path auto"
            ) from error
        finally:
            with suppress(OSError):
                part.unlink(missing_ok=True)


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
