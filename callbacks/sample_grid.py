"""The same prompts and noise drawn again and again while the policy learns."""

from __future__ import annotations

import logging
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
from rich.console import Console

from callbacks.evaluation.grid import Row, drawn_row, grid_picture
from callbacks.evaluation.logged_pictures import log_picture
from callbacks.evaluation.pictures import PictureRequest, alignment, evaluation_mode, policy_step
from callbacks.resume.due_evaluations import PolicyEvaluation
from callbacks.resume.preemption import interruptible
from datamodules.prompts import prompt_texts
from lightning_modules.alignment import AlignmentModule
from lightning_modules.files import atomic_file
from lightning_modules.sampling.eight_bit import png
from lightning_modules.sampling.pictures import Denoise, Sampler
from lightning_modules.terminal import literal

log = logging.getLogger(__name__)


class SampleGrid(PolicyEvaluation):
    """Draws a grid, one prompt a column, the policy above the reference, captions below.

    At the start, every ``every_n_steps`` optimizer steps, at the end, and in ``test``. Pictures go to
    ``samples/step=*.png`` in the run folder and, as ``samples``, to every logger that takes them (``log_picture``).

    Args:
        prompts: texts, or a prompt file.
        sampler: how the pictures are made.
        every_n_steps: optimizer steps between grids.
        number: how many of the prompts to draw; the first ones.
        batch_size: pictures at a time on one device.
        image_size: side in pixels; None takes the policy's own.
        seed: seed of the noise, which is keyed by prompt. Not the run's: then runs of different seeds can be compared.
    """

    evaluates_start = True

    def __init__(
        self,
        prompts: list[str] | str,
        sampler: Sampler = Sampler(),  # noqa: B008  # frozen
        every_n_steps: int = 500,
        number: int = 8,
        batch_size: int = 8,
        image_size: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.texts = prompt_texts(prompts, number)
        self.sampler, self.every_n_steps = sampler, every_n_steps
        self.batch_size, self.image_size, self.seed = batch_size, image_size, seed
        self._reference: Row | None = None
        self._tested: Path | None = None

    def evaluate(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.draw(trainer, pl_module)

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._tested = self.draw(trainer, pl_module)

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.is_global_zero:  # below what other callbacks have printed
            rows = "policy above, reference below" if self._reference else "policy"
            Console().print(literal(f"pictures ({rows}): {self._tested}"), soft_wrap=True)

    def draw(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Path:
        """Make, write and log one grid; all ranks must call it. Returns its path."""
        module = alignment(pl_module, "SampleGrid")
        step = policy_step(trainer)
        with interruptible(trainer), evaluation_mode(module):
            rows = {"policy": self._row(trainer, module, module.policy.predict_noise, "policy")}
            if module.reference is not None:
                if self._reference is None:  # it never changes
                    self._reference = self._row(trainer, module, module.reference.predict_noise, "reference")
                rows["reference"] = self._reference
        path = Path(trainer.default_root_dir) / "samples" / f"{'test_' if trainer.testing else ''}step={step:07d}.png"
        if trainer.is_global_zero:
            grid = np.asarray(grid_picture(rows, self.texts))
            with atomic_file(path) as file:
                file.write(png(grid))
            log_picture(trainer, "samples", grid, step)
            log.info("samples in %s", path)
        return path

    def _row(self, trainer: pl.Trainer, module: AlignmentModule, denoise: Denoise, title: str) -> Row:
        requests = [PictureRequest(text, (self.seed, "sample_grid", i)) for i, text in enumerate(self.texts)]
        title = f"samples ({title})"
        return drawn_row(trainer, module, self.sampler, denoise, requests, self.batch_size, self.image_size, title)
