"""Keeps an optimizer step whose loss or gradient is not finite away from the weights."""

from __future__ import annotations

import logging
from typing import Any

import lightning.pytorch as pl
import torch
from jaxtyping import Float
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.optim import Optimizer

from lightning_modules.errors import ConfigError, DivergenceError
from lightning_modules.training import TrainingModule, note_step
from lightning_modules.weights.sharding import whole_tensor

log = logging.getLogger(__name__)

_NAMED = 16  # samples in a message; a step may have thousands


class LossGuard(Callback):
    """Leaves out optimizer steps that would spoil the weights, counts them, and ends a run that does nothing else.

    A step is left out if the loss of any of its batches on any rank, or the norm of its gradient (over all trained
    weights, before clipping), is not finite. All ranks decide it together. Weights, the optimizer's moments and
    weight averages stay as they are, bit for bit. It counts as a step all the same: ``global_step``, the learning
    rate's schedule and the data move on, so that the run has as many steps as it was given, and resumes exactly.

    ``GradScaler`` (precision 16-mixed) leaves out steps by itself while it looks for its scale; those are no faults
    and are not counted. A gradient that overflows at scale 1 is one.

    Logged once a step: ``train/skipped_steps``, their number since the run began, and ``train/gradient_norm``, before
    clipping. A warning names each skipped step, the reason and its samples' indices. The counts are in the checkpoint.

    Args:
        max_in_a_row: The run ends with an error once this many steps in a row were left out.
        max_gradient_norm: Also leave out steps with a larger gradient norm. None: no limit, since no number fits all
            objectives and sizes (see ``train/gradient_norm``), and ``trainer.gradient_clip_val`` bounds what a large
            but finite gradient can do.

    Raises:
        DivergenceError: too many in a row. Every checkpoint written so far holds weights from before them.
    """

    def __init__(self, max_in_a_row: int = 10, max_gradient_norm: float | None = None) -> None:
        if max_in_a_row < 1:
            raise ConfigError(f"LossGuard.max_in_a_row must be at least 1, got {max_in_a_row}")
        if max_gradient_norm is not None and not max_gradient_norm > 0:
            raise ConfigError(f"LossGuard.max_gradient_norm must be above 0, or null for none, got {max_gradient_norm}")
        self.max_in_a_row, self.max_gradient_norm = max_in_a_row, max_gradient_norm
        self.skipped, self.in_a_row = 0, 0
        self._samples: list[int] = []  # of the batch at hand
        self._batches: list[tuple[list[int], Tensor]] = []  # of this step: samples, and whether the loss is finite

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._batches = []

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        indices = getattr(batch, "indices", None)
        self._samples = indices.tolist() if isinstance(indices, Tensor) else []

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        self._batches.append((self._samples, loss.detach().isfinite().all()))

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        batches, self._batches = self._batches, []
        faults, norm = self._faults(trainer, [finite for _, finite in batches], gradient_norm(trainer, optimizer))
        if faults == ["gradient"] and _scale(trainer) > 1:
            _keep_average(pl_module)  # GradScaler leaves it out, and tries a smaller scale next
        elif faults:
            _keep_average(pl_module)
            self._leave_out(trainer, optimizer, faults, batches)
        else:
            self.in_a_row = 0
            note_step(pl_module, {"train/gradient_norm": norm})
        note_step(pl_module, {"train/skipped_steps": float(self.skipped)})

    def _faults(self, trainer: pl.Trainer, finite: list[Tensor], norm: Float[Tensor, ""]) -> tuple[list[str], float]:
        """What is wrong on any rank, and the norm; the same on every rank. The device is waited for once."""
        limit = torch.inf if self.max_gradient_norm is None else self.max_gradient_norm
        wrong = sum((~value.to(norm.device) for value in finite), start=torch.zeros_like(norm))
        here = torch.stack([wrong > 0, ~norm.isfinite(), norm.isfinite() & (norm > limit)])
        told = torch.cat([here.float(), norm.float().nan_to_num(torch.inf)[None]])
        *found, largest = trainer.strategy.reduce(told, reduce_op="max").tolist()
        return [name for name, wrong in zip(("loss", "gradient", "limit"), found) if wrong], largest

    def _leave_out(
        self, trainer: pl.Trainer, optimizer: Optimizer, faults: list[str], batches: list[tuple[list[int], Tensor]]
    ) -> None:
        _discard_gradients(trainer, optimizer)
        self.skipped += 1
        self.in_a_row += 1
        reason = {
            "loss": "the loss is not finite",
            "gradient": "the gradient is not finite",
            "limit": f"the gradient's norm is above {self.max_gradient_norm}",
        }[faults[0]]
        # If a batch's own loss tells, its samples; else any of the step's may be the cause.
        mine = [n for samples, finite in batches if faults[0] != "loss" or not finite for n in samples]
        samples = _of_all_ranks(trainer, mine)
        if samples:
            reason += " (samples " + ", ".join(map(str, samples[:_NAMED])) + (", ...)" if samples[_NAMED:] else ")")
        step = trainer.global_step
        if trainer.is_global_zero:
            log.warning("optimizer step %d is left out, %d so far: %s", step, self.skipped, reason)
        if self.in_a_row >= self.max_in_a_row:
            raise DivergenceError(
                f"{self.in_a_row} optimizer steps in a row were left out, the last is step {step}: {reason}; "
                f"the weights are those of step {step + 1 - self.in_a_row}, resume from the newest "
                "checkpoint with a lower learning rate, in bf16-mixed or fp32, or without these samples"
            )

    def state_dict(self) -> dict[str, Any]:
        return {"skipped": self.skipped, "in_a_row": self.in_a_row}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.skipped, self.in_a_row = state_dict["skipped"], state_dict["in_a_row"]


def _keep_average(module: pl.LightningModule) -> None:
    """It is not to take in the unchanged weights a second time."""
    if isinstance(module, TrainingModule) and module.ema is not None:
        module.ema.skip_next_update()


def gradient_norm(trainer: pl.Trainer, optimizer: Optimizer) -> Float[Tensor, ""]:
    """The l2 norm over all weights that the optimizer trains."""
    gradients = [parameter.grad for parameter in _parameters(optimizer) if parameter.grad is not None]
    if not gradients:
        return torch.zeros((), device=trainer.strategy.root_device)
    norm = whole_tensor(torch.nn.utils.get_total_norm(gradients))
    return norm / _scale(trainer) if _unscales_by_itself(optimizer) else norm


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _scale(trainer: pl.Trainer) -> float:
    """By which the loss is multiplied before backward: above 1 only while a GradScaler is at work."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return 1.0 if scaler is None else scaler.get_scale()


def _unscales_by_itself(optimizer: Optimizer) -> bool:
    """Fused optimizers divide by the scale within their step; Lightning does it before for all others."""
    return getattr(optimizer, "_step_supports_amp_scaling", False)


def _discard_gradients(trainer: pl.Trainer, optimizer: Optimizer) -> None:
    """Make the optimizer's step do nothing: optimizers pass over weights without a gradient, moments and decay too."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    if scaler is not None and _unscales_by_itself(optimizer):
        # Its scaler still has to see gradients, and leaves out the step if any is infinite.
        next(p.grad for p in _parameters(optimizer) if p.grad is not None).fill_(torch.inf)
        return
    for parameter in _parameters(optimizer):
        parameter.grad = None


def _of_all_ranks(trainer: pl.Trainer, mine: list[int]) -> list[int]:
    """Every rank must call it."""
    if trainer.world_size == 1:
        return sorted(mine)
    parts: list[list[int]] = [[] for _ in range(trainer.world_size)]
    torch.distributed.all_gather_object(parts, mine)
    return sorted(n for part in parts for n in part)
