"""Checkpoints that survive being killed, and from which a run goes on exactly."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.callbacks import Callback, ModelCheckpoint


class AtomicCheckpointIO(TorchCheckpointIO):
    """A checkpoint appears under its name complete or not at all.

    Written beside its target (a rename is atomic only within one file system; a temporary folder may be on
    another), flushed to the disk, renamed. What a killed writer leaves behind ends in ``.part`` and is
    overwritten by the next.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any | None = None
    ) -> None:
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(target.name + ".part")
        with part.open("wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        part.replace(target)


class RunCheckpoint(ModelCheckpoint):
    """The newest few checkpoints and ``last.ckpt``, in the run folder's ``checkpoints``.

    Args:
        every_n_steps: optimizer steps between checkpoints. There is always one at the end of the training.
        keep: how many to keep beside ``last.ckpt``; -1 keeps all.
    """

    def __init__(self, every_n_steps: int = 500, keep: int = 2) -> None:
        super().__init__(
            filename="step={step:07d}",
            auto_insert_metric_name=False,
            # The newest are those with the highest step: without a monitor Lightning keeps one, all or none.
            monitor="step",
            mode="max",
            save_top_k=keep,
            save_last=True,  # a copy; a link can dangle when the process is killed between its two steps
            enable_version_counter=False,  # else a resumed run writes last-v1.ckpt beside last.ckpt
            every_n_train_steps=every_n_steps,
        )

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.dirpath = str(Path(trainer.default_root_dir) / "checkpoints")
        with warnings.catch_warnings():
            # It is when a run is resumed; the command line refuses to start another run there.
            warnings.filterwarnings("ignore", message="Checkpoint directory .* exists and is not empty")
            super().setup(trainer, pl_module, stage)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict["dirpath"] == self.dirpath:  # another run's list of files says nothing about this run's folder
            super().load_state_dict(state_dict)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self._should_skip_saving_checkpoint(trainer):
            candidates = self._monitor_candidates(trainer)
            self._save_topk_checkpoint(trainer, candidates)
            self._save_last_checkpoint(trainer, candidates)


class ExactResume(Callback):
    """Rewinds the batch counters in a checkpoint that was taken within an accumulation window.

    Such a checkpoint holds the weights of the last optimizer step, and the gradients gathered since are lost. Data
    and noise are functions of the counters, so that rewinding them to that step recomputes what was lost.
    """

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        current, total = progress["current"], progress["total"]
        at_epoch_end = progress["is_last_batch"] and current["processed"] == current["ready"]
        lost = 0 if at_epoch_end else current["processed"] % trainer.accumulate_grad_batches
        if lost == 0 and current["ready"] == current["processed"]:
            return
        for counters in (current, total):
            kept = counters["processed"] - lost
            counters.update(ready=kept, started=kept, processed=kept, completed=kept)
        progress["is_last_batch"] = False


def newest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint in ``folder`` that was written last; ``last.ckpt`` where it is as new as any."""
    files = list(folder.glob("*.ckpt"))
    return max(files, key=lambda file: (file.stat().st_mtime_ns, file.name == "last.ckpt"), default=None)
