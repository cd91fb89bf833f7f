"""The best step-aware preference model of a run as a folder that the samplers load."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

from lightning_modules.errors import ConfigError
from lightning_modules.preference import StepAwarePreferenceModule


class ExportPreferenceModel(Callback):
    """Writes ``export/preference`` in the run folder after every validation that beats all before it.

    Preference models overfit soon: the best is rarely the last. Without any validation the last is written.

    Args:
        dtype: number type of the written weights.
        monitor: the metric that says which is best; higher is better.
    """

    def __init__(self, dtype: Literal["fp32", "bf16", "fp16"] = "fp32", monitor: str = "val/accuracy") -> None:
        self.dtype, self.monitor = dtype, monitor
        self._best: float | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if not isinstance(pl_module, StepAwarePreferenceModule):
            raise ConfigError(
                "ExportPreferenceModel writes the model of a StepAwarePreferenceModule, "
                f"got a {type(pl_module).__name__}; remove it"
            )

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        value = trainer.callback_metrics.get(self.monitor)
        if value is None:
            raise ConfigError(f"ExportPreferenceModel: no metric {self.monitor!r}; there are what is logged as val/...")
        if self._best is None or value.item() > self._best:
            self._best = value.item()
            self._export(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._best is None:
            self._export(trainer, pl_module)

    def _export(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if trainer.is_global_zero:
            pl_module.preference.save_pretrained(Path(trainer.default_root_dir) / "export" / "preference", self.dtype)

    def state_dict(self) -> dict[str, Any]:
        return {"best": self._best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._best = state_dict["best"]
