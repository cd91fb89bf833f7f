"""What every module under training does alike: keyed draws, metrics once a step, checkpoints of what trains."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor

from lightning_modules.errors import ConfigError
from lightning_modules.lightning_internals import update_step_logs
from lightning_modules.optimizers import lay_out_moments
from lightning_modules.randomness import derive_seed, generator, seed_global_generators
from lightning_modules.running_means import RunningMeans
from lightning_modules.weights.audit import mismatch
from lightning_modules.weights.averaging import ExponentialMovingAverage


class TrainingModule(LightningModule):
    """Trains those of its parameters that require gradients, and saves no others.

    Batches have ``indices``, the positions of their samples in the run: all draws are keyed by them, so that neither
    batch size, accumulation, ranks nor restarts change any. Metrics that a step adds to ``_means`` are logged once per
    optimizer step (``train``) or once per validation (``val``), as means over batches and ranks.

    What is logged per step goes to the loggers as it is: ``LightningModule.log`` would take a device's time for every
    number, and repeat the last value of one that a step does not have (a quarter of the timesteps, for one).

    Args:
        optimizer: an optimizer of the parameters that require gradients.
        lr_scheduler: stepped once an optimiser step.
        seed: seed of all draws.
        ema: keeps an average of the trained weights, if set.

    Raises:
        ConfigError: on load, a checkpoint whose weights are not exactly those under training.
    """

    strict_loading = False  # checkpoints hold trainable weights only; on_load_checkpoint audits the keys

    def __init__(
        self,
        optimizer: OptimizerCallable,
        lr_scheduler: LRSchedulerCallable,
        seed: int,
        ema: ExponentialMovingAverage | None = None,
    ) -> None:
        super().__init__()
        self.make_optimizer, self.make_lr_scheduler, self.seed, self.ema = optimizer, lr_scheduler, seed, ema
        self._means = {"train": RunningMeans(), "val": RunningMeans()}
        self._step_metrics: dict[str, float] = {}
        self._written = True

    def on_train_start(self) -> None:
        for optimizer in self.trainer.optimizers:
            lay_out_moments(optimizer)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self._step_metrics, self._written = {}, False
        # Network dropout is the one draw that comes from the global generator.
        seed_global_generators(derive_seed(self.seed, "dropout", int(batch.indices[0])), self.device)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Log once per optimizer step, before a checkpoint can hold it: means over its batches and ranks."""
        self._log_step_means()

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.write_step_metrics()

    def note(self, metrics: Mapping[str, float]) -> None:
        """Numbers of the optimizer step at hand: for the loggers, and at once for the trainer's own metrics."""
        self._step_metrics |= metrics
        tensors = {name: torch.tensor(value) for name, value in metrics.items()}
        self.trainer.callback_metrics.update(tensors)
        self.trainer.logged_metrics.update(tensors)

    def write_step_metrics(self) -> None:
        """Hand what was noted of the step that just ended to the loggers, once, every ``log_every_n_steps``."""
        trainer = self.trainer
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]  # put there by a connector
        due = every and (trainer.global_step % every == 0 or trainer.should_stop)
        if not self._step_metrics or self._written or not due:
            return
        self._written = True
        for logger in trainer.loggers:
            logger.log_metrics(self._step_metrics | {"epoch": trainer.current_epoch}, trainer.global_step - 1)
            logger.save()

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        if self.ema is not None:  # here, since callbacks save and draw before this module hears of the batch's end
            self.ema.update(self._trained())

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within it the trained weights are their average, if one is kept: for pictures and exports."""
        if self.ema is None:
            yield
            return
        with self.ema.in_place_of(self._trained()):
            yield

    def on_validation_epoch_end(self) -> None:
        for name, value in self._compute_means("val").items():
            shown = name in ("loss", "accuracy")
            self.log(f"val/{name}", value, on_step=False, on_epoch=True, prog_bar=shown, batch_size=1)

    def _log_step_means(self) -> dict[str, float]:
        means = self._compute_means("train")
        self.note({f"train/{name}": value for name, value in means.items()})
        shown = {f"train/{name}": means[name] for name in ("loss", "accuracy") if name in means}
        self.trainer.progress_bar_metrics.update(shown)
        return means

    def _compute_means(self, stage: str) -> dict[str, float]:
        return self._means[stage].compute(lambda sums: self.trainer.strategy.reduce(sums, reduce_op="sum"))

    def _generators(self, batch: Any, *purpose: str) -> list[torch.Generator]:
        """One generator per sample of the batch, for draws of one purpose."""
        return [generator(self.seed, *purpose, index) for index in batch.indices.tolist()]

    def _trained(self) -> dict[str, Tensor]:
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}

    def configure_optimizers(self) -> Any:
        trained = list(self._trained().values())
        rounded = {parameter.dtype for parameter in trained} - {torch.float32}
        if rounded:
            raise ConfigError(
                f"trainable weights must be fp32, trainer.precision={self.trainer.precision} makes them "
                f"{rounded.pop()}; use bf16-mixed or 16-mixed, and policy.frozen_dtype for the frozen ones"
            )
        optimizer = self.make_optimizer(trained)
        scheduler = self.make_lr_scheduler(optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def trainable_names(self) -> set[str]:
        return set(self._trained())

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the trainable weights; everything frozen comes back from where it came from."""
        wanted = self.trainable_names()
        checkpoint["state_dict"] = {name: value for name, value in checkpoint["state_dict"].items() if name in wanted}
        if self.ema is not None:
            checkpoint["ema"] = self.ema.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        difference = mismatch(self._trained(), checkpoint["state_dict"])
        if difference is not None:
            raise ConfigError(
                f"checkpoint: its trainable weights are not this policy's: {difference}; "
                "resume with the base model and adaptation that wrote it"
            )
        if self.ema is not None and "ema" in checkpoint:
            self.ema.load_state_dict(checkpoint["ema"])
        elif self.ema is not None:
            rank_zero_info("the checkpoint holds no average of its weights: a new one starts here")


def note_step(module: LightningModule, metrics: Mapping[str, float]) -> None:
    """Log numbers of the optimizer step at hand, whatever kind of module trains."""
    if isinstance(module, TrainingModule):
        module.note(metrics)
    else:
        module.log_dict(dict(metrics), on_step=True, on_epoch=False, batch_size=1)


def log_step(trainer: Trainer) -> None:
    """Write the metrics of the step that just ended to the loggers, which happens only after all callbacks otherwise.

    What a checkpoint holds is not trained again: a run that ends between the two would lack them for ever.
    """
    update_step_logs(trainer)
    if isinstance(trainer.lightning_module, TrainingModule):
        trainer.lightning_module.write_step_metrics()
