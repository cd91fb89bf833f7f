"""Pairs written as parquet in parts: each complete or not at all; the same command again makes the missing ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console

from datamodules.shards.json_files import read_json, write_json
from experiments.cli.workers import in_parallel
from experiments.preparation.pickapic_schema import SCHEMA
from lightning_modules.errors import ConfigError
from lightning_modules.files import atomic_file, clear_unfinished
from lightning_modules.folder_lock import holds_nothing
from lightning_modules.progress import Work
from lightning_modules.terminal import literal

PART = 256  # pairs per parquet file


MakeRow = Callable[[], dict[str, Any]]
Part = tuple[Path, range]  # its file, and the numbers of its rows


def write_parts(
    folder: Path,
    job: Mapping[str, Any],
    pairs: int,
    batch_size: int,
    rows_of: Callable[[range], Sequence[MakeRow]],
    workers: int = 1,
) -> None:
    """Write the missing parts of the data set.

    Args:
        folder: theirs; locked by the caller.
        job: everything that decides the rows; kept as ``job.json``.
        pairs: rows in all.
        batch_size: rows asked for at a time.
        rows_of: what makes the rows of consecutive numbers, as ``SCHEMA`` has them, called in threads while the next
            ones are asked for; for several workers it can be pickled.
        workers: processes that the parts are shared out to.

    Raises:
        ConfigError: a folder that was begun with another job, or holds something else.
    """
    _begin(folder, job)
    firsts = range(0, pairs, PART)
    missing: list[Part] = []
    for first in firsts:
        path = folder / f"train-{first // PART:05d}-of-{len(firsts):05d}.parquet"
        numbers = range(first, min(first + PART, pairs))
        if not _is_complete(path, len(numbers)):
            missing.append((path, numbers))
    done = pairs - sum(len(numbers) for _, numbers in missing)
    with Work("drawing and scoring pair", pairs, done=done, first_line=True, keep=True) as work:
        if workers <= 1 or len(missing) <= 1:
            for part in missing:
                _write(part, batch_size, rows_of, work.advance)
        else:
            write = partial(_write, batch_size=batch_size, rows_of=rows_of)
            kept = f"finished parts stay in {folder}"
            for (_, numbers), _ in in_parallel(write, missing, workers, ["callbacks.evaluation.scores"], kept):
                work.advance(len(numbers))


def _write(
    part: Part,
    batch_size: int,
    rows_of: Callable[[range], Sequence[MakeRow]],
    advance: Callable[[int], None] = lambda rows: None,
) -> None:
    path, numbers = part
    with ThreadPoolExecutor() as threads:
        made = []
        for start in range(0, len(numbers), batch_size):
            batch = numbers[start : start + batch_size]
            made += [threads.submit(make) for make in rows_of(batch)]
            advance(len(batch))
        rows = [row.result() for row in made]
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
