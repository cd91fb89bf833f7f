"""How every command of this package ends when the user has made a mistake, or ends it."""

from __future__ import annotations

import errno
import io
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any, NoReturn

from experiments.cli.freed_memory import keep_freed_memory
from lightning_modules.errors import UserError
from lightning_modules.files import os_error
from lightning_modules.terminal import printable

# What a disk, or the way to it, may answer at any time, whatever the program does.
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO, errno.ESTALE, errno.ENODEV, errno.ENXIO,
         errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE)  # fmt: skip


def run_command(main: Callable[[], Any]) -> None:
    """Call ``main`` for the shell.

    A mistake of the user, or a disk that takes no more, is one line and status 2; a bug of ours a traceback. A signal
    is no line and 128 + its number, with everything closed on the way out; training replaces these handlers by those
    of ``callbacks.resume.preemption``, which save first. A signal that whoever starts this has ignored stays ignored
    until then: under SLURM a job that leaves before it can put itself back into the queue counts as failed.
    """
    keep_freed_memory()
    sys.stdout, sys.stderr = _steady(sys.stdout), _steady(sys.stderr)
    threading.excepthook = _thread_failed
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _leave)
    try:
        main()
    except UserError as error:
        _fail(str(error))
    except Exception as error:
        told = _of_disk(error)
        if told is None:
            raise
        _fail(told)


def _of_disk(error: BaseException) -> str | None:
    """The line to tell if it is a disk that failed; closing what was open, it may have failed a second time."""
    reason = os_error(error)
    if reason is None or reason.errno not in _DISK:
        return None
    before = error.__context__
    while before is not None and not isinstance(before, UserError):
        before = before.__context__
    return str(before or f"{reason.filename or 'writing'}: {reason.strerror}; make room, or write to another folder")


def _thread_failed(failure: threading.ExceptHookArgs) -> None:
    """Of a thread that hands its failure on, as TensorBoard's writer does, the one that asked for the work tells."""
    if getattr(failure.thread, "exception", None) is not failure.exc_value:
        threading.__excepthook__(failure)


class _Steady(io.FileIO):
    """Where text is taken as long as somebody reads it: a run does not end because ``| head`` has, or a terminal."""

    def write(self, text: Any) -> int:
        try:
            return super().write(text)
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO):
                raise
            return memoryview(text).nbytes


def _steady(stream: Any) -> Any:
    """The same stream, whose reader may go away, and on which text that it has no characters for is shown as "?"."""
    buffer = getattr(stream, "buffer", None)  # under PYTHONUNBUFFERED the file itself
    if not isinstance(stream, io.TextIOWrapper) or not isinstance(getattr(buffer, "raw", buffer), io.FileIO):
        return stream  # tests read it
    file = io.BufferedWriter(_Steady(stream.fileno(), "wb", closefd=False))
    at_once = stream.line_buffering or stream.write_through
    return io.TextIOWrapper(file, stream.encoding, errors="replace", line_buffering=at_once)


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)


def _fail(line: str) -> NoReturn:
    sys.stderr.write("error: " + "\n".join(map(printable, line.split("\n"))) + "\n")
    raise SystemExit(2) from None
