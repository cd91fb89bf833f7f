"""One of two processes that train with a LossGuard, ``main`` with PIPELINES FOLDER; what each has in the end.

Of three steps the second has a fault, in rank 0's batch alone; and the same without that step.
"""

import sys
from pathlib import Path

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.callbacks import Callback
from test_loss_guard import batches, fit, state

from callbacks.loss_guard import LossGuard

RUNS = {"faulty": (0, 1, 2, 3, 4, 5), "without": (0, 1, 4, 5)}


class Dealt(LightningDataModule):
    """Every other batch, sample 5 spoiled."""

    def __init__(self, numbers):
        super().__init__()
        self.numbers = numbers

    def train_dataloader(self):
        return batches(*self.numbers[self.trainer.global_rank :: 2], spoiled=5)


class Reports(Callback):
    def on_train_end(self, trainer, module):
        guard = next(callback for callback in trainer.callbacks if isinstance(callback, LossGuard))
        found = (guard.skipped, state(module, trainer))
        torch.save(found, f"{trainer.default_root_dir}/rank{trainer.global_rank}.pt")


def main():
    torch.set_num_threads(1)
    pipelines, folder = map(Path, sys.argv[1:])
    for name, numbers in RUNS.items():
        (folder / name).mkdir(exist_ok=True)
        fit(
            pipelines, folder / name, Dealt(numbers), Reports(),
            strategy="ddp", devices=2, use_distributed_sampler=False,
        )  # fmt: skip
