"""All shards, one by one or side by side; those of an earlier start are not made again."""

from __future__ import annotations

import multiprocessing
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from datamodules.shards.json_files import read_json, write_json
from datamodules.shards.manifest import ShardInfo
from experiments.cli.orphans import end_with
from experiments.prepare_pickapic import UNITS
from experiments.relabelling.agreement import Judged
from experiments.relabelling.scoring import Relabelling, ShardResult
from lightning_modules.errors import UserError
from lightning_modules.progress import Work

_relabelling: Relabelling | None = None  # of a worker process


def relabel_all(
    relabelling: Relabelling, workers: int, make: Callable[..., Relabelling], words: Sequence[str], work: Work
) -> list[ShardResult]:
    """Results of all shards, in their order.

    Args:
        relabelling: this process's own.
        workers: processes; with one, this process does it.
        make: what makes it of ``words`` and a device, in each of several processes.
        words: the command's.
        work: told of the pairs that are done.
    """
    folder, sizes = relabelling.folder, relabelling.shards.sizes
    found = {n: result for n in range(len(sizes)) if (result := finished(folder, n)) is not None}
    if found:
        work.advance(sum(sizes[n] for n in found))
    todo = [n for n in range(len(sizes)) if n not in found]
    if workers <= 1 or len(todo) <= 1:
        for n in todo:
            found[n] = relabelling.relabel(n, work.advance)
            write_json(_marker(folder, n), _as_json(found[n]))
    else:
        for n, result in _side_by_side(todo, min(workers, len(todo)), make, words, folder):
            found[n] = result
            work.advance(sizes[n])
    return [found[n] for n in range(len(sizes))]


def finished(folder: Path, number: int) -> ShardResult | None:
    """The result of a shard that an earlier start completed, and whose file is still whole."""
    marker = _marker(folder, number)
    if not marker.exists():
        return None
    value = read_json(marker)
    result = _of_json(value)
    if result.shard is None:
        return result
    path = folder / result.shard.file
    return result if path.exists() and path.stat().st_size == result.shard.bytes else None


def forget(folder: Path) -> None:
    """What was finished, so that the folder is taken for other settings, too."""
    for marker in (folder / UNITS).glob("[0-9]*.json"):
        marker.unlink()


def device_of(place: int) -> torch.device:
    """The GPU of the process at that place, or the CPU where there is none."""
    count = torch.cuda.device_count()
    return torch.device("cuda", place % count) if count else torch.device("cpu")


def _side_by_side(
    todo: Sequence[int], workers: int, make: Callable[..., Relabelling], words: Sequence[str], folder: Path
) -> Iterator[tuple[int, ShardResult]]:
    # Not forked from here: threads of torch don't survive it.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["experiments.relabelling.scoring"])
    theirs, ours = context.Pipe(duplex=False)
    places = context.Queue()
    for place in range(workers):
        places.put(place)
    pool = ProcessPoolExecutor(workers, context, _begin, (theirs, places, make, list(words)))
    try:
        jobs: dict[Future[dict[str, Any]], int] = {pool.submit(_relabel_one, n): n for n in todo}
        for job in as_completed(jobs):
            yield jobs[job], _of_json(job.result())
    except BrokenProcessPool as error:
        raise UserError(
            f"a worker process was killed, perhaps for want of memory; finished shards stay in {folder}: "
            "run the command again, with fewer --workers"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)
        ours.close()
        theirs.close()
        places.close()


def _begin(main: Connection, places: Any, make: Callable[..., Relabelling], words: Sequence[str]) -> None:
    """Make a worker process ready."""
    global _relabelling
    end_with(main)
    _relabelling = make(words, device_of(places.get()))


def _relabel_one(number: int) -> dict[str, Any]:
    assert _relabelling is not None
    result = _as_json(_relabelling.relabel(number, lambda _: None))
    write_json(_marker(_relabelling.folder, number), result)
    return result


def _marker(folder: Path, number: int) -> Path:
    return folder / UNITS / f"{number:05d}.json"


def _as_json(result: ShardResult) -> dict[str, Any]:
    judged = [[pair.label, pair.first, pair.second] for pair in result.judged]
    shard = None if result.shard is None else asdict(result.shard)
    return {"shard": shard, "counts": dict(result.counts), "corrupt": result.corrupt,
            "captions": list(result.captions), "judged": judged}  # fmt: skip


def _of_json(value: Mapping[str, Any]) -> ShardResult:
    return ShardResult(
        None if value["shard"] is None else ShardInfo(**value["shard"]),
        Counter(value["counts"]),
        list(value["corrupt"]),
        dict.fromkeys(value["captions"]),
        [Judged(*entry) for entry in value["judged"]],
    )
