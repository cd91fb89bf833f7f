"""What the SLURM tests watch a run through."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import Callback


class LossRecord(Callback):
    """Appends each batch's exact loss to ``losses.txt`` in the run folder, then waits for $PROBE_SECONDS, if set."""

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.is_global_zero:
            with (Path(trainer.default_root_dir) / "losses.txt").open("a") as file:
                file.write(f"{outputs['loss'].item().hex()}\n")
        time.sleep(float(os.environ.get("PROBE_SECONDS", "0")))
