"""A resumed run trains at the learning rate that it is started with."""

from __future__ import annotations

import warnings

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from torch.optim.lr_scheduler import LRScheduler

from lightning_modules.lightning_internals import configured_optimizers


class PresentRates(Callback):
    """For a run whose optimizer's or schedule's settings are no longer its checkpoint's: the present ones hold.

    A checkpoint brings back the former ones with the optimizer's moments. They are replaced by those that the module
    configures now, the schedule at the step where the run stands; the moments stay.
    """

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        optimizers, schedulers = configured_optimizers(pl_module)
        for present, running in zip(schedulers, trainer.lr_scheduler_configs):
            if isinstance(present, LRScheduler):
                _advance(present, running.scheduler.last_epoch)
                running.scheduler.load_state_dict(present.state_dict())
        for configured, optimizer in zip(optimizers, trainer.optimizers):
            for wanted, group in zip(configured.param_groups, optimizer.param_groups):
                group.update({name: value for name, value in wanted.items() if name != "params"})


def _advance(scheduler: LRScheduler, steps: int) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")  # nothing is trained here
        for _ in range(steps - scheduler.last_epoch):
            scheduler.step()
