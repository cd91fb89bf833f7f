"""A process of a run does not outlive the one that started it."""

from __future__ import annotations

import os
import sys
import threading
import time
from contextlib import suppress
from multiprocessing.connection import Connection

GRACE_SECONDS = 10.0  # at a run's end all processes leave, but not in the same moment


def end_with_launcher() -> None:
    """In a process that was started beside a run's first one: end it soon after the first is gone.

    Lightning watches the processes that it has started and ends all of them, the first one too, when one fails. Nobody
    watches the first. Where it fails the others would wait for it in their next collective until the process group's
    time-out, half an hour, and hold their GPUs.
    """
    if os.environ.get("LOCAL_RANK", "0") != "0":
        threading.Thread(target=_watch, args=(os.getppid(),), name="orphan-watch", daemon=True).start()


def end_with(main: Connection) -> None:
    """In a worker of a pool: end it as soon as the process that holds the other end of this pipe is gone.

    A pool's workers wait for their next job on a pipe that they hold open themselves, and nobody else ends them.
    """

    def wait() -> None:
        with suppress(EOFError, OSError):
            main.recv()
        os._exit(1)

    threading.Thread(target=wait, name="orphan-watch", daemon=True).start()


def _watch(launcher: int) -> None:
    while os.getppid() == launcher:
        time.sleep(1.0)
    time.sleep(GRACE_SECONDS)
    rank = os.environ["LOCAL_RANK"]
    sys.stderr.write(f"error: the run's first process ({launcher}) is gone; process {rank} ends, too\n")
    sys.stderr.flush()
    os._exit(1)  # the main thread may wait in a collective, where no exception reaches it
