"""A training step asks a device for its numbers twice: for the metrics, and whether the step is sound."""

from itertools import pairwise
from typing import ClassVar

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger
from tiny_world import make, pairs, trainer
from torch.utils.data import DataLoader

import callbacks.loss_guard
from callbacks.cost import Cost
from callbacks.loss_guard import LossGuard
from callbacks.resume.checkpointing import RunCheckpoint
from callbacks.resume.exact_resume import ExactResume
from callbacks.resume.preemption import Preemption
from callbacks.run_progress import RunProgress
from lightning_modules.batches import StepPairs
from lightning_modules.objectives import DPO, SPO
from lightning_modules.references import AdapterOff
from lightning_modules.schedules.discrete import NoiseSchedule

READS = ("item", "tolist", "__bool__", "__int__", "__float__", "__index__", "cpu", "numpy", "nonzero")


class OnDevice(torch.Tensor):
    """A tensor as if it were on a device: so is what is computed from it, and reads of its numbers are noted."""

    reads: ClassVar[list[str]] = []

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        keys = args[1] if name == "__getitem__" else ()
        masks = [key for key in (keys if isinstance(keys, tuple) else (keys,)) if isinstance(key, torch.Tensor)]
        if name in READS or any(key.dtype == torch.bool for key in masks):
            cls.reads.append(name)
        return super().__torch_function__(function, types, args, kwargs or {})


def count(monkeypatch):
    """From now on what is sent to the CPU counts as sent to a device."""
    to, norm = torch.Tensor.to, callbacks.loss_guard.gradient_norm

    def send(tensor, *args, **kwargs):
        sent = to(tensor, *args, **kwargs)
        asked = any(isinstance(value, torch.device) for value in (*args, *kwargs.values()))
        return sent.as_subclass(OnDevice) if asked else sent

    monkeypatch.setattr(torch.Tensor, "to", send)
    # Backward passes lose the class of a tensor.
    monkeypatch.setattr(callbacks.loss_guard, "gradient_norm", lambda *args: norm(*args).as_subclass(OnDevice))
    OnDevice.reads.clear()


class Reads(Callback):
    """How many there were up to each step's end."""

    def __init__(self, monkeypatch):
        self.counts, self.monkeypatch = [], monkeypatch

    def on_train_start(self, *_):
        count(self.monkeypatch)

    def on_train_batch_end(self, *_):
        self.counts.append(len(OnDevice.reads))


def step_pairs(batches):
    def batch(n):
        draw = torch.Generator().manual_seed(n)
        latents, chosen, rejected = torch.randn(3, 2, 4, 8, 8, generator=draw)
        t = torch.tensor([751, 351])
        return StepPairs(
            latents, chosen, rejected, t, t - 50, ("a", "b"), torch.ones(2), torch.tensor([2 * n, 2 * n + 1])
        )

    return DataLoader([batch(n) for n in range(batches)], batch_size=None)


@pytest.mark.parametrize("objective", [DPO(), SPO()])
def test_a_step_waits_twice(pipelines, tmp_path, monkeypatch, objective):
    module = make(pipelines, reference=AdapterOff(), objective=objective)
    monkeypatch.setattr(NoiseSchedule, "require_random_steps", lambda *_: None)  # SPO asks for it on the host alone
    data = step_pairs(4) if isinstance(objective, SPO) else pairs(4)
    reads = Reads(monkeypatch)
    ours = [Preemption(), ExactResume(), LossGuard(), Cost(), RunCheckpoint(every_n_steps=100), RunProgress(), reads]
    options = {"max_epochs": 1, "log_every_n_steps": 1, "logger": CSVLogger(tmp_path), "enable_progress_bar": True}
    trainer(tmp_path, *ours, **(options | {"enable_checkpointing": True})).fit(module, data)
    per_step = [after - before for before, after in pairwise(reads.counts)]
    assert per_step == [2, 2, 2]
    assert set(OnDevice.reads) == {"tolist"}


def test_reads_are_noted(monkeypatch):
    """The test above would see a mask, a branch and a number that is asked for."""
    count(monkeypatch)
    there = torch.arange(3.0).to(torch.device("cpu"))
    double = 2 * there
    double[double > 1]
    bool((double > 1).any())
    double.sum().item()
    assert OnDevice.reads == ["__getitem__", "__bool__", "item"]
