"""Pictures reach every logger that takes them, whole, under their step, and no other."""

from inspect import signature
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_world import PROMPTS, QUICK, make, pairs, trainer

from callbacks.evaluation.logged_pictures import log_picture
from callbacks.sample_grid import SampleGrid
from lightning_modules.policies.lora import LoRA
from lightning_modules.references import AdapterOff

PICTURE = np.random.default_rng(0).integers(0, 256, (12, 20, 3), np.uint8)


def read(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture)


def test_tensorboard_shows_it(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path, name="", version="")
    log_picture(trainer(tmp_path, logger=logger), "samples", PICTURE, 7)
    logger.finalize("success")
    (event,) = EventAccumulator(str(tmp_path), size_guidance={"images": 0}).Reload().Images("samples")
    assert (event.step, event.width, event.height) == (7, 20, 12)
    (tmp_path / "shown.png").write_bytes(event.encoded_image_string)
    assert np.array_equal(read(tmp_path / "shown.png"), PICTURE)


def test_it_lies_beside_the_metrics_of_a_csv_logger(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, "csv")
    logger.log_metrics({"loss": 1.0}, 7)
    log_picture(trainer(tmp_path, logger=logger), "samples", PICTURE, 7)
    logger.save()
    folder = tmp_path / "csv" / "version_0"
    assert sorted(path.name for path in folder.iterdir()) == ["metrics.csv", "samples"]
    assert np.array_equal(read(folder / "samples" / "step=0000007.png"), PICTURE)


def test_weights_and_biases_get_it_by_their_own_method(tmp_path: Path) -> None:
    logger = Mock(spec=WandbLogger)
    log_picture(trainer(tmp_path, logger=logger), "samples", PICTURE, 7)
    (call,) = logger.log_image.call_args_list
    taken = signature(WandbLogger.log_image).bind(logger, *call.args, **call.kwargs).arguments
    assert (taken["key"], taken["step"]) == ("samples", 7)
    (picture,) = taken["images"]
    assert np.array_equal(np.asarray(picture), PICTURE)


def test_a_logger_that_takes_no_pictures_gets_none(tmp_path: Path) -> None:
    logger = Mock(spec=Logger)
    log_picture(trainer(tmp_path, logger=logger), "samples", PICTURE, 7)
    assert logger.method_calls == []


@pytest.mark.parametrize("loggers", [[], ["a CSVLogger"]])
def test_a_training_logs_its_grids_to_all_of_them(tmp_path: Path, pipelines: Path, loggers: list[str]) -> None:
    board = Mock(spec=WandbLogger, root_dir=None)
    given = [board, *(CSVLogger(tmp_path, "csv") for _ in loggers)]
    grid = SampleGrid(PROMPTS, QUICK, every_n_steps=1, number=1)
    module = make(pipelines, LoRA(), AdapterOff())
    trainer(tmp_path, grid, logger=given, max_steps=1, log_every_n_steps=1).fit(module, pairs())
    assert [call.args[::2] for call in board.log_image.call_args_list] == [("samples", 0), ("samples", 1)]
    (shown,) = board.log_image.call_args.args[1]
    kept = sorted((tmp_path / "samples").iterdir())
    assert np.array_equal(np.asarray(shown), read(kept[1]))
    copies = sorted((tmp_path / "csv").rglob("*.png"))
    assert [path.name for path in copies] == [path.name for path in kept] * len(loggers)
    assert all(path.read_bytes() == copy.read_bytes() for path, copy in zip(kept, copies))
