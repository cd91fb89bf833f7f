"""A linear regression whose batches depend on where the run stands alone: what resuming and leaving are tried on."""

import os

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from callbacks.resume.checkpoint_files import AtomicCheckpointIO
from callbacks.resume.checkpointing import RunCheckpoint

BATCHES = 10


class FromHere(DistributedSampler):
    """This rank's samples from wherever the run stands on, as this framework's data modules do.

    Lightning leaves a ``DistributedSampler`` alone.
    """

    def __init__(self, trainer):
        super().__init__(range(BATCHES), trainer.world_size, trainer.global_rank, shuffle=False)
        self.trainer = trainer

    def __len__(self):
        return BATCHES

    def __iter__(self):
        start = self.trainer.fit_loop.epoch_loop.batch_progress.total.processed
        for n in range(start, start + BATCHES):
            yield (n * self.num_replicas + self.rank) % BATCHES


def loader(trainer):
    """Batches of one sample; an epoch has 10 on every rank."""
    data = torch.randn(BATCHES, 3, generator=torch.Generator().manual_seed(1))
    return DataLoader(TensorDataset(data, data.sum(1, keepdim=True)), sampler=FromHere(trainer))


class Regression(LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net, self.losses = torch.nn.Linear(3, 1), []

    def training_step(self, batch, batch_idx):
        loss = (self.net(batch[0]) - batch[1]).square().mean()
        self.losses.append(loss.item())
        return loss

    def train_dataloader(self):
        return loader(self.trainer)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.1)


class Validated(Regression):
    def validation_step(self, batch, batch_idx):
        pass

    def val_dataloader(self):
        return DataLoader(torch.zeros(3, 1))


class RegressionData(LightningDataModule):
    def train_dataloader(self):
        return loader(self.trainer)


class Sends(Callback):
    """Sends this process signals when a batch begins; one rank alone, if one is named."""

    def __init__(self, batch, *signals, rank=None):
        self.batch, self.signals, self.rank = batch, signals, rank

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        due = trainer.fit_loop.epoch_loop.batch_progress.total.processed == self.batch
        if due and self.rank in (None, trainer.global_rank):
            for number in self.signals:
                os.kill(os.getpid(), number)


def fit(folder, *callbacks, steps=6, ckpt_path=None, accumulate=1, module=None, **options):
    module = module or Regression()
    checkpointing = any(isinstance(callback, RunCheckpoint) for callback in callbacks)
    defaults = {
        "accelerator": "cpu", "max_steps": steps, "accumulate_grad_batches": accumulate, "default_root_dir": folder,
        "logger": False, "enable_progress_bar": False, "enable_model_summary": False,
        "enable_checkpointing": checkpointing, "callbacks": list(callbacks), "plugins": [AtomicCheckpointIO()],
    }  # fmt: skip
    Trainer(**(defaults | options)).fit(module, ckpt_path=ckpt_path, weights_only=True)
    return module
