"""The folder of a run: whether it can be written to, and which of its checkpoints a job starts from."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from lightning.pytorch.utilities.rank_zero import rank_zero_info

from callbacks.resume.checkpoint_files import content_of, damage_reason, newest_checkpoint, newest_intact_checkpoint
from lightning_modules.errors import ConfigError
from lightning_modules.files import resolved_path


def choose_checkpoint(job: str, folder: Path, asked: str | None) -> Path | None:
    """Which file to start from.

    Args:
        job: fit, validate, test or predict.
        folder: the run's checkpoints.
        asked: 'last', 'auto', 'none', a file, or None.

    Raises:
        ConfigError: there is none where one was asked for, or a new run would overwrite an old one.
    """
    fits = job == "fit"
    if asked is None and fits:
        found = newest_checkpoint(folder)
        if found is not None:
            raise ConfigError(
                f"{folder} already holds a run ({found}); go on with --ckpt_path last, or give another --run_dir"
            )
        return None
    if asked in ("last", "auto", None):
        newest = _newest(folder)
        if newest is None and not (fits and asked == "auto"):
            remedy = "start without --ckpt_path" if fits else "fit first, or evaluate with --ckpt_path none"
            raise ConfigError(f"no checkpoint in {folder}; {remedy}, or point --run_dir at the run that you mean")
        return newest
    if asked == "none":
        return None
    file = resolved_path(asked)
    if not file.is_file():
        raise ConfigError(f"checkpoint {asked} does not exist; give a file, or 'last' for the newest in {folder}")
    reason = damage_reason(file)
    if reason is not None:
        raise ConfigError(f"checkpoint {asked} {reason}; give another, or 'last' for the newest in {folder}")
    return file


@runtime_checkable
class NeedsFiles(Protocol):
    """A data module whose position means nothing without files of the run's own."""

    def missing_for(self, checkpoint: Mapping[str, Any], run_dir: Path) -> str | None:
        """What a checkpoint cannot be resumed without and is not there, or None."""


def resumable_checkpoint(data: Any, run_dir: Path, newest: Path | None) -> Path | None:
    """For ``auto``: the newest intact checkpoint that ``data`` can resume from; the ``newest`` unless files are gone.

    Raises:
        ConfigError: there are checkpoints, and it can resume from none.
    """
    if newest is None or not isinstance(data, NeedsFiles) or data.missing_for(content_of(newest), run_dir) is None:
        return newest
    return _newest(run_dir / "checkpoints", partial(data.missing_for, run_dir=run_dir))


def _newest(folder: Path, lacks: Callable[[dict[str, Any]], str | None] | None = None) -> Path | None:
    """The newest whole checkpoint, None where there are none at all; tells of damaged ones.

    Raises:
        ConfigError: all are damaged. Starting anew would not be what was asked for.
    """
    found = newest_intact_checkpoint(folder, lacks)
    if not found.damaged:
        return found.checkpoint
    told = ", ".join(f"{file} {reason}" for file, reason in found.damaged.items())
    if found.checkpoint is None:
        raise ConfigError(
            f"no checkpoint can be used: {told}; bring one back from a copy, or start anew with another --run_dir"
        )
    rank_zero_info(f"{told}; resuming from {found.checkpoint}")
    return found.checkpoint


def check_writable(folder: Path) -> None:
    """Before anything large is built; nothing is made yet.

    Raises:
        ConfigError: the run folder can't be made or written to.
    """
    for place in (folder, folder / "checkpoints"):
        while not os.path.lexists(place):
            place = place.parent
        if not place.is_dir():
            raise ConfigError(f"run folder {folder}: {place} is no folder; give another --run_dir")
        if not os.access(place, os.W_OK | os.X_OK):
            raise ConfigError(f"run folder {folder}: {place} cannot be written to; give another --run_dir")
