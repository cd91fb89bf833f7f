"""Checkpoints are whole or not there, bounded in number, and a run goes on from them exactly."""

import os
import random
import signal
import time

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch.utils.data import DataLoader, Sampler, TensorDataset

from callbacks.checkpointing import AtomicCheckpointIO, ExactResume, RunCheckpoint, newest_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore:.*dataloader is not resumable:UserWarning")


class FromHere(Sampler):
    """Sample n at batch n of the run, wherever the run stands: what this framework's data modules do."""

    def __init__(self, module, total):
        self.module, self.total = module, total

    def __len__(self):
        return self.total

    def __iter__(self):
        start = self.module.trainer.fit_loop.epoch_loop.batch_progress.total.processed
        yield from (n % self.total for n in range(start, start + self.total))


class Regression(LightningModule):
    def __init__(self, batches=10):
        super().__init__()
        torch.manual_seed(0)
        self.net = torch.nn.Linear(3, 1)
        data = torch.randn(batches, 3, generator=torch.Generator().manual_seed(1))
        self.data, self.batches = TensorDataset(data, data.sum(1, keepdim=True)), batches

    def training_step(self, batch, batch_idx):
        return (self.net(batch[0]) - batch[1]).square().mean()

    def train_dataloader(self):
        return DataLoader(self.data, sampler=FromHere(self, self.batches))

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.1)


def fit(folder, *callbacks, steps=6, ckpt_path=None, accumulate=1):
    module = Regression()
    checkpointing = any(isinstance(callback, RunCheckpoint) for callback in callbacks)
    trainer = Trainer(
        accelerator="cpu", max_steps=steps, accumulate_grad_batches=accumulate, default_root_dir=folder, logger=False,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=checkpointing,
        callbacks=list(callbacks), plugins=[AtomicCheckpointIO()], use_distributed_sampler=False,
    )  # fmt: skip
    trainer.fit(module, ckpt_path=ckpt_path, weights_only=True)
    return module


def names(folder):
    return sorted(file.name for file in (folder / "checkpoints").iterdir())


def test_a_save_that_fails_leaves_the_former_checkpoint(tmp_path):
    target = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"step": 1}, target)
    with pytest.raises((AttributeError, TypeError), match="pickle"):
        AtomicCheckpointIO().save_checkpoint({"step": 2, "bad": lambda: None}, target)
    assert torch.load(target, weights_only=True) == {"step": 1}
    AtomicCheckpointIO().save_checkpoint({"step": 3}, target)
    assert torch.load(target, weights_only=True) == {"step": 3}
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]


def test_a_killed_writer_leaves_a_checkpoint_that_loads(tmp_path):
    target, rng = tmp_path / "last.ckpt", random.Random(0)
    AtomicCheckpointIO().save_checkpoint({"step": -1}, target)
    for _ in range(8):
        child = os.fork()
        if child == 0:
            step = 0
            while True:
                AtomicCheckpointIO().save_checkpoint({"step": step, "weights": torch.zeros(500_000)}, target)
                step += 1
        time.sleep(rng.uniform(0.01, 0.1))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        torch.load(target, weights_only=True)
        assert newest_checkpoint(tmp_path) == target


def test_the_newest_checkpoint_is_the_one_written_last(tmp_path):
    assert newest_checkpoint(tmp_path / "nothing") is None
    for age, name in ((30, "step=3.ckpt"), (20, "last.ckpt"), (10, "step=1.ckpt"), (0, "step=9.ckpt.part")):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, ns=(10**18 - age, 10**18 - age))
    assert newest_checkpoint(tmp_path) == tmp_path / "step=1.ckpt"


def test_keeps_the_newest_few_and_the_last_and_saves_the_end(tmp_path):
    fit(tmp_path, RunCheckpoint(every_n_steps=2, keep=2), steps=7)
    assert names(tmp_path) == ["last.ckpt", "step=0000006.ckpt", "step=0000007.ckpt"]
    assert torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 7


def test_a_resumed_run_keeps_to_the_same_files(tmp_path):
    fit(tmp_path, RunCheckpoint(every_n_steps=2, keep=2), steps=4)
    fit(
        tmp_path, RunCheckpoint(every_n_steps=2, keep=2), steps=8, ckpt_path=newest_checkpoint(tmp_path / "checkpoints")
    )
    assert names(tmp_path) == ["last.ckpt", "step=0000006.ckpt", "step=0000008.ckpt"]


def test_another_runs_checkpoint_does_not_bring_its_list_of_files(tmp_path):
    fit(tmp_path / "a", RunCheckpoint(every_n_steps=2, keep=1), steps=2)
    start = newest_checkpoint(tmp_path / "a" / "checkpoints")
    fit(tmp_path / "b", RunCheckpoint(every_n_steps=2, keep=1), steps=4, ckpt_path=start)
    assert names(tmp_path / "a") == ["last.ckpt", "step=0000002.ckpt"]
    assert names(tmp_path / "b") == ["last.ckpt", "step=0000004.ckpt"]


class SaveAfterBatch(Callback):
    def __init__(self, batches, path):
        self.batches, self.path = batches, path

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.fit_loop.epoch_loop.batch_progress.total.processed == self.batches:
            trainer.save_checkpoint(self.path)


# Windows of 3 batches, epochs of 10: at 4 and 5 batches one is open, 6 closes one, 10 ends the epoch with a short
# one, and the epoch after begins a new one.
@pytest.mark.parametrize("batches", [4, 5, 6, 10, 12, 14])
def test_a_checkpoint_within_an_accumulation_window_resumes_exactly(tmp_path, batches):
    path = tmp_path / "middle.ckpt"
    whole = fit(tmp_path / "a", SaveAfterBatch(batches, path), ExactResume(), steps=8, accumulate=3)
    resumed = fit(tmp_path / "b", ExactResume(), steps=8, accumulate=3, ckpt_path=path)
    assert torch.equal(whole.net.weight, resumed.net.weight)


def test_without_the_rewind_it_would_not(tmp_path):
    path = tmp_path / "middle.ckpt"
    whole = fit(tmp_path / "a", SaveAfterBatch(5, path), steps=8, accumulate=3)
    resumed = fit(tmp_path / "b", steps=8, accumulate=3, ckpt_path=path)
    assert not torch.equal(whole.net.weight, resumed.net.weight)
