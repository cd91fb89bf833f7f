"""Pairs written as parquet in parts: each complete or not at all; the same command again makes the missing ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console

from datamodules.shards.json_files import read_json, write_json
from experiments.preparation.pickapic_schema import SCHEMA
from lightning_modules.errors import ConfigError
from lightning_modules.files import atomic_file, clear_unfinished
from lightning_modules.folder_lock import holds_nothing
from lightning_modules.progress import Work
from lightning_modules.terminal import literal

PART = 256  # pairs per parquet file


def write_parts(
    folder: Path, job: Mapping[str, Any], pairs: int, batch_size: int, rows_of: Callable[[range], list[dict[str, Any]]]
) -> None:
    """Write the missing parts of the data set.

    Args:
        folder: theirs; locked by the caller.
        job: everything that decides the rows; kept as ``job.json``.
        pairs: rows in all.
        batch_size: rows asked for at a time.
        rows_of: the rows of consecutive numbers, as ``SCHEMA`` has them.

    Raises:
        ConfigError: a folder that was begun with another job, or holds something else.
    """
    _begin(folder, job)
    firsts = range(0, pairs, PART)
    missing = {}
    for first in firsts:
        path = folder / f"train-{first // PART:05d}-of-{len(firsts):05d}.parquet"
        numbers = range(first, min(first + PART, pairs))
        if not _is_complete(path, len(numbers)):
            missing[path] = numbers
    done = pairs - sum(map(len, missing.values()))
    with Work("drawing and scoring pair", pairs, done=done, first_line=True, keep=True) as work:
        for path, numbers in missing.items():
            rows = []
            for start in range(0, len(numbers), batch_size):
                batch = numbers[start : start + batch_size]
                rows += rows_of(batch)
                work.advance(len(batch))
            with atomic_file(path) as file:
                pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), file)


def _begin(folder: Path, job: Mapping[str, Any]) -> None:
    """Make the folder this job's, or check that it is."""
    folder.mkdir(parents=True, exist_ok=True)
    clear_unfinished(folder)
    if (folder / "job.json").exists():
        before = read_json(folder / "job.json")
        differ = [name for name in job if before.get(name) != job[name]]
        if differ:
            raise ConfigError(
                f"{folder} was begun with other settings ({', '.join(differ)}; its job.json); name a new --output"
            )
    elif not holds_nothing(folder):
        raise ConfigError(f"{folder} holds other files; name a new --output")
    else:
        write_json(folder / "job.json", job)


def _is_complete(path: Path, rows: int) -> bool:
    """Whether a part is there, with all its rows; one that was cut off since is made again."""
    try:
        return path.exists() and pq.read_metadata(path).num_rows == rows
    except (OSError, pa.ArrowException):
        Console().print(literal(f"{path} is damaged and made again"), soft_wrap=True)
        return False
