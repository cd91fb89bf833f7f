"""The policy as files that plain diffusers loads."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from callbacks.evaluation.pictures import alignment
from lightning_modules.files import remove_folder
from lightning_modules.weights.sharding import unsharded


class ExportPolicy(Callback):
    """Writes ``export/step=*`` in the run folder: a LoRA file, or a UNet folder, for plain diffusers.

    Always at the end of the training; before that with every checkpoint, or every ``every_n_steps``.

    Args:
        every_n_steps: optimizer steps between exports; None exports with every checkpoint.
        keep: how many to keep, the newest; -1 keeps all.
    """

    def __init__(self, every_n_steps: int | None = None, keep: int = 1) -> None:
        self.every_n_steps, self.keep = every_n_steps, keep
        self._exported_at: int | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Drop the exports of later steps: a run that went back leaves them behind, and the newest is its own."""
        if trainer.is_global_zero:
            for export in exports(Path(trainer.default_root_dir) / "export"):
                if int(export.name.removeprefix("step=")) > trainer.global_step:
                    rank_zero_info(f"{export} is dropped: the run went back to step {trainer.global_step}")
                    remove_folder(export)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if self.every_n_steps is None:
            self.export(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.every_n_steps is not None and trainer.global_step and trainer.global_step % self.every_n_steps == 0:
            self.export(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.export(trainer, pl_module)

    def export(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the policy as it is now, unless this step was written already; all ranks must call it."""
        module = alignment(pl_module, "ExportPolicy")
        if self._exported_at == trainer.global_step:
            return
        folder = Path(trainer.default_root_dir) / "export"
        with unsharded(module.policy), module.averaged():
            if trainer.is_global_zero:
                module.policy.save_pretrained(folder / f"step={trainer.global_step:07d}")
        self._exported_at = trainer.global_step
        if self.keep >= 0 and trainer.is_global_zero:
            for old in exports(folder)[: -self.keep or None]:
                remove_folder(old)


def exports(folder: Path) -> list[Path]:
    """The exports in a run's ``export`` folder, oldest step first."""
    return sorted(path for path in folder.glob("step=*") if re.fullmatch(r"step=\d+", path.name))
