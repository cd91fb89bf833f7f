"""How data modules load batches: errors come out as they were, and workers leave signals to the main process."""

from __future__ import annotations

import atexit
import multiprocessing
import signal
import weakref
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch.utils.data import DataLoader, Dataset

from lightning_modules.errors import DataError


class PairLoader(DataLoader[Any]):
    """A DataLoader that raises a worker's ``DataError`` as it was, not wrapped in a worker's traceback.

    Lightning warns about loaders without a state when a run resumes within an epoch. This one needs none: its
    sampler asks the data module where the run stands.
    """

    def __iter__(self) -> Any:
        batches = _raising(super().__iter__())
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


def _raising(batches: Iterator[Any]) -> Generator[Any, None, None]:
    for batch in batches:
        if isinstance(batch, DataError):
            raise batch
        yield batch


@dataclass(frozen=True)
class Caught(Dataset[Any]):
    """Reads a batch at once and hands a ``DataError`` on as a value, which survives the way out of a worker."""

    pairs: Dataset[Any]
    collate: Callable[[Sequence[Any]], Any]

    def __len__(self) -> int:
        return len(self.pairs)  # type: ignore[arg-type]  # ours are sized

    def __getitem__(self, n: int) -> Any:
        return self.pairs[n]

    def __getitems__(self, indices: list[int]) -> Any:
        try:
            return self.collate([self.pairs[n] for n in indices])
        except DataError as error:
            return DataError(str(error))


def as_it_is(batch: Any) -> Any:
    return batch


def ignore_signals(worker: int) -> None:
    """For DataLoader workers: a scheduler signals every process of a job, and the main one alone must act on it.

    A forked worker would otherwise die, or run the handlers it inherited and save a stale checkpoint.
    """
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
