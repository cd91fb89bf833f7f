"""How data modules load batches: bad samples are replaced and reported, errors come out as they were, and workers
leave signals to the main process."""

from __future__ import annotations

import atexit
import multiprocessing
import signal
import weakref
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from torch.utils.data import DataLoader, Dataset

from datamodules.shards.bad_samples import BadSample, BadSampleError, BadSamples
from datamodules.shards.reader import ShardSet
from lightning_modules.batches import Record
from lightning_modules.errors import DataError


class PairLoader(DataLoader[Any]):
    """A DataLoader that raises a worker's ``DataError`` as it was, not wrapped in a worker's traceback, and hands the
    bad samples that workers met to the main process's count.

    Lightning warns about loaders without a state when a run resumes within an epoch. This one needs none: its
    sampler asks the data module where the run stands.
    """

    def __iter__(self) -> Any:
        with _blocked():
            started = super().__iter__()
        batches = _unpacked(started, getattr(self.dataset, "bad", None))
        _RUNNING.add(batches)
        # After torch's own, so that it runs before: those only ask, and our workers don't listen.
        atexit.unregister(_end_workers)
        atexit.register(_end_workers)
        return batches

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


_RUNNING: weakref.WeakSet[Generator[Any, None, None]] = weakref.WeakSet()


def _end_workers() -> None:
    """At exit, end what is left of this process's daemons: workers of a run that failed or was interrupted.

    multiprocessing would send them SIGTERM, which they ignore, and wait for them for ever. Idle ones end when
    their loader is closed, in silence; torch would report a killed one with a traceback.
    """
    for batches in list(_RUNNING):
        batches.close()
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()


@dataclass(frozen=True)
class LoadResult:
    """What a worker hands on: a batch, or the error in its place, and the bad samples that it met."""

    batch: Any
    skipped: tuple[BadSample, ...]

    def pin_memory(self) -> LoadResult:
        return self if isinstance(self.batch, DataError) else replace(self, batch=self.batch.pin_memory())


def _unpacked(batches: Iterator[Any], bad: BadSamples | None) -> Generator[Any, None, None]:
    for result in batches:
        batch = result
        if isinstance(result, LoadResult):
            if bad is not None:
                bad.add(result.skipped)
            batch = result.batch
        if isinstance(batch, DataError):
            raise batch
        yield batch


class OrderedSamples(Dataset[Any], ABC):
    """Samples in the order in which a run sees them; a bad one can be replaced by a later one."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def item(self, n: int, place: int) -> Any:
        """Item n of the run's stream, with its own draws, made of the sample that stands at ``place``.

        Raises:
            BadSampleError: that sample cannot be used.
        """

    def __getitem__(self, n: int) -> Any:
        return self.item(n, n)


class ShardSamples(OrderedSamples, ABC):
    """Those of one set of shards.

    Attributes:
        shards: from which they are read.
    """

    shards: ShardSet


@dataclass(frozen=True)
class FaultTolerantDataset(Dataset[Any]):
    """Reads a batch at once and hands a ``DataError`` on as a value, which survives the way out of a worker.

    Attributes:
        pairs: what is read.
        bad: the count of bad samples; item n is then made of the first whole sample at n, n + 1, ..., so that what
            replaces a bad one depends on n and the data alone. None makes a bad sample an error.
    """

    pairs: Dataset[Any] | Sequence[Any]
    bad: BadSamples | None = None

    def __len__(self) -> int:
        return len(self.pairs)  # type: ignore[arg-type]  # ours are sized

    def __getitem__(self, n: int) -> Any:
        return self.pairs[n]

    def __getitems__(self, indices: list[int]) -> LoadResult:
        skipped: list[BadSample] = []
        batch: Record | DataError
        try:
            batch = _joined([self._whole(n, skipped) for n in indices])
        except DataError as error:
            batch = DataError(str(error))
        return LoadResult(batch, tuple(skipped))

    def _whole(self, n: int, skipped: list[BadSample]) -> Any:
        if self.bad is None or not isinstance(self.pairs, OrderedSamples):
            return self.pairs[n]
        # One more than may be bad: either a whole sample is among them, or the count ends the run.
        for place in range(n, n + min(self.bad.allowed + 1, len(self.pairs))):
            try:
                return self.pairs.item(n, place)
            except BadSampleError as error:
                skipped.append(error.sample)
        raise DataError(f"{self.bad.source} holds no whole sample in a row of {len(skipped)}; prepare the shards again")


def _joined(samples: Sequence[Record]) -> Record:
    """One batch of batches of one.

    Raises:
        DataError: they do not fit together.
    """
    try:
        return type(samples[0]).cat(samples)
    except ValueError as error:
        raise DataError(
            f"samples of different forms meet in a batch: {error}; they come from different preparations or pools: "
            "prepare them alike, or delete the pool"
        ) from error


def identity(batch: Any) -> Any:
    return batch


IGNORED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT, signal.SIGHUP)


def ignore_signals(worker: int) -> None:
    """For DataLoader workers: a scheduler signals every process of a job, and the main one alone must act on it.

    A forked worker would otherwise die, or run the handlers it inherited and save a stale checkpoint.
    """
    for number in IGNORED:
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def _blocked() -> Iterator[None]:
    """Signals wait: here until the end, in the workers that are started within until they ignore them."""
    former = signal.pthread_sigmask(signal.SIG_BLOCK, IGNORED)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, former)
