"""Checkpoint files: written complete or not at all, and the newest intact one of a folder."""

from __future__ import annotations

import os
import pickle
import re
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from lightning_modules.errors import DataError
from lightning_modules.files import atomic_file, second_name


class AtomicCheckpointIO(TorchCheckpointIO):
    """A checkpoint appears under its name complete or not at all, see ``atomic_file``."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any | None = None
    ) -> None:
        """
        Raises:
            DataError: the disk does not take it; what was there under this name before is intact.
        """
        with _and_how_to_go_on(Path(path).parent), atomic_file(Path(path)) as file:
            torch.save(checkpoint, file)


def name_twice(checkpoint: Path, path: Path) -> bool:
    """Whether a whole checkpoint has got ``path`` as a second name; see ``second_name``.

    Raises:
        DataError: the disk does not take it.
    """
    with _and_how_to_go_on(path.parent):
        return second_name(checkpoint, path)


@contextmanager
def _and_how_to_go_on(folder: Path) -> Iterator[None]:
    try:
        yield
    except DataError as error:
        older = "the older checkpoints are intact; " if any(folder.glob("*.ckpt")) else ""
        raise DataError(f"{error}; {older}then resume with --resume auto") from error


def newest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint in ``folder`` that the run wrote last, see ``writing_order``; one that cannot be read before all
    others; ``last.ckpt`` where it is as new as any."""
    return next(iter(_newest_first(folder)), None)


@dataclass(frozen=True)
class NewestIntact:
    """What a folder offers to resume from.

    Attributes:
        checkpoint: The newest intact one, or None.
        damaged: What is wrong with those that were passed over for it, by file.
    """

    checkpoint: Path | None
    damaged: dict[Path, str]


def newest_intact_checkpoint(folder: Path, lacks: Callable[[dict[str, Any]], str | None] | None = None) -> NewestIntact:
    """The newest checkpoint that nothing is wrong with.

    Args:
        folder: Where to look.
        lacks: Says of a checkpoint's content what it cannot be resumed without and is not there, or None.
    """
    damaged: dict[Path, str] = {}
    for file in _newest_first(folder):
        reason = damage_reason(file)
        if reason is None and lacks is not None:
            reason = lacks(content_of(file))
        if reason is None:
            return NewestIntact(file, damaged)
        damaged[file] = reason
    return NewestIntact(None, damaged)


def content_of(file: Path) -> dict[str, Any]:
    """What an intact checkpoint holds; its weights are read where they are asked for."""
    content: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    return content


def writing_order(file: Path) -> tuple[int, int] | None:
    """By what a run's checkpoints are ordered: how many saves it had made before, then the step; None: unreadable.

    The run counts its saves itself: file times change when a folder is copied, and a clock may have been wrong. A
    run that went back to an older checkpoint counts on from the newest, so that what it writes is newer than what it
    left behind. Checkpoints of earlier versions have no number and are the oldest.
    """
    try:
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except (*_UNREADABLE, pickle.UnpicklingError, OSError):
        return None
    callbacks = content.get("callbacks") if isinstance(content, dict) else None
    state = callbacks.get("RunCheckpoint") if isinstance(callbacks, dict) else None
    saves = state.get("saves", 0) if isinstance(state, dict) else 0
    step = content.get("global_step", 0) if isinstance(content, dict) else 0
    return (saves, step) if isinstance(saves, int) and isinstance(step, int) else None


def damage_reason(file: Path) -> str | None:
    """What is wrong with a checkpoint file, or None.

    All of it is read and its checksums compared, which finds a file that is empty, cut short anywhere, overwritten, or
    has a changed byte in any weight; then its structure is loaded, without the weights.
    """
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
    def key(file: Path) -> tuple[bool, tuple[int, int], bool]:
        order = writing_order(file)
        return order is None, order or (0, 0), file.name == "last.ckpt"

    return sorted(sorted(folder.glob("*.ckpt"), reverse=True), key=key, reverse=True)
