"""A pool of step pairs on disk: chunks of prompts, each written once by one process, and a manifest when all are there.

``<pool>/00012.tar`` holds the pairs of chunk 12, in the order of its prompts, then of the steps; ``00012.json`` is
written after it and says that the chunk is done and what was compared (a chunk without a valid pair has no tar
file). ``manifest.json`` comes last: with it the pool is an ordinary folder of shards of the kind "steps".
"""

from __future__ import annotations

import re
import shutil
import tempfile
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from datamodules.pools.fingerprint import digest
from datamodules.pools.samples import step_samples
from datamodules.shards.json_files import read_json, write_json
from datamodules.shards.locate import open_shards
from datamodules.shards.manifest import MANIFEST, Manifest, ShardInfo
from datamodules.shards.reader import ShardSet
from datamodules.shards.writer import write_shard
from lightning_modules.errors import DataError
from lightning_modules.sampling.comparisons import Comparisons
from lightning_modules.sampling.step_sampler import Rollout

POOL_NAME = re.compile(r"pool-\d{5}-[0-9a-f]{12}")
# A network file system may show a file some seconds after another machine has written it.
VISIBLE_WITHIN_SECONDS = 30.0
COST = ("unet_evaluations", "decodes")  # of a rollout, added up over a pool
QUANTILES = (10, 50, 90, 100)  # of the score gaps, in percent; to choose a threshold by
# A pool's samples come in random order: reopening a shard for each would cost more than an index in memory.
MAX_OPEN_SHARDS = 512
SHARE = "give a folder that all machines share as data.pools_dir"


class PoolFolder:
    """Writes and reads one pool.

    Args:
        path: the pool's own folder.
        chunks: how many chunks of prompts it is made of.
    """

    def __init__(self, path: Path, chunks: int) -> None:
        self.path, self.chunks = path, chunks

    @property
    def finished(self) -> bool:
        return (self.path / MANIFEST).exists()

    def create(self) -> None:
        """
        Raises:
            DataError: the folder cannot be made, or not be written to.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            # One that exists may be read-only, and should say so before hours of sampling.
            with tempfile.TemporaryFile(dir=self.path):
                pass
        except OSError as error:
            raise self._unwritable(error) from error

    def touch(self, name: str) -> None:
        """Leave a file for other processes to look for.

        Raises:
            DataError: it cannot be written.
        """
        try:
            (self.path / name).touch()
        except OSError as error:
            raise self._unwritable(error) from error

    def _unwritable(self, error: OSError) -> DataError:
        return DataError(
            f"cannot make the pool folder {self.path} or write to it: {error.strerror or error}; "
            "give a folder that can be written to as data.pools_dir"
        )

    def appears(self, name: str) -> bool:
        """Whether a file that another process has left appears here."""
        return _comes_true((self.path / name).exists)

    def missing(self) -> list[int]:
        """Chunks that nobody has finished."""
        return [chunk for chunk in range(self.chunks) if not self._record(chunk).exists()]

    def write(
        self, chunk: int, first_key: int, rollout: Rollout, transitions: Sequence[int | float], dtype: torch.dtype
    ) -> None:
        """One chunk, atomically; its record last.

        Args:
            chunk: its number.
            first_key: the number of its first possible pair in the pool; a prompt has ``len(transitions)`` of them.
            rollout: of the chunk's prompts.
            transitions: the timesteps of a trajectory, in order.
            dtype: what latents are stored in.

        Raises:
            DataError: the disk does not take it; nothing is left behind.
        """
        shard = None
        if len(rollout.pairs):
            samples = step_samples(rollout, first_key, transitions, dtype)
            shard = asdict(write_shard(self.path / f"{chunk:05d}.tar", samples))
        cost = {name: getattr(rollout, name) for name in COST}
        write_json(self._record(chunk), {"shard": shard, "comparisons": rollout.comparisons.to_json(), **cost})

    def wait_for_chunks(self) -> None:
        """
        Raises:
            DataError: chunks that other processes have written do not appear here.
        """
        if not _comes_true(lambda: not self.missing()):
            missing = self.missing()
            raise DataError(
                f"{self.path}: {len(missing)} of {self.chunks} chunks (the first is {missing[0]}) that other processes "
                f"wrote do not appear on this machine; {SHARE}"
            )

    def wait_for_manifest(self) -> None:
        """
        Raises:
            DataError: the manifest that rank 0 has written does not appear here.
        """
        if not _comes_true(lambda: self.finished):
            raise DataError(f"{self.path / MANIFEST} does not appear on this machine; {SHARE}")

    def complete(self, settings: Mapping[str, Any]) -> None:
        """Write the manifest, from the records of all chunks."""
        records = [read_json(self._record(chunk)) for chunk in range(self.chunks)]
        try:
            shards = tuple(ShardInfo(**record["shard"]) for record in records if record["shard"] is not None)
            comparisons = Comparisons.cat([_read_comparisons(record) for record in records])
            statistics = _statistics(comparisons, records)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise DataError(f"{self.path}: a chunk's record is damaged ({reason}); delete the pool's folder") from error
        counts = {
            "prompts": len(comparisons) // len(comparisons.timesteps.unique()),
            "comparisons": len(comparisons),
            "pairs": sum(shard.samples for shard in shards),
        }
        manifest = Manifest("steps", shards, counts, dict(settings), digest(settings), statistics=statistics)
        manifest.write(self.path)

    def _record(self, chunk: int) -> Path:
        return self.path / f"{chunk:05d}.json"


def _comes_true(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + VISIBLE_WITHIN_SECONDS
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.2)
    return condition()


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a finished pool.

    Raises:
        DataError: there is none, or the folder holds something else.
    """
    manifest = Manifest.read(folder / MANIFEST)
    if manifest.kind != "steps":
        raise DataError(f"{folder} holds {manifest.kind}, not pairs of denoising steps; name a pool's folder")
    sampler = manifest.settings.get("sampler")
    needed = (
        (manifest.counts, ["pairs", "prompts"]),
        (manifest.statistics, [f"score_gap/quantile{q}" for q in QUANTILES]),
        (sampler if isinstance(sampler, dict) else {}, ["steps", "threshold", "eta", "guidance_scale"]),
    )
    missing = [name for there, names in needed for name in names if name not in there]
    if missing or manifest.counts["pairs"] != sum(shard.samples for shard in manifest.shards):
        raise DataError(f"{folder / MANIFEST} is damaged or no pool's; delete the pool's folder, a run makes it anew")
    return manifest


def open_pool(folder: Path) -> ShardSet:
    """The pairs of a finished pool that has some."""
    return open_shards(str(folder), max_open=MAX_OPEN_SHARDS)


def finished_pools(folder: Path) -> list[Path]:
    """All complete pools below ``folder``, in order."""
    return sorted(path.parent for path in folder.glob(f"*/{MANIFEST}") if POOL_NAME.fullmatch(path.parent.name))


def delete_pools(folder: Path, needed: Collection[str]) -> None:
    """Delete all pools below ``folder`` but those of the ``needed`` names."""
    for path in folder.iterdir():
        if POOL_NAME.fullmatch(path.name) and path.name not in needed:
            shutil.rmtree(path, ignore_errors=True)  # what cannot be deleted is only in the way


def _statistics(comparisons: Comparisons, records: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    quantiles = comparisons.gaps.quantile(torch.tensor(QUANTILES) / 100).tolist()
    cost = {name: float(sum(int(record[name]) for record in records)) for name in COST}
    named = {f"score_gap/quantile{q}": value for q, value in zip(QUANTILES, quantiles)}
    return comparisons.metrics() | cost | named


def _read_comparisons(record: Mapping[str, Any]) -> Comparisons:
    """
    Raises:
        KeyError, TypeError, ValueError, RuntimeError: a record that is not what ``PoolFolder.write`` makes.
    """
    found = Comparisons.from_json(record["comparisons"])
    if not len(found) or not found.gaps.isfinite().all() or not found.scores.isfinite().all():
        raise ValueError(f"{len(found)} comparisons, or gaps or scores that are not finite")
    return found
