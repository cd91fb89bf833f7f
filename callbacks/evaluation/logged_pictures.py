"""Pictures for every logger that takes them."""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as pl
import numpy as np
from jaxtyping import UInt8
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from PIL import Image

from lightning_modules.files import atomic_file
from lightning_modules.sampling.eight_bit import png


def log_picture(trainer: pl.Trainer, name: str, picture: UInt8[np.ndarray, "H W 3"], step: int) -> None:
    """Hand a picture to the trainer's loggers; call it on the first rank.

    TensorBoard shows it under ``name``. Beside the metrics of a ``CSVLogger`` it lies as ``<name>/step=<step>.png``.
    Any other logger gets it that has W&B's ``log_image(key, images, step)``; one without takes no pictures.

    Args:
        trainer: whose loggers.
        name: what it shows, the same at every step.
        picture: eight bits per colour.
        step: optimizer steps that the policy has seen.
    """
    for logger in trainer.loggers:
        _log(logger, name, picture, step)


def _log(logger: Logger, name: str, picture: UInt8[np.ndarray, "H W 3"], step: int) -> None:
    if isinstance(logger, TensorBoardLogger):
        logger.experiment.add_image(name, picture, step, dataformats="HWC")
    elif isinstance(logger, CSVLogger):
        with atomic_file(Path(logger.log_dir) / name / f"step={step:07d}.png") as file:
            file.write(png(picture))
    elif hasattr(logger, "log_image"):
        logger.log_image(name, [Image.fromarray(picture)], step)
