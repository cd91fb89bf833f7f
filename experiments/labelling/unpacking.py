"""Pairs out of parquet in Pick-a-Pic's form: their pictures are written out as they come to be shown."""

from __future__ import annotations

import io
import threading
from bisect import bisect_right
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet as parquet
from PIL import Image, UnidentifiedImageError

from experiments.labelling.pairs import MEDIA_TYPES, PicturePair
from experiments.labelling.supply import PairSource
from lightning_modules.errors import DataError
from lightning_modules.files import atomic_file

COLUMNS = ("jpg_0", "jpg_1", "caption")
FOLDER = "pictures"


class ParquetPairs(PairSource):
    """The rows of parquet files, whatever labels they have.

    Args:
        files: in their order.
        record_folder: pictures go to its folder ``pictures``, as ``row_0`` and ``row_1`` with their bytes as they are.

    Raises:
        DataError: a file is no parquet, or lacks ``jpg_0``, ``jpg_1`` or ``caption``.
    """

    makes = "unpacked"

    def __init__(self, files: Sequence[Path], record_folder: Path) -> None:
        self._record_folder, self._folder = record_folder, record_folder / FOLDER
        self._groups: list[tuple[Path, int]] = []
        sizes = []
        for path in files:
            try:
                opened = parquet.ParquetFile(path)
            except (pyarrow.ArrowException, OSError) as error:
                raise DataError(f"{path} is no intact parquet file ({' '.join(str(error).split())[:200]})") from error
            missing = [name for name in COLUMNS if name not in opened.schema_arrow.names]
            if missing:
                raise DataError(f"{path} has no column {missing[0]}; expected {', '.join(COLUMNS)}")
            for group in range(opened.num_row_groups):
                self._groups.append((path, group))
                sizes.append(opened.metadata.row_group(group).num_rows)
        self._ends = list(accumulate(sizes))
        self.total = self._ends[-1] if self._ends else 0
        self._there = {path.stem for path in self._folder.iterdir()} if self._folder.is_dir() else set()
        if not self.total:
            raise DataError(f"{files[0].parent}: the parquet files hold no rows; nothing can be shown")

    def ready(self, number: int) -> bool:
        return {f"{number:07d}_0", f"{number:07d}_1"} <= self._there

    def pair(self, number: int, stop: threading.Event) -> PicturePair:
        group = bisect_right(self._ends, number)
        row = number - (self._ends[group - 1] if group else 0)
        path = self._groups[group][0]
        values = _read(*self._groups[group])
        image_0, image_1 = (self._write(path, number, side, values[f"jpg_{side}"][row]) for side in (0, 1))
        return PicturePair.of(image_0, image_1, str(values["caption"][row]), self._record_folder)

    def _write(self, source: Path, number: int, side: int, content: object) -> Path:
        if not isinstance(content, bytes):
            raise DataError(f"{source}, row {number}: jpg_{side} has no bytes of a picture")
        path = self._folder / f"{number:07d}_{side}{_suffix(content)}"
        if not path.exists():
            self._folder.mkdir(parents=True, exist_ok=True)
            with atomic_file(path) as file:
                file.write(content)
        return path


@lru_cache(maxsize=1)
def _read(path: Path, group: int) -> dict[str, list[Any]]:
    try:
        columns: dict[str, list[Any]] = parquet.ParquetFile(path).read_row_group(group, list(COLUMNS)).to_pydict()
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: row group {group} cannot be read ({' '.join(str(error).split())[:200]})") from error
    return columns


def _suffix(content: bytes) -> str:
    """The ending that belongs to the bytes; ".png" for what nobody can show, and the page then says so."""
    try:
        with Image.open(io.BytesIO(content)) as image:
            kind = f"image/{(image.format or '').lower()}"
    except (UnidentifiedImageError, OSError):
        kind = ""
    return next((suffix for suffix, media_type in MEDIA_TYPES.items() if media_type == kind), ".png")
