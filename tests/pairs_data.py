"""Small Pick-a-Pic files and shards for the data tests: every picture is one flat colour or a gradient."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet as parquet
from PIL import Image

from datamodules.shards.manifest import Manifest
from datamodules.shards.samples import pixel_members
from datamodules.shards.writer import write_shard


def picture(value: int, size: tuple[int, int] = (16, 16), kind: str = "PNG") -> bytes:
    """An encoded picture (width, height) whose red is ``value`` and whose green rises to the right, blue down."""
    width, height = size
    pixels = np.zeros((height, width, 3), dtype=np.uint8)
    pixels[..., 0] = value
    pixels[..., 1] = np.linspace(0, 255, width, dtype=np.uint8)[None, :]
    pixels[..., 2] = np.linspace(0, 255, height, dtype=np.uint8)[:, None]
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, kind)
    return out.getvalue()


def rows(count: int, start: int = 0, **changes: Any) -> list[dict[str, Any]]:
    """Rows as Pick-a-Pic has them; picture 1 is preferred in odd rows, picture 0 in even ones."""
    return [
        {
            "jpg_0": picture(2 * n % 256, kind="JPEG"),
            "jpg_1": picture((2 * n + 1) % 256, (24, 16)),
            "label_0": float(n % 2 == 0),
            "label_1": float(n % 2 == 1),
            "caption": f"caption {n}",
            "has_label": True,
            "are_different": True,
            "image_0_uid": f"a{n}",
            "image_1_uid": f"b{n}",
            "model_0": "one",
            "model_1": "two",
            "num_example_per_prompt": 3,
            "ranking_id": 100 + n,
            **changes,
        }
        for n in range(start, start + count)
    ]


def write_parquet(path: Path, content: list[dict[str, Any]], row_group_size: int = 4) -> Path:
    parquet.write_table(pyarrow.Table.from_pylist(content), path, row_group_size=row_group_size)
    return path


def write_shards(folder: Path, sizes: list[int], picture_size: tuple[int, int] = (8, 8)) -> Path:
    """A prepared folder of pixel shards: pair n has the caption "caption n" and reds n and n + 128."""
    folder.mkdir()
    infos, n = [], 0
    for number, size in enumerate(sizes):
        samples = [
            (
                k,
                pixel_members(
                    picture(k % 128, picture_size), picture(k % 128 + 128, picture_size), {"caption": f"caption {k}"}
                ),
            )
            for k in range(n, n + size)
        ]
        infos.append(write_shard(folder / f"{number:05d}.tar", samples))
        n += size
    Manifest("pixels", tuple(infos), {"pairs": n}).write(folder)
    return folder
