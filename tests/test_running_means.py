"""Metrics are means over pairs, whatever their batches and ranks."""

from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers.logger import DummyLogger
from torch.utils.data import DataLoader

from lightning_modules.running_means import RunningMeans
from lightning_modules.training import TrainingModule


def test_batches_weigh_by_their_pairs_and_nan_says_nothing():
    """(3 pairs at 1, 1 pair at 5) -> 2; b has only the second batch; c never had a pair."""
    means, nan = RunningMeans(), torch.tensor(float("nan"))
    means.add({"a": torch.tensor(1.0), "b": nan, "c": nan}, pairs=3)
    means.add({"a": torch.tensor(5.0), "b": torch.tensor(7.0), "c": nan}, pairs=1)
    assert means.compute(lambda sums: sums) == {"a": 2.0, "b": 7.0}
    assert means.compute(lambda sums: sums) == {}


def test_one_reduction_serves_all_ranks():
    """Two ranks with the same sums: the sums double and the means stay."""
    means, calls = RunningMeans(), []
    means.add({"a": torch.tensor(4.0), "b": torch.tensor(6.0)}, pairs=2)
    assert means.compute(lambda sums: calls.append(1) or sums * 2) == {"a": 4.0, "b": 6.0}
    assert calls == [1]


class Quarters(TrainingModule):
    """Step n is worth n; only every third has a pair in the first quarter of the timesteps."""

    def __init__(self):
        schedule = lambda optimizer: torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)  # noqa: E731
        super().__init__(lambda parameters: torch.optim.SGD(parameters, 0.1), schedule, seed=0)
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def training_step(self, batch, batch_idx):
        n = batch.indices.float()
        first = n.mean() if batch_idx % 3 == 0 else torch.tensor(torch.nan)
        self._means["train"].add({"loss": n.mean(), "margin/t0-249": first}, pairs=1)
        return self.weight * 0


class Log(DummyLogger):
    def __init__(self):
        super().__init__()
        self.seen = {}

    def log_metrics(self, metrics, step):
        for name, value in metrics.items():
            self.seen.setdefault(name, {})[step] = value


@pytest.mark.parametrize("accumulated", [1, 2])
def test_a_step_without_a_pair_of_a_kind_logs_nothing_of_that_kind(tmp_path, accumulated):
    """Not the last step's value again: of 7 batches the 0th, 3rd and 6th have one."""
    batches = [SimpleNamespace(indices=torch.tensor([n])) for n in range(7)][: 7 // accumulated * accumulated]
    log = Log()
    Trainer(
        accelerator="cpu", max_epochs=1, logger=log, log_every_n_steps=1, accumulate_grad_batches=accumulated,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
    ).fit(Quarters(), DataLoader(batches, batch_size=None))  # fmt: skip
    expected = {0: 0, 3: 3, 6: 6} if accumulated == 1 else {0: 0, 1: 3}
    assert log.seen["train/margin/t0-249"] == expected
    assert len(log.seen["train/loss"]) == 7 // accumulated
