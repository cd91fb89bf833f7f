"""Exported folders: written beside their place, cleared away where a writer was killed, readable for the group."""

from __future__ import annotations

import re
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def beside(folder: Path) -> Iterator[Path]:
    """An empty folder next to ``folder``, thus on its file system: to write in, and to rename from. Gone afterwards.

    A killed writer leaves it behind, for the next one to clear away. There is one writer at a time: a run's first
    process. The exports of a run differ in numbers alone (``step=0000100``), and each clears away what others left.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    any_number = re.sub(r"\d+", r"\\d+", re.escape(folder.name))
    for path in folder.parent.iterdir():
        if re.fullmatch(rf"\.{any_number}-unfinished-\w+", path.name):
            shutil.rmtree(path, ignore_errors=True)  # what cannot be deleted is only in the way
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-unfinished-", dir=folder.parent))
    try:
        yield temporary
    finally:
        shutil.rmtree(temporary)


def follow_umask(folder: Path) -> None:
    """Give the files in a folder the mode that new files have; safetensors' can be read by their owner alone."""
    new = folder / ".new"
    new.touch()
    mode = stat.S_IMODE(new.stat().st_mode)
    new.unlink()
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(mode)
