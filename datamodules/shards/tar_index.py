"""Where the members of a tar file lie: a strict reader of headers that is safe with files that anybody made.

It takes plain files in the ustar, GNU and pax formats, as webdataset, tar and Python's tarfile write them. Everything
a sample never is (links, devices, sparse files, names or sizes that need an extension) is named and refused, so that
a header can neither send the reader elsewhere nor keep it busy.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

BLOCK = 512
MAX_EXTENSION_BYTES = 1 << 20
MAX_PADDING_BYTES = 1 << 20  # tar fills up its last record: 10 kB, if not told otherwise
_NAME, _SIZE, _CHECKSUM, _TYPE = slice(0, 100), slice(124, 136), slice(148, 156), slice(156, 157)
_MAGIC, _PREFIX = slice(257, 263), slice(345, 500)
_PAX = (b"x", b"g")
# What a pax header may not change: what a member is called, how long it is, how it is stored.
_PAX_REFUSED = (b" path=", b" size=", b" GNU.sparse")


class TarError(ValueError):
    """Not a whole tar file of plain members; the message says where and why."""


@dataclass(frozen=True)
class Member:
    """A plain file in a tar file: its name, and where its content lies."""

    name: str
    offset: int
    size: int


def members(descriptor: int) -> Iterator[Member]:
    """All members, in order.

    Args:
        descriptor: of an open file; its position doesn't matter and stays.

    Raises:
        TarError: it is truncated, damaged, no tar file, or has members that are no plain files.
    """
    end, position = os.fstat(descriptor).st_size, 0
    while any(header := _read(descriptor, position, BLOCK, end)):
        if _number(header[_CHECKSUM]) != sum(header) - sum(header[_CHECKSUM]) + 8 * ord(" "):
            what = f"no tar header at byte {position}" if position else "no tar file"
            raise TarError(f"damaged or {what}")
        kind, size, name = header[_TYPE], _number(header[_SIZE]), _member_name(header)
        if size is None:
            raise TarError(f"member {name!r} has no size")
        position += BLOCK
        if position + size > end:
            raise TarError(f"truncated inside {name!r}")
        if kind in _PAX:
            _check_extension(_read(descriptor, position, min(size, MAX_EXTENSION_BYTES + 1), end))
        elif kind not in (b"0", b"\0"):
            raise TarError(f"member {name!r} is not a sample: it is a link, a device, a folder or the like")
        else:
            yield Member(name, position, size)
        position += -(-size // BLOCK) * BLOCK
    _check_end(descriptor, position, end)


def _read(descriptor: int, position: int, size: int, end: int) -> bytes:
    data = os.pread(descriptor, size, position)
    if len(data) < size:
        raise TarError(f"truncated: the end of the tar file is missing after {end} bytes")
    return data


def _number(field: bytes) -> int | None:
    """An octal number; None for anything else, the extension for sizes above 8 GB among it."""
    digits = field.strip(b" \0")
    return int(digits, 8) if digits and not digits.strip(b"01234567") else None


def _member_name(header: bytes) -> str:
    parts = [header[_NAME]] if header[_MAGIC] != b"ustar\0" else [header[_PREFIX], header[_NAME]]
    texts = [part.partition(b"\0")[0].decode("ascii", "backslashreplace") for part in parts]
    return "/".join(text for text in texts if text)


def _check_extension(data: bytes) -> None:
    if len(data) > MAX_EXTENSION_BYTES or any(word in data for word in _PAX_REFUSED):
        raise TarError("a pax header renames or resizes a member, or is of unlikely size")


def _check_end(descriptor: int, position: int, end: int) -> None:
    """Two empty blocks, and only padding behind them: a second tar file there would be lost in silence."""
    _read(descriptor, position, 2 * BLOCK, end)
    if end - position > MAX_PADDING_BYTES:  # a file with a hole may have terabytes of zeros that nobody wrote
        raise TarError(f"{end - position} bytes follow the tar file's end at byte {position}, more than any padding")
    while data := os.pread(descriptor, 1 << 20, position):
        if any(data):
            raise TarError(f"something follows the tar file's end at byte {position}; were several put together?")
        position += len(data)
