"""Jobs shared out to worker processes, which end with the one that started them; what is read ahead in a thread."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from multiprocessing.connection import Connection
from typing import TypeVar

from experiments.cli.freed_memory import keep_freed_memory
from experiments.cli.orphans import end_with
from lightning_modules.errors import UserError

Job = TypeVar("Job")
Result = TypeVar("Result")
Item = TypeVar("Item")


def in_parallel(
    work: Callable[[Job], Result], jobs: Sequence[Job], workers: int, preload: Sequence[str], kept: str
) -> Iterator[tuple[Job, Result]]:
    """Every job with what ``work`` makes of it, as they are finished; they are begun in their order.

    Args:
        work: a function of a module, or a ``partial`` of one.
        jobs: what each call is given; like results, they can be pickled.
        workers: processes.
        preload: modules that are imported once for all workers.
        kept: for the message, what a next start finds of this one.

    Raises:
        UserError: a worker was killed; or the first that a job raised.
    """
    # Not forked from here: threads of torch and pyarrow don't survive it. The server imports once for all workers.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(preload))
    theirs, ours = context.Pipe(duplex=False)
    pool = ProcessPoolExecutor(min(workers, len(jobs)), mp_context=context, initializer=_begin, initargs=(theirs,))
    try:
        begun: dict[Future[Result], Job] = {pool.submit(work, job): job for job in jobs}
        for future in as_completed(begun):
            yield begun[future], future.result()
    except BrokenProcessPool as error:
        raise UserError(
            f"a worker process was killed, perhaps for want of memory; {kept}: run the command again, with fewer "
            "--workers"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)
        ours.close()
        theirs.close()


def _begin(main: Connection) -> None:
    keep_freed_memory()
    end_with(main)


def batches_ahead(items: Iterator[Item], size: int) -> Iterator[list[Item]]:
    """Batches of ``size``, the last may have fewer; each is read, in a thread, while the one before is worked on."""
    with ThreadPoolExecutor(1) as reader:
        coming = reader.submit(lambda: list(islice(items, size)))
        while batch := coming.result():
            coming = reader.submit(lambda: list(islice(items, size)))
            yield batch
