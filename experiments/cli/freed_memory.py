"""Memory that a process has freed stays with it, for what comes next."""

from __future__ import annotations

import ctypes
import os
import sys

_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1  # mallopt's numbers of them (malloc.h)
# From so many bytes on, a block comes from the system and goes back to it at once; and so many may lie free at the
# heap's end. Those that glibc arrives at by itself are 32 and 64 MiB.
KEPT_BLOCK, KEPT = 2**29, 2**31 - 1
_SETTINGS = "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_MAX_", "MALLOC_TOP_PAD_", "GLIBC_TUNABLES"


def keep_freed_memory(block: int = KEPT_BLOCK, kept: int = KEPT) -> bool:
    """Keep freed memory rather than give it back to the system, which clears it page by page before it lends it again.

    On a CPU that clearing is an eighth of the time of an SPO pool, and of reading pictures from shards. No result
    changes; up to 2 GiB stay resident. Processes that are forked keep theirs, too. For glibc, Linux's usual C library;
    who has set its environment variables is left alone.

    Args:
        block: bytes up to which a block is kept.
        kept: bytes that may lie free at the heap's end.

    Returns:
        whether it is done.
    """
    if sys.platform != "linux" or any(name in os.environ for name in _SETTINGS):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have none
    return mallopt is not None and bool(mallopt(_MMAP_THRESHOLD, block)) and bool(mallopt(_TRIM_THRESHOLD, kept))
