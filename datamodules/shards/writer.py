"""How a shard is written: a tar file of numbered samples, atomically and hashed on the way."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import BinaryIO

import webdataset

from datamodules.shards.manifest import ShardInfo
from lightning_modules.files import atomic_file

KEY_DIGITS = 9


class _HashingFile:
    """Passes bytes on to a file and hashes them on the way."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.hash, self.size = file, hashlib.blake2b(digest_size=16), 0

    def write(self, data: bytes) -> int:
        self.hash.update(data)
        self.size += len(data)
        return self.file.write(data)


def write_shard(path: Path, samples: Iterable[tuple[int, Mapping[str, bytes]]]) -> ShardInfo:
    """Write samples (number, {member name without the key: bytes}) as one tar file, atomically.

    The same samples give the same bytes. Samples are consumed one by one, so a shard is never held in memory.
    """
    count = 0
    with atomic_file(path) as file:
        target = _HashingFile(file)
        with webdataset.TarWriter(target, encoder=False, mtime=0) as tar:
            for number, members in samples:
                tar.write({"__key__": f"{number:0{KEY_DIGITS}d}", **members})
                count += 1
    return ShardInfo(path.name, count, target.size, target.hash.hexdigest())
