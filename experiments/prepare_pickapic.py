"""Pick-a-Pic's parquet files -> shards that ``PreferencePairsDataModule`` reads.

    python -m experiments.prepare_pickapic --input yuvalkirstain/pickapic_v2 --output data/pickapic --workers 16
    python -m experiments.prepare_pickapic --input 'downloads/train-*.parquet' --output data/pickapic --limit 10000
    python -m experiments.prepare_pickapic --input downloads --output data/latents --encode-with dpo_sd15

Input is cut into units: consecutive row groups of one file with about ``--shard-size`` rows. A unit writes its own
shards, then a marker; the manifest comes last. A second run of the same command skips finished units; a command with
other settings or other input is refused. Shard numbers and contents don't depend on ``--workers``.

Dropped and counted: ties, unlabelled rows, rows without a caption, pictures that don't decode, and repeated
preferences (the same preferred picture, other picture and caption; by their uids over the whole input, or by their
bytes within a unit where uids are missing).
"""

from __future__ import annotations

import argparse
import fcntl
import glob
import hashlib
import multiprocessing
import re
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow
import pyarrow.parquet as parquet
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from datamodules.shards import (
    MANIFEST,
    LatentsKey,
    Manifest,
    ShardInfo,
    decode_picture,
    latent_members,
    pixel_members,
    read_json,
    write_json,
    write_shard,
)
from experiments.command import run_command
from lightning_modules.errors import ConfigError, DataError, UserError

if TYPE_CHECKING:  # torch's and diffusers' users are imported only where --encode-with asks for them
    from torch import Tensor

    from lightning_modules.policies.base import DiffusionPolicy

REQUIRED = ("jpg_0", "jpg_1", "label_0", "label_1", "caption")
SMALL = ("label_0", "label_1", "caption", "has_label", "image_0_uid", "image_1_uid")
CARRIED = ("num_example_per_prompt", "ranking_id")
OPTIONAL = ("has_label", "image_0_uid", "image_1_uid", "model_0", "model_1", *CARRIED)
MAX_NAMED = 20  # damaged rows that the manifest names; more say nothing new
READ_BATCH = 32  # rows in memory at once, a process
ENCODE_BATCH = 8  # pairs a VAE pass
UNITS = ".units"  # markers of finished units, in the output folder until the manifest is there


# --------------------------------------------------------------------------------------------- settings


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
    """

    number: int
    path: str
    row_groups: tuple[int, ...]
    first_row: int
    rows: int
    first_shard: int
    duplicates: frozenset[int] = frozenset()


@dataclass(frozen=True)
class UnitResult:
    """What a finished unit's marker says."""

    shards: tuple[ShardInfo, ...]
    counts: dict[str, int]
    corrupt: tuple[str, ...]


# ----------------------------------------------------------------------------------------------- input


def find_inputs(inputs: Sequence[str], split: str) -> list[Path]:
    """The parquet files that the command line names, in a fixed order.

    Raises:
        DataError: nothing there, or a folder without the split.
    """
    files: list[Path] = []
    for name in inputs:
        path = Path(name)
        if path.is_dir():
            files += _of_split(path, split)
        elif path.exists():
            files.append(path)
        elif glob.has_magic(name):
            found = sorted(glob.glob(name))  # noqa: PTH207  # Path.glob takes no absolute pattern
            if not found:
                raise DataError(f"--input {name!r} matches no file; check the pattern")
            files += map(Path, found)
        elif re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not name.endswith(".parquet"):
            files += _of_split(_download(name, split), split)
        else:
            raise DataError(f"--input {name!r} does not exist; give parquet files, their folder or a hub id")
    return files


def _of_split(folder: Path, split: str) -> list[Path]:
    """The folder's files of a split, as in ``train-00000-of-00645-<hash>.parquet``; all if no file names a split."""
    found = sorted(folder.rglob("*.parquet"))
    if not found:
        raise DataError(f"{folder} holds no parquet files; check the path or download the data again")
    pattern = re.compile(r"(\w+)-\d+-of-\d+.*\.parquet")
    splits = {path: match.group(1) if (match := pattern.fullmatch(path.name)) else None for path in found}
    mine = [path for path in found if splits[path] == split]
    if not mine and any(splits.values()):
        names = ", ".join(sorted({name for name in splits.values() if name}))
        raise DataError(f"{folder} holds no split {split!r}, only {names}; choose one with --split")
    return mine or found


def _download(repository: str, split: str) -> Path:
    """A snapshot of a hub data set's parquet files of one split, in the hub's own cache."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    patterns = [f"{split}-*.parquet", f"*/{split}-*.parquet"]
    try:
        return Path(snapshot_download(repository, repo_type="dataset", allow_patterns=patterns))
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise DataError(
            f"--input {repository!r} is no file or folder here, and as a hub id it cannot be downloaded "
            f"({' '.join(str(error).split())[:160]}); check the name and the network, or give a folder of parquet files"
        ) from error


@contextmanager
def _parquet(path: str | Path) -> Iterator[parquet.ParquetFile]:
    """An open parquet file; whatever is wrong with its bytes is a ``DataError`` with its name."""
    try:
        # A buffer makes pyarrow stream a row group's columns instead of loading them whole.
        with parquet.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False) as file:
            yield file
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"{path} is not a whole parquet file ({reason}); download it again") from error


def _check_columns(path: Path, schema: pyarrow.Schema) -> None:
    missing = [name for name in REQUIRED if name not in schema.names]
    if missing:
        raise DataError(
            f"{path} has no column {', '.join(missing)}; it has {', '.join(schema.names)}. "
            f"Pick-a-Pic files have {', '.join(REQUIRED)}: check --input"
        )
    for name in ("jpg_0", "jpg_1"):
        kind = schema.field(name).type
        if not (pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind)):
            raise DataError(f"{path}: column {name} is {kind}, expected binary (encoded pictures): check --input")


def plan_units(files: Sequence[Path], shard_size: int, limit: int | None) -> list[Unit]:
    """Cut the input into units, from the files' footers alone.

    Raises:
        DataError: a file is truncated or lacks a column, or there are no rows at all.
    """
    units: list[Unit] = []
    row = shard = 0
    for path in files:
        with _parquet(path) as file:
            _check_columns(path, file.schema_arrow)
            sizes = [file.metadata.row_group(group).num_rows for group in range(file.metadata.num_row_groups)]
        for groups in _grouped(sizes, shard_size):
            rows = sum(sizes[group] for group in groups)
            if limit is not None:
                rows = min(rows, limit - row)
            if rows > 0:
                units.append(Unit(len(units), str(path), groups, row, rows, shard))
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
    number, end = unit.first_row, unit.first_row + unit.rows
    with _parquet(unit.path) as file:
        columns = [name for name in wanted if name in file.schema_arrow.names]
        batches = file.iter_batches(READ_BATCH, list(unit.row_groups), columns, use_threads=False)
        for batch in batches:
            for row in batch.to_pylist():
                if number == end:
                    return
                yield number, row
                number += 1


# ---------------------------------------------------------------------------------------------- rows


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
        for number, row in _rows(unit, SMALL):
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
    """A usable row: encoded and decoded pictures, and what the sample's json says."""

    number: int
    chosen: bytes
    rejected: bytes
    chosen_image: Image.Image
    rejected_image: Image.Image
    info: dict[str, Any]


def _pair(number: int, row: Mapping[str, Any]) -> Pair:
    """
    Raises:
        DataError: a picture is missing or does not decode.
    """
    label = preference(row)
    assert label is not None
    first, second = (0, 1) if label >= 0.5 else (1, 0)
    images = []
    for side in (first, second):
        if not row[f"jpg_{side}"]:
            raise DataError(f"jpg_{side} is empty")
        try:
            images.append(decode_picture(row[f"jpg_{side}"]))
        except DataError as error:
            raise DataError(f"jpg_{side}: {error}") from error
    info: dict[str, Any] = {"caption": row["caption"], "label": max(label, 1.0 - label), "row": number}
    for role, side, image in (("chosen", first, images[0]), ("rejected", second, images[1])):
        info[f"{role}_size"] = [image.height, image.width]
        for field, column in (("uid", f"image_{side}_uid"), ("model", f"model_{side}")):
            if row.get(column) is not None:
                info[f"{role}_{field}"] = row[column]
    info.update({name: row[name] for name in CARRIED if row.get(name) is not None})
    return Pair(number, row[f"jpg_{first}"], row[f"jpg_{second}"], images[0], images[1], info)


def usable_pairs(unit: Unit, settings: Settings, counts: Counter[str], corrupt: list[str]) -> Iterator[Pair]:
    """The unit's pairs; what is dropped goes into ``counts`` and the first damaged rows' names into ``corrupt``."""
    seen: set[bytes] = set()
    for number, row in _rows(unit, (*REQUIRED, *OPTIONAL)):
        counts["rows_read"] += 1
        reason = _reason_to_drop(row, settings)
        if reason is None and (number in unit.duplicates or _repeats(row, seen)):
            reason = "duplicates_dropped"
        if reason is not None:
            counts[reason] += 1
            continue
        try:
            pair = _pair(number, row)
        except DataError as error:
            counts["corrupt_dropped"] += 1
            if len(corrupt) < MAX_NAMED:
                uids = f" ({row['image_0_uid']}, {row.get('image_1_uid')})" if row.get("image_0_uid") else ""
                corrupt.append(f"{Path(unit.path).name}, row {number}{uids}: {error}")
            continue
        counts["ties_kept"] += pair.info["label"] == 0.5
        counts["pairs"] += 1
        yield pair


def _repeats(row: Mapping[str, Any], seen: set[bytes]) -> bool:
    """Whether a row without uids has the caption and the pictures of an earlier one."""
    if _identity(row) is not None:
        return False
    digest = hashlib.blake2b(digest_size=16)
    for part in (row["jpg_0"] or b"", row["jpg_1"] or b"", row["caption"].encode(), str(row["label_0"]).encode()):
        digest.update(len(part).to_bytes(8, "little") + part)
    repeated = digest.digest() in seen
    seen.add(digest.digest())
    return repeated


# -------------------------------------------------------------------------------------------- encoding


def device_of_this_process() -> str:
    """Worker processes take the GPUs in turn."""
    import torch

    if not torch.cuda.is_available():
        return "cpu"
    identity = multiprocessing.current_process()._identity
    return f"cuda:{(identity[0] - 1) % torch.cuda.device_count() if identity else 0}"


@lru_cache(maxsize=1)
def load_policy(config: str) -> DiffusionPolicy:
    """The policy that an experiment's YAML describes, on this process's device.

    Raises:
        ConfigError: no such config, or it describes no policy; missing weights.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    from experiments.cli import OneLineParser
    from experiments.compose import find_config, import_named, load
    from lightning_modules.policies.base import DiffusionPolicy

    path = find_config(config)
    tree = load(path)
    import_named(tree, [])
    settings = OmegaConf.create(tree)
    places = ("model.init_args.policy", "model.policy")
    try:
        nodes = [OmegaConf.select(settings, place) for place in places]
        found = [OmegaConf.to_container(node, resolve=True) for node in nodes if node is not None]
    except OmegaConfBaseException as error:
        raise ConfigError(f"config {path}: {' '.join(str(error).split())}") from error
    if not found:
        raise ConfigError(f"config {path} describes no policy (looked at {' and '.join(places)})")
    parser = OneLineParser(add_help=False)
    parser.add_subclass_arguments(DiffusionPolicy, "policy")
    policy: DiffusionPolicy = parser.instantiate(parser.parse_object({"policy": found[0]})).policy
    return policy.eval().to(device_of_this_process())


def latents_key(policy: DiffusionPolicy, resolution: int | None, dtype: str) -> LatentsKey:
    """What the latents will be keyed by.

    Raises:
        ConfigError: a resolution that the VAE does not divide.
    """
    from datamodules.preference_pairs import latents_fingerprint

    side = policy.image_size if resolution is None else resolution
    if side < 1 or side % policy.downscale:
        raise ConfigError(f"--resolution {side} is not a multiple of the VAE's {policy.downscale} pixels a latent")
    return LatentsKey(latents_fingerprint(policy, side, "centre", dtype), side, "centre", dtype)


def encoded(
    pairs: Iterator[Pair], policy: DiffusionPolicy, key: LatentsKey, shard_size: int
) -> Iterator[tuple[int, dict[str, bytes]]]:
    """Samples of latents and prompt embeddings.

    Latents are the mean of the VAE's posterior, scaled. Each caption's embeddings are stored once a shard.
    """
    import torch

    from datamodules.preference_pairs import PairTransform

    transform, dtype = PairTransform(key.resolution), getattr(torch, key.dtype)
    stored: dict[str, int] = {}
    count = 0
    while batch := list(islice(pairs, ENCODE_BATCH)):
        squares = [transform(pair.chosen_image, pair.rejected_image, None) for pair in batch]
        images = torch.stack([square[0] for square in squares] + [square[1] for square in squares])
        latents = policy.encode_images(images.to(policy.device)).to("cpu", dtype)
        embeds = _embeds(policy, [pair.info["caption"] for pair in batch], dtype)
        for i, pair in enumerate(batch):
            if count % shard_size == 0:
                stored = {}
            owner = stored.setdefault(pair.info["caption"], pair.number)
            info = {
                **pair.info,
                "chosen_time_ids": squares[i][2].tolist(),
                "rejected_time_ids": squares[i][3].tolist(),
                "embeds_key": f"{owner:09d}",
            }
            own = {name: rows[i] for name, rows in embeds.items()} if owner == pair.number else None
            sides = {"chosen": latents[i], "rejected": latents[len(batch) + i]}
            yield pair.number, latent_members(sides, own, info)
            count += 1


def _embeds(policy: DiffusionPolicy, captions: Sequence[str], dtype: Any) -> dict[str, Tensor]:
    """Rows of prompt embeddings; a caption that several pairs of the batch share is encoded once."""
    import torch

    different = list(dict.fromkeys(captions))
    with torch.no_grad():
        cond = policy.encode_prompts(different)
    rows = [different.index(caption) for caption in captions]
    embeds = {"embeds": cond.embeds.to("cpu", dtype)[rows]}
    if cond.pooled is not None:
        embeds["pooled"] = cond.pooled.to("cpu", dtype)[rows]
    return embeds


# ----------------------------------------------------------------------------------------------- units


def prepare_unit(unit: Unit, settings: Settings, folder: Path, config: str | None) -> UnitResult:
    """Write one unit's shards and its marker. Runs in a worker process."""
    counts: Counter[str] = Counter()
    corrupt: list[str] = []
    pairs = usable_pairs(unit, settings, counts, corrupt)
    if settings.latents is not None:
        assert config is not None
        samples = encoded(pairs, load_policy(config), settings.latents, settings.shard_size)
    else:
        samples = ((pair.number, pixel_members(pair.chosen, pair.rejected, pair.info)) for pair in pairs)
    shards: list[ShardInfo] = []
    for first in samples:
        path = folder / f"{unit.first_shard + len(shards):05d}.tar"
        shards.append(write_shard(path, chain([first], islice(samples, settings.shard_size - 1))))
    result = UnitResult(tuple(shards), dict(counts), tuple(corrupt))
    write_json(_marker(folder, unit), asdict(result))
    return result


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
    return UnitResult(shards, value["counts"], tuple(value["corrupt"]))


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
        for unit, result in _in_parallel(todo, settings, folder, config, workers):
            results[unit.number] = result
            progress.advance(task, unit.rows)
    return [results[unit.number] for unit in units]


def _in_parallel(
    todo: Sequence[Unit], settings: Settings, folder: Path, config: str | None, workers: int
) -> Iterator[tuple[Unit, UnitResult]]:
    # Not forked from here: threads of torch and pyarrow don't survive it. The server imports once for all workers.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["datamodules.shards", "pyarrow.parquet", "rich.progress"])
    pool = ProcessPoolExecutor(min(workers, len(todo)), mp_context=context)
    try:
        jobs: dict[Future[UnitResult], Unit] = {
            pool.submit(prepare_unit, unit, settings, folder, config): unit for unit in todo
        }
        for job in as_completed(jobs):
            yield jobs[job], job.result()
    except BrokenProcessPool as error:
        raise UserError(
            f"a worker process was killed, perhaps for want of memory; finished parts stay in {folder}: "
            "run the command again, with fewer --workers"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


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


def _job_hash(job: Mapping[str, Any]) -> str:
    return hashlib.blake2b(repr(sorted(job.items())).encode(), digest_size=16).hexdigest()


def _refuse_other(folder: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
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
                _refuse_other(folder, read_json(units / "job.json"), job)
            else:
                write_json(units / "job.json", job)
            for stale in [*folder.glob(".*.tmp"), *units.glob(".*.tmp")]:
                stale.unlink()  # of a run that was killed; the lock says that none is at work
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
        _refuse_other(folder, manifest.settings, job)
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
    return Manifest(kind, shards, counts, dict(job), _job_hash(job), tuple(corrupt), settings.latents)


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
    add("--output", type=Path, required=True, metavar="DIR", help="folder for the shards; made if it is not there")
    add("--split", default="train", help="which files of a folder or hub id: train, validation_unique, ... (train)")
    add("--shard-size", type=_positive, default=1000, metavar="N", help="most pairs in a shard (1000)")
    add("--workers", type=_positive, default=1, metavar="N", help="processes; with --encode-with one a GPU (1)")
    add("--limit", type=_positive, metavar="N", help="read only the first N rows")
    add("--keep-ties", action="store_true", help="keep ties, label 0.5; only preference-model training can use them")
    add("--encode-with", metavar="CONFIG", help="store this experiment's latents and embeddings, not pictures")
    add("--resolution", type=_positive, metavar="PX", help="side of the encoded squares (the policy's own size)")
    add("--dtype", choices=("float16", "float32"), help="number type of stored latents and embeddings (float16)")
    return parser


def _positive(text: str) -> int:
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
