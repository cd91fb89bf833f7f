"""All shards, one by one or side by side; those of an earlier start are not made again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from datamodules.shards.json_files import read_json, write_json
from datamodules.shards.manifest import ShardInfo
from experiments.cli.workers import in_parallel
from experiments.prepare_pickapic import UNITS
from experiments.relabelling.agreement import Judged
from experiments.relabelling.scoring import Relabelling, ShardResult
from lightning_modules.progress import Work


def relabel_all(
    relabelling: Relabelling, workers: int, make: Callable[..., Relabelling], words: Sequence[str], work: Work
) -> list[ShardResult]:
    """Results of all shards, in their order.

    Args:
        relabelling: this process's own.
        workers: processes; with one, this process does it.
        make: what makes it of ``words``, in each of several processes.
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
            found[n] = _relabelled(n, relabelling, work.advance)
    else:
        one = partial(_in_worker, make=make, words=tuple(words))
        kept = f"finished shards stay in {folder}"
        for n, result in in_parallel(one, todo, workers, ["experiments.relabelling.scoring"], kept):
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


def _relabelled(number: int, relabelling: Relabelling, advance: Callable[[int], None]) -> ShardResult:
    result = relabelling.relabel(number, advance)
    write_json(_marker(relabelling.folder, number), _as_json(result))
    return result


def _in_worker(number: int, make: Callable[..., Relabelling], words: tuple[str, ...]) -> ShardResult:
    return _relabelled(number, _of_this_process(make, words), lambda _: None)


@lru_cache(maxsize=1)
def _of_this_process(make: Callable[..., Relabelling], words: tuple[str, ...]) -> Relabelling:
    return make(words)


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
