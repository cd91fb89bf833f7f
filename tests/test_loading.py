"""Workers that leave signals alone must still end with their run."""

import subprocess
import sys

FAILING_RUN = """
import torch
from torch.utils.data import Dataset
from datamodules.loading import PairLoader, as_it_is, ignore_signals

class Numbers(Dataset):
    def __len__(self): return 1000
    def __getitem__(self, n): return n

batches = iter(PairLoader(Numbers(), batch_size=2, num_workers=2, collate_fn=as_it_is, worker_init_fn=ignore_signals))
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
