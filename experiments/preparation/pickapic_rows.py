"""Rows of Pick-a-Pic's parquet files: cut into units, cleaned, and their pictures checked."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet as parquet
from PIL import Image
from rich.progress import Progress

from datamodules.pairs.samples import MAX_EXAMPLES_PER_PROMPT
from datamodules.shards.manifest import LatentsKey
from datamodules.shards.pictures import decode_picture, picture_size
from experiments.preparation.columns import check_columns, plain
from lightning_modules.errors import DataError

REQUIRED = ("jpg_0", "jpg_1", "label_0", "label_1", "caption")
UIDS = ("image_0_uid", "image_1_uid")
SMALL = ("label_0", "label_1", "caption", "has_label", *UIDS)
CARRIED = ("num_example_per_prompt", "ranking_id")
# Every column that is read, and what it holds (see ``columns``).
MEANING = {
    **dict.fromkeys(("jpg_0", "jpg_1"), "picture"),
    **dict.fromkeys(("caption", "model_0", "model_1"), "text"),
    **dict.fromkeys(("image_0_uid", "image_1_uid"), "identity"),
    **dict.fromkeys(("label_0", "label_1", *CARRIED), "number"),
    "has_label": "flag",
}
MAX_NAMED = 20  # damaged rows that the manifest names; more say nothing new
READ_BATCH = 32  # rows in memory at once, per process
Identity = tuple[int, int, int, int, int | float, str]  # of a row without uids, within one process


@dataclass(frozen=True)
class Settings:
    """What decides the shards' contents; a resumed preparation must have the same."""

    shard_size: int = 1000
    keep_ties: bool = False
    limit: int | None = None
    latents: LatentsKey | None = None


@dataclass(frozen=True)
class Unit:
    """A part of one input file that is prepared as a whole.

    Attributes:
        first_row, rows: position in the whole input, and how many rows to read.
        first_shard: number of its first shard; numbers are reserved for the case that every row is kept.
        duplicates: rows, by position in the whole input, that repeat an earlier preference.
        has_uids: whether its rows can name their pictures.
    """

    number: int
    path: str
    row_groups: tuple[int, ...]
    first_row: int
    rows: int
    first_shard: int
    duplicates: frozenset[int] = frozenset()
    has_uids: bool = True


@contextmanager
def open_parquet(path: str | Path) -> Iterator[parquet.ParquetFile]:
    """An open parquet file; whatever is wrong with its bytes is a ``DataError`` with its name."""
    try:
        # A buffer makes pyarrow stream a row group's columns instead of loading them whole.
        with parquet.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False) as file:
            yield file
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"{path} is not a whole parquet file ({reason}); download it again") from error


def plan_units(files: Sequence[Path], shard_size: int, limit: int | None) -> list[Unit]:
    """Cut the input into units, from the files' footers alone.

    Raises:
        DataError: a file is truncated or lacks a column, or there are no rows at all.
    """
    units: list[Unit] = []
    row = shard = 0
    for path in files:
        with open_parquet(path) as file:
            check_columns(path, file.schema_arrow, MEANING, REQUIRED)
            sizes = [file.metadata.row_group(group).num_rows for group in range(file.metadata.num_row_groups)]
            has_uids = all(name in file.schema_arrow.names for name in UIDS)
        for groups in _grouped(sizes, shard_size):
            rows = sum(sizes[group] for group in groups)
            if limit is not None:
                rows = min(rows, limit - row)
            if rows > 0:
                units.append(Unit(len(units), str(path), groups, row, rows, shard, has_uids=has_uids))
                row += rows
                shard += -(-rows // shard_size)
    if not units:
        raise DataError(f"no rows in {', '.join(map(str, files[:3]))} ({len(files)} files); check --input and --limit")
    return units


def _grouped(sizes: Sequence[int], at_least: int) -> Iterator[tuple[int, ...]]:
    """Consecutive row groups with ``at_least`` rows together; the last may have fewer."""
    group: list[int] = []
    for number, _ in enumerate(sizes):
        group.append(number)
        if sum(sizes[member] for member in group) >= at_least:
            yield tuple(group)
            group = []
    if group:
        yield tuple(group)


def _rows(unit: Unit, wanted: Sequence[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """The unit's rows, with their position in the whole input, as far as it has the wanted columns."""
    number, end, folder = unit.first_row, unit.first_row + unit.rows, Path(unit.path).parent
    with open_parquet(unit.path) as file:
        columns = [name for name in wanted if name in file.schema_arrow.names]
        batches = file.iter_batches(READ_BATCH, list(unit.row_groups), columns, use_threads=False)
        for batch in batches:
            for row in batch.to_pylist():
                if number == end:
                    return
                yield number, plain(row, MEANING, folder)
                number += 1


# ------------------------------------------------------------------------------------------------ rows


def preference(row: Mapping[str, Any]) -> float | None:
    """How much the first picture was preferred: 1, 0, or 0.5 for a tie; None if the row has no valid label."""
    first, second = row["label_0"], row["label_1"]
    if row.get("has_label") is False or first not in (0.0, 0.5, 1.0) or second != 1.0 - first:
        return None
    return float(first)


def _identity(row: Mapping[str, Any]) -> tuple[str, ...] | None:
    """What makes two rows the same preference; None for rows without uids."""
    first, second = row.get("image_0_uid"), row.get("image_1_uid")
    if not first or not second:
        return None
    label = preference(row)
    ordered = sorted((first, second)) if label == 0.5 else [first, second] if label == 1.0 else [second, first]
    return (*ordered, row["caption"])


def find_duplicates(units: Sequence[Unit], settings: Settings, progress: Progress) -> list[Unit]:
    """The units with their repeated preferences marked; reads the small columns only, not the pictures."""
    seen: set[bytes] = set()
    marked = []
    task = progress.add_task("looking for duplicates", total=sum(unit.rows for unit in units))
    for unit in units:
        repeated = []
        for number, row in _rows(unit, SMALL) if unit.has_uids else ():
            identity = _identity(row) if _reason_to_drop(row, settings) is None else None
            if identity is not None:
                key = hashlib.blake2b(repr(identity).encode(), digest_size=16).digest()
                if key in seen:
                    repeated.append(number)
                seen.add(key)
        marked.append(replace(unit, duplicates=frozenset(repeated)))
        progress.advance(task, unit.rows)
    progress.remove_task(task)
    return marked


def _reason_to_drop(row: Mapping[str, Any], settings: Settings) -> str | None:
    """The count under which a row is dropped without looking at its pictures."""
    label = preference(row)
    if label is None:
        return "unlabelled_dropped"
    if label == 0.5 and not settings.keep_ties:
        return "ties_dropped"
    return None if row["caption"] else "without_caption_dropped"


@dataclass(frozen=True)
class Pair:
    """A usable row: its encoded pictures, what the sample's json says, and decoded pictures where they are wanted."""

    number: int
    chosen: bytes
    rejected: bytes
    info: dict[str, Any]
    images: tuple[Image.Image, Image.Image] | None


def _pair(number: int, row: Mapping[str, Any], decoded: bool) -> Pair:
    """
    Args:
        decoded: whether its pictures are wanted beside their bytes; if not, they are still looked at in full.

    Raises:
        DataError: a picture is missing or does not decode, or a number is none that the reader takes.
    """
    label = preference(row)
    assert label is not None
    examples = row.get("num_example_per_prompt")
    if examples is not None and not 1 <= examples <= MAX_EXAMPLES_PER_PROMPT:
        raise DataError(f"num_example_per_prompt must lie in [1, {MAX_EXAMPLES_PER_PROMPT:g}], got {examples}")
    first, second = (0, 1) if label >= 0.5 else (1, 0)
    images: list[Image.Image] = []
    sizes = {}
    for side in (first, second):
        if not row[f"jpg_{side}"]:
            raise DataError(f"jpg_{side} is empty")
        try:
            if decoded:
                images.append(decode_picture(row[f"jpg_{side}"]))
            sizes[side] = images[-1].size if decoded else picture_size(row[f"jpg_{side}"])
        except DataError as error:
            raise DataError(f"jpg_{side}: {error}") from error
    info: dict[str, Any] = {"caption": row["caption"], "label": max(label, 1.0 - label), "row": number}
    for role, side in (("chosen", first), ("rejected", second)):
        info[f"{role}_size"] = [sizes[side][1], sizes[side][0]]
        for field, column in (("uid", f"image_{side}_uid"), ("model", f"model_{side}")):
            if row.get(column) is not None:
                info[f"{role}_{field}"] = row[column]
    info.update({name: row[name] for name in CARRIED if row.get(name) is not None})
    return Pair(number, row[f"jpg_{first}"], row[f"jpg_{second}"], info, (images[0], images[1]) if decoded else None)


def usable_pairs(unit: Unit, settings: Settings, counts: Counter[str], corrupt: list[str]) -> Iterator[Pair]:
    """The unit's pairs; what is dropped goes into ``counts`` and the first damaged rows' names into ``corrupt``."""
    seen: set[Identity] = set()
    for number, row in _rows(unit, tuple(MEANING)):
        counts["rows_read"] += 1
        reason = _reason_to_drop(row, settings)
        if reason is None and (number in unit.duplicates or _repeats(row, seen)):
            reason = "duplicates_dropped"
        if reason is not None:
            counts[reason] += 1
            continue
        try:
            pair = _pair(number, row, decoded=settings.latents is not None)
        except DataError as error:
            counts["corrupt_dropped"] += 1
            if len(corrupt) < MAX_NAMED:
                uids = f" ({row['image_0_uid']}, {row.get('image_1_uid')})" if row.get("image_0_uid") else ""
                corrupt.append(f"{Path(unit.path).name}, row {number}{uids}: {error}")
            continue
        counts["ties_kept"] += pair.info["label"] == 0.5
        counts["pairs"] += 1
        yield pair


def _repeats(row: Mapping[str, Any], seen: set[Identity]) -> bool:
    """Whether a row without uids has the caption and the pictures of an earlier one.

    Pictures are compared by Python's own hash of their bytes, ten times as fast as SHA-256: 64 bits with a secret key,
    so that two different ones of a unit share it once in 2**64 comparisons.
    """
    if _identity(row) is not None:
        return False
    first, second = row["jpg_0"] or b"", row["jpg_1"] or b""
    identity = (hash(first), hash(second), len(first), len(second), row["label_0"], row["caption"])
    repeated = identity in seen
    seen.add(identity)
    return repeated
