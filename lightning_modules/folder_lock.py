"""One writer at a time for a folder: a lock that the system takes back when its holder dies, however that happens."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lightning_modules.errors import ConfigError, DataError

log = logging.getLogger(__name__)

_LOCK = ".lock"
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


@contextmanager
def locked_folder(folder: Path, remedy: str) -> Iterator[None]:
    """Within it no other process is within it for the same folder, which is made where needed.

    The lock is this process's alone: processes that it starts or forks don't hold it, so that it ends with this one.
    Where the file system has no locks, a line says so. A folder that is empty at the end and was made here goes again.

    Args:
        folder: To write to.
        remedy: What to do where another process holds it: the end of the message.

    Raises:
        ConfigError: another process holds it.
        DataError: the folder cannot be made, or not be written to.
    """
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = _taken(folder / _LOCK)
    except OSError as error:
        raise DataError(f"cannot write to {folder}: {error.strerror or error}; choose another folder") from error
    if descriptor is None:
        raise ConfigError(f"{folder} is being written to by {_holder(folder / _LOCK)}; {remedy}")
    try:
        yield
    finally:
        with suppress(OSError):
            (folder / _LOCK).unlink()  # while it is held: see _taken
        os.close(descriptor)
        for place in made:
            with suppress(OSError):  # something was written there
                place.rmdir()


def holds_nothing(folder: Path) -> bool:
    """Whether there is nothing in a folder but its lock."""
    return all(path.name == _LOCK for path in folder.iterdir())


def _taken(file: Path) -> int | None:
    """The open and locked file, or None if another process holds it."""
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike flock's, forked workers don't share it
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                os.close(descriptor)
                return None
            if error.errno not in _NO_LOCKS:
                os.close(descriptor)
                raise
            log.warning("%s: this file system has no locks; see to it that nothing else writes there", file.parent)
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), file.stat()):
                os.ftruncate(descriptor, 0)
                os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
                return descriptor
        os.close(descriptor)  # its holder has just deleted it, and another process may hold the next one


def _holder(file: Path) -> str:
    with suppress(OSError):
        return file.read_text(encoding="utf-8", errors="replace").strip() or "another process"
    return "another process"
