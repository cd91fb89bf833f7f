"""How every command of this package ends when the user has made a mistake, or ends it."""

from __future__ import annotations

import errno
import io
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any, NoReturn

from lightning_modules.errors import UserError
from lightning_modules.terminal import printable

_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


def run_command(main: Callable[[], Any]) -> None:
    """Call ``main`` for the shell.

    A mistake of the user, or a disk that takes no more, is one line and status 2; a bug of ours a traceback. A signal
    is no line and 128 + its number, with everything closed on the way out; training replaces these handlers by those
    of ``callbacks.resume.preemption``, which save first. A signal that whoever starts this has ignored stays ignored
    until then: under SLURM a job that leaves before it can put itself back into the queue counts as failed.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal that isn't Unicode shows "?" and ends no run
            stream.reconfigure(errors="replace")
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _leave)
    try:
        main()
    except UserError as error:
        _fail(str(error))
    except OSError as error:
        if error.errno not in _DISK:
            raise
        _fail(f"{error.filename or 'writing'}: {error.strerror}; make room, or write to another folder")


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)


def _fail(line: str) -> NoReturn:
    sys.stderr.write("error: " + "\n".join(map(printable, line.split("\n"))) + "\n")
    raise SystemExit(2) from None
