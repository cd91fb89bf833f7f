"""Workers that leave signals alone must still end with their run."""

import os
import signal
import subprocess
import sys

import pytest
import torch
from torch.utils.data import Dataset

from datamodules.stream.loading import IGNORED, FaultTolerantDataset, PairLoader, identity, ignore_signals
from lightning_modules.batches import Conditioning
from lightning_modules.errors import DataError

FAILING_RUN = """
import torch
from torch.utils.data import Dataset
from datamodules.stream.loading import PairLoader, identity, ignore_signals

class Numbers(Dataset):
    def __len__(self): return 1000
    def __getitem__(self, n): return n

batches = iter(PairLoader(Numbers(), batch_size=2, num_workers=2, collate_fn=identity, worker_init_fn=ignore_signals))
print(next(batches), flush=True)
raise RuntimeError("a step failed while workers were busy")
"""


def test_a_run_that_fails_with_busy_workers_ends():
    """multiprocessing ends daemons with SIGTERM and waits for them: without a remedy, for ever."""
    result = subprocess.run(
        [sys.executable, "-c", FAILING_RUN], capture_output=True, text=True, timeout=240, check=False
    )
    assert result.stdout == "[0, 1]\n"
    assert result.returncode == 1
    assert "a step failed while workers were busy" in result.stderr


class Numbers(Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, n):
        return n


def signalled_at_its_start(worker):
    """A scheduler's signal reaches a worker that has not come to ignore it; torch's own handler would end it."""
    for number in IGNORED:
        os.kill(os.getpid(), number)
    ignore_signals(worker)


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_a_signal_that_hits_a_worker_as_it_starts_is_ignored_too():
    batches = PairLoader(
        Numbers(), batch_size=2, num_workers=2, collate_fn=identity, worker_init_fn=signalled_at_its_start
    )
    assert list(batches) == [[0, 1], [2, 3]]
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, ()) & set(IGNORED)


class Embeddings(list, Dataset):
    """Reading number n fails with what stands there, if it is an error."""

    def __getitem__(self, n):
        item = super().__getitem__(n)
        if isinstance(item, Exception):
            raise item
        return item


def test_samples_of_different_forms_are_one_line_and_other_errors_come_out_as_they_are():
    one, other = Conditioning(torch.zeros(1, 2, 3)), Conditioning(torch.zeros(1, 4, 3))

    def first_batch(*samples):
        return next(iter(PairLoader(FaultTolerantDataset(Embeddings(samples)), batch_size=2, collate_fn=identity)))

    assert len(first_batch(one, one)) == 2
    with pytest.raises(DataError, match=r"different forms meet in a batch: embeds has different shapes, \(2, 3\) and"):
        first_batch(one, other)
    with pytest.raises(ValueError, match="a bug of ours"):
        first_batch(one, ValueError("a bug of ours"))
