"""One run at a time in a run folder."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from lightning_modules.folder_lock import locked_folder

RANKS = ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK")  # as launchers name them


def locked_run(job: str, folder: Path, fills: bool = False) -> AbstractContextManager[None]:
    """Within it no other run writes to the folder; the first process of a run holds it for all.

    ``validate`` and ``predict`` write nothing that a run goes by, and the jobs of an array that fill a pool together
    write each a part of its own: they take no lock.

    Raises:
        ConfigError: another run is there.
        DataError: the folder cannot be written to.
    """
    if job not in ("fit", "test") or fills or not is_first_process():
        return nullcontext()
    return locked_folder(folder, "wait for that run to end, or give another --run_dir")


def is_first_process() -> bool:
    """Whether this is the process of a run, or of its job, that the others follow."""
    if "RANK" in os.environ:
        return os.environ["RANK"] == "0"
    return all(os.environ.get(name, "0") == "0" for name in RANKS)
