"""Shards of single pictures, liked and not, for tests."""

from __future__ import annotations

from pathlib import Path

from pairs_data import picture

from datamodules.shards.manifest import Manifest
from datamodules.shards.samples import picture_members
from datamodules.shards.writer import write_shard


def write_pictures(folder: Path, liked: bool, sizes: list[int], first: int = 0) -> Path:
    """A prepared folder: picture n has the caption "picture n" and the red n, counted from ``first``."""
    folder.mkdir(parents=True)
    infos, n = [], first
    for number, size in enumerate(sizes):
        samples = [
            (k, picture_members(picture(k, (8, 8)), {"caption": f"picture {k}", "liked": liked}))
            for k in range(n, n + size)
        ]
        infos.append(write_shard(folder / f"{number:05d}.tar", samples))
        n += size
    Manifest("pictures", tuple(infos), {"pictures": n - first}).write(folder)
    return folder


def write_both(folder: Path) -> dict[str, str]:
    """Seven liked pictures, 0 to 6, and six unliked ones, 100 to 105, as the settings of a data module."""
    return {
        "liked": str(write_pictures(folder / "liked", True, [4, 3])),
        "unliked": str(write_pictures(folder / "unliked", False, [6], first=100)),
    }
