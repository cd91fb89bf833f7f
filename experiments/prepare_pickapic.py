"""Pick-a-Pic's parquet files -> shards that ``PreferencePairsDataModule`` reads.

    python -m experiments.prepare_pickapic --input yuvalkirstain/pickapic_v2 --output data/pickapic --workers 16
    python -m experiments.prepare_pickapic --input 'downloads/train-*.parquet' --output data/pickapic --limit 10000
    python -m experiments.prepare_pickapic --input downloads --output data/latents --encode-with dpo_sd15

Input is cut into units: consecutive row groups of one file with about ``--shard-size`` rows. A unit writes its own
shards, then a marker; the manifest comes last. A second run of the same command skips finished units; a command with
other settings or other input is refused. Shard numbers and contents don't depend on ``--workers``.

Beside the shards stand the manifest, and ``captions.json``: each caption once, a prompt file for pools and evaluations.

Dropped and counted: ties, unlabelled rows, rows without a caption, pictures that don't decode, and repeated
preferences (the same preferred picture, other picture and caption; by their uids over the whole input, or by their
bytes within a unit where uids are missing).
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from datamodules.prompts import is_prompt
from datamodules.shards.json_files import read_json, write_json
from datamodules.shards.manifest import MANIFEST, Manifest, ShardInfo
from datamodules.shards.samples import pixel_members
from datamodules.shards.writer import write_shard
from experiments.cli.command import run_command
from experiments.cli.configured_policy import load_policy
from experiments.cli.workers import in_parallel
from experiments.preparation.encoding import encoded, latents_key
from experiments.preparation.inputs import find_inputs
from experiments.preparation.pickapic_rows import (
    MAX_NAMED,
    Pair,
    Settings,
    Unit,
    find_duplicates,
    plan_units,
    usable_pairs,
)
from lightning_modules.errors import ConfigError, DataError
from lightning_modules.files import atomic_file, clear_unfinished, resolved_path

CAPTIONS = "captions.json"  # all captions once, a prompt file for pools and evaluations
UNITS = ".units"  # markers of finished units, in the output folder until the manifest is there


@dataclass(frozen=True)
class UnitResult:
    """What a finished unit's marker says."""

    shards: tuple[ShardInfo, ...]
    counts: dict[str, int]
    corrupt: tuple[str, ...]
    captions: tuple[str, ...]  # different ones, in their order


# ----------------------------------------------------------------------------------------------- units


def prepare_unit(unit: Unit, settings: Settings, folder: Path, config: str | None) -> UnitResult:
    """Write one unit's shards and its marker. Runs in a worker process."""
    counts: Counter[str] = Counter()
    corrupt: list[str] = []
    captions: dict[str, None] = {}
    pairs = _noted(usable_pairs(unit, settings, counts, corrupt), captions)
    if settings.latents is not None:
        assert config is not None
        samples = encoded(pairs, load_policy(config), settings.latents, settings.shard_size)
    else:
        samples = ((pair.number, pixel_members(pair.chosen, pair.rejected, pair.info)) for pair in pairs)
    shards: list[ShardInfo] = []
    for first in samples:
        path = folder / f"{unit.first_shard + len(shards):05d}.tar"
        shards.append(write_shard(path, chain([first], islice(samples, settings.shard_size - 1))))
    result = UnitResult(tuple(shards), dict(counts), tuple(corrupt), tuple(captions))
    write_json(_marker(folder, unit), asdict(result))
    return result


def _noted(pairs: Iterator[Pair], captions: dict[str, None]) -> Iterator[Pair]:
    """Pass pairs on, and keep their captions."""
    for pair in pairs:
        captions[pair.info["caption"]] = None
        yield pair


def _marker(folder: Path, unit: Unit) -> Path:
    return folder / UNITS / f"{unit.number:05d}.json"


def finished(unit: Unit, folder: Path) -> UnitResult | None:
    """The result of a unit that an earlier run completed and whose shards are still whole."""
    marker = _marker(folder, unit)
    if not marker.exists():
        return None
    value = read_json(marker)
    shards = tuple(ShardInfo(**shard) for shard in value["shards"])
    paths = [folder / shard.file for shard in shards]
    if any(not path.exists() or path.stat().st_size != shard.bytes for path, shard in zip(paths, shards, strict=True)):
        return None
    return UnitResult(shards, value["counts"], tuple(value["corrupt"]), tuple(value["captions"]))


def run_units(
    units: Sequence[Unit], settings: Settings, folder: Path, config: str | None, workers: int, progress: Progress
) -> list[UnitResult]:
    """Results of all units, in order; those of an earlier run are not made again."""
    results = {unit.number: result for unit in units if (result := finished(unit, folder)) is not None}
    task = progress.add_task("rows", total=sum(unit.rows for unit in units))
    progress.advance(task, sum(unit.rows for unit in units if unit.number in results))
    todo = [unit for unit in units if unit.number not in results]
    if workers <= 1 or len(todo) <= 1:
        for unit in todo:
            results[unit.number] = prepare_unit(unit, settings, folder, config)
            progress.advance(task, unit.rows)
    else:
        work = partial(prepare_unit, settings=settings, folder=folder, config=config)
        preload = ("datamodules.shards.writer", "pyarrow.parquet", "rich.progress")
        for unit, result in in_parallel(work, todo, workers, preload, f"finished parts stay in {folder}"):
            results[unit.number] = result
            progress.advance(task, unit.rows)
    return [results[unit.number] for unit in units]


# ------------------------------------------------------------------------------------------------ job


def describe_job(files: Sequence[Path], settings: Settings) -> dict[str, Any]:
    """Everything that decides the result. A parquet footer holds every column's sizes and statistics, so its hash
    stands for the file."""
    inputs = [{"name": path.name, "bytes": path.stat().st_size, "footer": _footer_hash(path)} for path in files]
    return {**asdict(settings), "inputs": inputs}


def _footer_hash(path: Path) -> str:
    with path.open("rb") as file:
        file.seek(-8, 2)
        length = int.from_bytes(file.read(4), "little")
        file.seek(-8 - length, 2)
        return hashlib.blake2b(file.read(length), digest_size=16).hexdigest()


def job_hash(job: Mapping[str, Any]) -> str:
    return hashlib.blake2b(repr(sorted(job.items())).encode(), digest_size=16).hexdigest()


def refuse_other(folder: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    changed = [name for name in now if before.get(name) != now[name]]
    if changed:
        named = ", ".join(
            "other input files" if name == "inputs" else f"{name} {before.get(name)} (now {now[name]})"
            for name in changed
        )
        raise ConfigError(
            f"{folder} was prepared with {named}; choose another --output, or delete the folder to prepare it anew"
        )


@contextmanager
def output_folder(folder: Path, job: Mapping[str, Any]) -> Iterator[None]:
    """The folder, ours alone while we write; on failure only finished units stay in it, to be taken up again.

    Raises:
        ConfigError: it holds something else, another job, or another process is writing to it.
        DataError: it cannot be made.
    """
    units = folder / UNITS
    if folder.exists() and not units.exists() and any(folder.iterdir()):
        raise ConfigError(f"--output {folder} is not empty and holds no preparation; choose another folder")
    created = not folder.exists()
    try:
        units.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"cannot make --output {folder}: {error.strerror or error}; choose another folder") from error
    try:
        with (units / "lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise ConfigError(f"another process is preparing {folder}; wait for it") from error
            if (units / "job.json").exists():
                refuse_other(folder, read_json(units / "job.json"), job)
            else:
                write_json(units / "job.json", job)
            for place in (folder, units):  # of a run that was killed; the lock says that none is at work
                clear_unfinished(place)
            yield
    finally:
        if (folder / MANIFEST).exists() or not list(units.glob("[0-9]*.json")):
            shutil.rmtree(units, ignore_errors=True)
        if created and not any(folder.iterdir()):
            folder.rmdir()


def prepare(
    files: Sequence[Path], folder: Path, settings: Settings, config: str | None, workers: int, progress: Progress
) -> Manifest:
    """Prepare ``files`` into ``folder``, or take up where an earlier run stopped.

    Raises:
        DataError: damaged input, or not one usable pair.
        ConfigError: the folder holds another preparation.
    """
    units = plan_units(files, settings.shard_size, settings.limit)
    job = describe_job(files, settings)
    if (folder / MANIFEST).exists():
        manifest = Manifest.read(folder / MANIFEST)
        refuse_other(folder, manifest.settings, job)
        return manifest
    with output_folder(folder, job):
        marked = find_duplicates(units, settings, progress)
        results = run_units(marked, settings, folder, config, workers, progress)
        manifest = _merged(results, job, settings)
        if not manifest.shards:
            for unit in units:
                _marker(folder, unit).unlink(missing_ok=True)
            counts = ", ".join(f"{name} {number}" for name, number in manifest.counts.items() if number)
            first = f"; the first: {manifest.corrupt[0]}" if manifest.corrupt else ""
            where = f"{files[0]}" + (f" and {len(files) - 1} more files" if len(files) > 1 else "")
            raise DataError(f"zero usable pairs in {where} ({counts}){first}; check --input")
        captions = dict.fromkeys(caption for result in results for caption in result.captions if is_prompt(caption))
        with atomic_file(folder / CAPTIONS) as file:
            file.write(json.dumps(list(captions), ensure_ascii=False, indent=0).encode())
        manifest.write(folder)
    return manifest


COUNTS = {
    "rows_read": "rows read",
    "pairs": "pairs kept",
    "ties_kept": "of them ties",
    "ties_dropped": "ties dropped",
    "unlabelled_dropped": "unlabelled rows dropped",
    "without_caption_dropped": "rows without a caption dropped",
    "duplicates_dropped": "duplicates dropped",
    "corrupt_dropped": "rows with corrupt pictures dropped",
}


def _merged(results: Sequence[UnitResult], job: Mapping[str, Any], settings: Settings) -> Manifest:
    counts = {name: sum(result.counts.get(name, 0) for result in results) for name in COUNTS}
    corrupt = [name for result in results for name in result.corrupt][:MAX_NAMED]
    shards = tuple(shard for result in results for shard in result.shards)
    kind = "pixels" if settings.latents is None else "latents"
    return Manifest(kind, shards, counts, dict(job), job_hash(job), tuple(corrupt), settings.latents)


# ---------------------------------------------------------------------------------------- command line


def _parser() -> argparse.ArgumentParser:
    description, _, details = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        prog="python -m experiments.prepare_pickapic",
        description=description,
        epilog=details,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--input", nargs="+", required=True, metavar="IN", help="parquet files, a pattern, their folder, or a hub id")
    add("--split", default="train", help="which files of a folder or hub id: train, validation_unique, ... (train)")
    add_output_options(parser)
    return parser


def add_output_options(parser: argparse.ArgumentParser) -> None:
    """What every preparation of shards can be told about them."""
    add = parser.add_argument
    add(
        "--output",
        type=resolved_path,
        required=True,
        metavar="DIR",
        help="folder for the shards; made where needed",
    )
    add("--shard-size", type=positive, default=1000, metavar="N", help="most pairs in a shard (1000)")
    add("--workers", type=positive, default=1, metavar="N", help="processes; with --encode-with one per GPU (1)")
    add("--limit", type=positive, metavar="N", help="read only the first N rows")
    add("--keep-ties", action="store_true", help="keep ties, label 0.5; only preference-model training can use them")
    add("--encode-with", metavar="CONFIG", help="store this experiment's latents and embeddings, not pictures")
    add("--resolution", type=positive, metavar="PX", help="side of the encoded squares (the policy's own size)")
    add("--dtype", choices=("float16", "float32"), help="number type of stored latents and embeddings (float16)")


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not at least 1")
    return value


def main(argv: Sequence[str] | None = None) -> Manifest:
    """Prepare shards as the command line says and return their manifest.

    Raises:
        UserError: something that the user can mend; the command line shows it as one line.
    """
    args = _parser().parse_args(argv)
    console = Console()
    files = find_inputs(args.input, args.split)
    settings = Settings(args.shard_size, args.keep_ties, args.limit)
    if args.encode_with is not None:
        plan_units(files, args.shard_size, args.limit)  # a bad file should show before the networks are loaded
        key = latents_key(load_policy(args.encode_with), args.resolution, args.dtype or "float16")
        settings = replace(settings, latents=key)
    elif args.resolution is not None or args.dtype is not None:
        raise ConfigError("--resolution and --dtype are for --encode-with; pictures are stored as they are")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        manifest = prepare(files, args.output, settings, args.encode_with, args.workers, progress)
    console.print(_summary(manifest, args.output))
    for name in manifest.corrupt:
        console.print(f"corrupt: {name}", markup=False, highlight=False)
    return manifest


def _summary(manifest: Manifest, folder: Path) -> Table:
    size = sum(shard.bytes for shard in manifest.shards) / 1e6
    table = Table(title=f"{folder}: {len(manifest.shards)} shards of {manifest.kind}, {size:.1f} MB", show_header=False)
    for name, label in COUNTS.items():
        table.add_row(label, str(manifest.counts.get(name, 0)))
    return table


if __name__ == "__main__":
    run_command(main)
