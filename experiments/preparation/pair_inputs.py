"""Where people keep preference pairs: tables, folders of pictures, tar files, the page's choices, the hub."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from datamodules.shards.json_files import parse_json
from datamodules.shards.locate import open_shards
from experiments.preparation.inputs import find_inputs
from experiments.preparation.pair_rows import (
    FilePair,
    FromScores,
    Picture,
    Row,
    caption_beside,
    pairs_of_rows,
    refuse_unread,
)
from experiments.preparation.pickapic_rows import REQUIRED
from lightning_modules.errors import DataError
from lightning_modules.files import resolved_path

FORMS = (
    "a .csv, .json, .jsonl, .parquet or .tar file, choices.jsonl of experiments.label, a folder with chosen/NAME.png "
    "and rejected/NAME.png, or a hub id; --help names the columns"
)
PICTURES = (".png", ".jpg", ".jpeg", ".webp")
TABLES = (".csv", ".json", ".jsonl", ".parquet")
READ_BATCH = 32  # rows of a parquet table in memory at once


def is_pickapic(table: Path) -> bool:
    """Whether a table is parquet in Pick-a-Pic's columns, which need no translation.

    Raises:
        DataError: its footer cannot be read.
    """
    if table.suffix.lower() != ".parquet":
        return False
    try:
        names = pq.read_schema(table).names
    except (pa.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"{table} is not a whole parquet file ({reason}); make or download it again") from error
    return all(name in names for name in REQUIRED)


def find_tables(place: str, split: str) -> list[Path]:
    """The files, or the one folder of pictures, that ``--input`` names.

    Raises:
        DataError: nothing is there, or something else.
    """
    path = resolved_path(place)
    if path.is_dir() and (path / "choices.jsonl").is_file():
        return [path / "choices.jsonl"]
    if path.is_dir() and any((path / side).is_dir() for side in ("chosen", "rejected")):
        return [path]
    if path.is_file():
        if path.suffix.lower() not in (*TABLES, ".tar"):
            raise DataError(f"--input {place} is no such table; give {FORMS}")
        return [path]
    try:
        return find_inputs([place], split)
    except DataError as error:
        raise DataError(f"{error}. What can be given: {FORMS}") from error


def read_pairs(place: Path, columns: Mapping[str, str], from_scores: FromScores) -> Iterator[FilePair]:
    """The pairs of a table, a tar file or a folder, in its order.

    Args:
        place: see ``FORMS``.
        columns: a role (see ``pair_rows.ROLES``) and the table's name for it.
        from_scores: what becomes of pictures with scores.

    Raises:
        DataError: a picture that is not there, or a choice, score or prompt that means nothing.
        ConfigError: a column that the table does not have.
    """
    if place.is_dir() or place.suffix.lower() == ".tar":
        refuse_unread(place, columns, from_scores)
        yield from _of_folders(place) if place.is_dir() else _of_tar(place)
    else:
        rows = table_rows(place) if place.suffix.lower() == ".parquet" else _last_choices(list(table_rows(place)))
        yield from pairs_of_rows(place, rows, columns, from_scores)


def table_rows(table: Path) -> Iterator[Row]:
    """The rows of a table, each with its place.

    Raises:
        DataError: it cannot be read, or is no table.
    """
    return _of_parquet(table) if table.suffix.lower() == ".parquet" else _of_text(table)


def _of_folders(folder: Path) -> Iterator[FilePair]:
    sides = [folder / "chosen", folder / "rejected"]
    if not all(side.is_dir() for side in sides):
        raise DataError(f"--input {folder} has no folders chosen and rejected; give {FORMS}")
    chosen, rejected = (
        sorted((path for path in side.iterdir() if path.suffix.lower() in PICTURES), key=lambda path: path.name)
        for side in sides
    )
    by_stem: dict[str, list[Path]] = {}
    for path in rejected:
        by_stem.setdefault(path.stem, []).append(path)
    for first in chosen:
        others = by_stem.pop(first.stem, [])
        if len(others) != 1:
            raise DataError(f"{first}: {len(others)} pictures of that name in {sides[1]}, want one")
        both: list[Picture] = [first, others[0]]
        yield FilePair(first, others[0], caption_beside(both, str(first)), 1.0)
    if by_stem:
        alone = next(iter(by_stem.values()))[0]
        raise DataError(f"{alone}: no picture of that name in {sides[0]}; add it, or remove this one")


def _of_tar(place: Path) -> Iterator[FilePair]:
    shards = open_shards(str(place))
    for n in range(len(shards)):
        sample = shards.read(0, n)
        info = sample.info()
        label = sample.number(info, "label", 0.5, 1.0)
        yield FilePair(sample.picture("chosen"), sample.picture("rejected"), info["caption"], label)


def _of_parquet(table: Path) -> Iterator[Row]:
    try:
        with pq.ParquetFile(table) as file:
            number = 0
            for batch in file.iter_batches(READ_BATCH):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{table}, row {number}", row
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"{table} is not a whole parquet file ({reason}); make or download it again") from error


def _of_text(table: Path) -> Iterator[Row]:
    try:
        text = table.read_bytes().decode("utf-8-sig")
        if table.suffix.lower() == ".csv":
            for number, row in enumerate(csv.DictReader(io.StringIO(text, newline="")), start=2):
                yield f"{table}, line {number}", {name: value for name, value in row.items() if name is not None}
            return
        if table.suffix.lower() == ".jsonl":
            found = [parse_json(line) for line in text.split("\n") if line.strip()]
        else:
            found = parse_json(text)
    except (OSError, ValueError, csv.Error) as error:
        raise DataError(f"cannot read {table}: {' '.join(str(error).split())[:200]}") from error
    if not isinstance(found, list) or not all(isinstance(row, dict) for row in found):
        raise DataError(f"{table} is no list of JSON objects; give {FORMS}")
    yield from ((f"{table}, row {number}", row) for number, row in enumerate(found, start=1))


def _last_choices(rows: list[Row]) -> list[Row]:
    """Of the page's record the last line of each pair and person; what was skipped or taken back is no choice."""
    if not rows or "annotator" not in rows[0][1]:
        return rows
    last: dict[str, Row] = {}
    for place, row in rows:
        last[repr([row.get(name) for name in ("image_0", "image_1", "prompt", "annotator")])] = (place, row)
    return [(place, row) for place, row in last.values() if row.get("choice") is not None]
