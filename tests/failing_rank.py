"""A run of two processes of which one fails while the other does something long: ``failing_rank.py RANK raise|kill``.

The other one sits in no collective that could notice.
"""

import os
import signal
import sys
import time

import torch
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DataLoader

from experiments.cli.orphans import end_with_launcher


class Fails(LightningModule):
    def __init__(self, rank, how):
        super().__init__()
        self.rank, self.how = rank, how
        self.weight = torch.nn.Parameter(torch.ones(1))

    def training_step(self, x, batch_idx):
        if batch_idx == 1:
            if self.global_rank != self.rank:
                time.sleep(1000)
            if self.how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise RuntimeError(f"rank {self.rank} cannot go on")
        return (self.weight * x).sum()

    def configure_optimizers(self):
        return torch.optim.SGD([self.weight], lr=0.1)


if __name__ == "__main__":
    end_with_launcher()
    trainer = Trainer(
        accelerator="cpu", strategy="ddp", devices=2, max_epochs=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False,
    )  # fmt: skip
    trainer.fit(Fails(int(sys.argv[1]), sys.argv[2]), DataLoader([torch.ones(1)] * 4, batch_size=None))
