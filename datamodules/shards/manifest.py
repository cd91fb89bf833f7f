"""What a folder of shards holds and where it came from: ``manifest.json``, written last."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from datamodules.shards.json_files import read_json, write_json
from lightning_modules.errors import DataError

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
MAX_SHARD_SAMPLES = 10_000_000
MIN_SAMPLE_BYTES = 1536  # the headers of two members, and a block of json
_SHARD_FILE = re.compile(r"[\w-][\w.-]{0,200}", re.ASCII)


@dataclass(frozen=True)
class ShardInfo:
    """One tar file: its name in the folder, how many samples it holds, its size, and the hash of its bytes.

    The hash is empty for shards that came without a manifest.
    """

    file: str
    samples: int
    bytes: int
    digest: str = ""

    def __post_init__(self) -> None:
        """
        Raises:
            ValueError: no name of a file in the folder, or numbers that cannot be; manifests are not always ours.
        """
        if not isinstance(self.file, str) or not _SHARD_FILE.fullmatch(self.file) or not isinstance(self.digest, str):
            raise ValueError(f"names a shard outside its folder: {str(self.file)[:80]!r}")
        numbers = self.samples, self.bytes
        if not all(type(number) is int and 0 <= number < 1 << 62 for number in numbers) or not (
            self.samples * MIN_SAMPLE_BYTES <= self.bytes and self.samples <= MAX_SHARD_SAMPLES
        ):
            raise ValueError(f"a shard of {str(self.samples)[:30]} samples and {str(self.bytes)[:30]} bytes")


@dataclass(frozen=True)
class LatentsKey:
    """What made a folder's latents: ``hash`` covers the networks' weights and the other three fields."""

    hash: str
    resolution: int
    crop: str
    dtype: str

    def __post_init__(self) -> None:
        """
        Raises:
            ValueError: fields of other types; manifests are not always ours.
        """
        if type(self.resolution) is not int or not all(isinstance(f, str) for f in (self.hash, self.crop, self.dtype)):
            raise ValueError("its latents' key has fields of other types")


@dataclass(frozen=True)
class Manifest:
    """What a folder of shards holds and where it came from.

    Attributes:
        kind: "pixels", "latents" or "steps", which are pairs, or "pictures", which are single.
        shards: the tar files, in order.
        counts: rows read, pairs kept, and what was dropped, by reason.
        settings: what the shards were made from and with; ``job`` is the hash of these.
        corrupt: names of the first damaged rows.
        latents: set if kind is "latents".
        statistics: numbers about how the samples came about, by name.
    """

    kind: str
    shards: tuple[ShardInfo, ...]
    counts: dict[str, int] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    job: str = ""
    corrupt: tuple[str, ...] = ()
    latents: LatentsKey | None = None
    statistics: dict[str, float] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        write_json(folder / MANIFEST, {"format_version": FORMAT_VERSION, **asdict(self)})

    @staticmethod
    def read(path: Path) -> Manifest:
        """
        Raises:
            DataError: no such file, not JSON, a newer format, or fields missing.
        """
        value = read_json(path)
        version = value.get("format_version")
        if version != FORMAT_VERSION:
            raise DataError(f"{path}: format version {str(version)[:20]}, expected {FORMAT_VERSION}; prepare it again")
        try:
            return Manifest(
                _one_of(value["kind"], ("pixels", "latents", "steps", "pictures")),
                tuple(ShardInfo(**shard) for shard in value["shards"]),
                {str(name): int(count) for name, count in dict(value["counts"]).items()},
                dict(value["settings"]),
                str(value["job"]),
                tuple(map(str, value["corrupt"])),
                LatentsKey(**value["latents"]) if value["kind"] == "latents" else None,
                # Manifests of an earlier version have none.
                {str(name): float(number) for name, number in dict(value.get("statistics", {})).items()},
            )
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            reason = " ".join(str(error).split())[:200]
            raise DataError(f"{path}: not a shard manifest ({reason}); prepare the shards again") from error


def _one_of(value: Any, known: Sequence[str]) -> str:
    if value not in known:
        raise ValueError(f"{str(value)[:80]!r} is none of {', '.join(known)}")
    return str(value)
