"""Files: written whole or not at all, cleared away where a writer was killed, and found where they ship with a package.

Every file and folder that a run keeps is written through ``atomic_file`` or ``atomic_folder``. What is unfinished is
called ``.<name>-unfinished-<random>`` and lies beside its place, since a rename is atomic within one file system alone.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import stat
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from lightning_modules.errors import DataError

UNFINISHED = "-unfinished-"
# What a system says where a file can have no second name, or no more of them.
_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK, errno.EXDEV, errno.EINVAL)


def resolved_path(path: str | Path) -> Path:
    """The one path of a file or folder that a user named: without ``~``, links and ``..``; absolute, or seen from the
    working folder if it lies in it, which reads better.

    A shell leaves the ``~`` of ``--run_dir=~/x`` alone, and ``link/../x`` is not beside the link but beside what it
    leads to; who goes by the text finds another folder than who opens it.
    """
    resolved, here = Path(path).expanduser().resolve(), Path.cwd()
    return resolved.relative_to(here) if resolved.is_relative_to(here) else resolved


def os_error(error: BaseException) -> OSError | None:
    """The system's error, of a disk that is full for one, that an error stands for; None if it is of another kind."""
    if isinstance(error, OSError):
        return error
    # The writers of torch and of webdataset follow a failed write with an error of their own.
    if isinstance(error, RuntimeError) and isinstance(error.__context__, OSError):
        return error.__context__
    told = re.search(r"\(os error (\d+)\)", str(error))  # safetensors', which knows none of Python's classes
    return OSError(int(told[1]), os.strerror(int(told[1]))) if told else None


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A file that appears under its name only when it is complete and on the disk; its folder is made where needed.

    Raises:
        DataError: the folder or the disk does not take it; what was there before is intact, nothing else is left.
    """
    temporary = _temporary_sibling(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        _fsync_folder(path.parent)
    except Exception as error:
        reason = os_error(error)
        if reason is None:
            raise
        raise _unwritable(path, reason) from error
    finally:
        with suppress(OSError):  # where it could not be made there is none
            temporary.unlink()


def second_name(existing: Path, path: Path) -> bool:
    """Let ``path`` name the same file, in place of what it named; the disk holds it once.

    It is a hard link: the file stays whole when its other name is deleted or given to a new file, and a process that is
    killed at any point leaves the former or the new one.

    Returns:
        Whether it does; some file systems have no such links, and then nothing has changed.

    Raises:
        DataError: the disk does not take it; what was there before is intact, nothing else is left.
    """
    temporary = _temporary_sibling(path)
    try:
        os.link(existing, temporary)
        temporary.replace(path)
        _fsync_folder(path.parent)
    except OSError as error:
        if error.errno in _NO_LINKS:
            return False
        raise _unwritable(path, error) from error
    finally:
        with suppress(OSError):
            temporary.unlink()
    return True


def _unwritable(path: Path, reason: OSError) -> DataError:
    return DataError(f"cannot write {path}: {reason.strerror or reason}; free some space or choose another folder")


def set_aside(path: Path) -> Path:
    """Rename a damaged file to ``<name>.damaged``, in the place of an earlier one; its new path."""
    return path.replace(path.with_name(f"{path.name}.damaged"))


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """An empty folder to write in; what it holds at the end appears in ``folder``, each entry complete and on the disk.

    A new folder appears at once. In one that exists, entries of the same names are replaced and others stay. Its files
    get the mode that new files have (safetensors' can be read by their owner alone). What killed writers of it left is
    cleared away: there is one writer at a time.

    Raises:
        DataError: the disk does not take it; what was there before is intact, but for entries replaced already.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        clear_unfinished(folder.parent, folder.name)
        temporary = _temporary_sibling(folder)
        temporary.mkdir()
    except OSError as error:
        raise DataError(f"cannot write {folder}: {error.strerror or error}; choose another folder") from error
    try:
        new, old = temporary / "new", temporary / "old"
        new.mkdir()
        yield new
        _settle(new)
        if not folder.exists():
            new.replace(folder)
        else:
            old.mkdir()
            for entry in sorted(new.iterdir()):
                target = folder / entry.name
                if target.is_dir():  # a folder cannot be renamed over a filled one
                    target.replace(old / entry.name)
                entry.replace(target)
            _fsync_folder(folder)
        _fsync_folder(folder.parent)
    except Exception as error:
        reason = os_error(error)
        if reason is None:
            raise
        raise _unwritable(folder, reason) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove_folder(folder: Path) -> None:
    """Delete a folder and all in it; killed in the middle it leaves nothing under its name.

    Raises:
        DataError: the disk does not allow it.
    """
    try:
        doomed = folder.replace(_temporary_sibling(folder))
    except OSError as error:
        raise DataError(f"cannot delete {folder}: {error.strerror or error}") from error
    shutil.rmtree(doomed, ignore_errors=True)


def clear_unfinished(folder: Path, name: str | None = None) -> None:
    """Delete what killed writers left in a folder that has one writer at a time.

    Args:
        folder: where to look.
        name: only what was to be called so, whatever the numbers in it (``step=0000100``); None takes everything.
    """
    wanted = r".+" if name is None else re.sub(r"\d+", r"\\d+", re.escape(name))
    for path in folder.iterdir() if folder.is_dir() else ():
        if re.fullmatch(rf"\.{wanted}{UNFINISHED}\w+", path.name):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)  # what cannot be deleted is only in the way
            else:
                with suppress(OSError):
                    path.unlink()


def _temporary_sibling(path: Path) -> Path:
    return path.with_name(f".{path.name}{UNFINISHED}{uuid.uuid4().hex[:12]}")


def _fsync_folder(folder: Path) -> None:
    """Put the names in a folder on the disk, too: a rename that only memory knows is lost with the power."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _settle(folder: Path) -> None:
    """Give all files in a folder the mode of new files, and put them on the disk."""
    new = folder / ".mode"
    new.touch()
    mode = stat.S_IMODE(new.stat().st_mode)
    new.unlink()
    for path in folder.rglob("*"):
        if path.is_dir():
            _fsync_folder(path)
        else:
            path.chmod(mode)
            with path.open("rb") as file:
                os.fsync(file.fileno())
    _fsync_folder(folder)


_PACKAGED_ROOTS: list[Path] = []


def add_packaged_root(root: Path) -> None:
    """Let ``packaged`` look below a folder, too; ``experiments`` hands in its own."""
    if root not in _PACKAGED_ROOTS:
        _PACKAGED_ROOTS.append(root)


def packaged(name: str | Path) -> Path:
    """Where a name leads: seen from the working folder if there is something, else below a packaged root
    (``embedded/shapes``); the name itself where there is neither."""
    path = Path(name).expanduser()
    for candidate in (path, *(root / path for root in _PACKAGED_ROOTS)):
        if candidate.exists():
            return candidate
    return path
