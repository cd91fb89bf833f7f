"""Sample grids: what is where in the picture, when it is drawn, and that training doesn't notice."""

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_world import PROMPTS, QUICK, make, pairs, trained_parameters, trainer
from torch.utils.data import DataLoader

from callbacks.evaluation.grid import CELL, grid_picture
from callbacks.sample_grid import SampleGrid
from callbacks.save_pictures import SavePictures
from datamodules.prompts import prompt_texts
from datamodules.shapes.drawing import prompt_splits
from lightning_modules.errors import ConfigError
from lightning_modules.objectives import SFT
from lightning_modules.policies.adaptation import FullFineTuning
from lightning_modules.policies.lora import LoRA
from lightning_modules.references import AdapterOff


def read(path):
    with Image.open(path) as picture:
        return np.asarray(picture).astype(int)


def grid(**options):
    return SampleGrid(**({"prompts": PROMPTS, "sampler": QUICK, "every_n_steps": 2, "batch_size": 2} | options))


def test_the_grid_puts_the_policy_above_the_reference_and_leaves_room_for_captions():
    rows = {"policy": [np.full((8, 8, 3), 10 * c, np.uint8) for c in range(3)],
            "reference": [np.full((8, 8, 3), 100 + c, np.uint8) for c in range(3)]}  # fmt: skip
    picture = np.asarray(grid_picture(rows, ["one", "two", "a long caption " * 20]))
    centre = CELL // 2
    columns = [int(np.flatnonzero((picture[centre] == 10 * c).all(-1)).mean()) for c in (1, 2)]
    top, bottom = picture[centre, columns], picture[centre + CELL + 6, columns]
    assert top[:, 0].tolist() == [10, 20]
    assert bottom[:, 0].tolist() == [101, 102]
    assert (picture[2 * CELL + 20 :] < 128).any()  # the captions


def test_drawn_at_the_start_every_n_steps_and_at_the_end(tmp_path, pipelines):
    module, logger = make(pipelines, LoRA(), AdapterOff()), TensorBoardLogger(tmp_path, name="", version="")
    trainer(tmp_path, grid(), max_steps=3, logger=logger, log_every_n_steps=1).fit(module, pairs())
    samples = {file.name: read(file) for file in sorted((tmp_path / "samples").iterdir())}
    assert list(samples) == [f"step={step:07d}.png" for step in (0, 2, 3)]
    events = EventAccumulator(str(tmp_path), size_guidance={"images": 0}).Reload()
    assert [event.step for event in events.Images("samples")] == [0, 2, 3]
    first, _, last = samples.values()
    policy, reference = slice(6, 6 + CELL), slice(12 + CELL, 12 + 2 * CELL)
    labels = 70  # pixels at the left with the rows' names
    assert (first[policy, labels:] == first[reference, labels:]).all()  # nothing is trained yet
    assert (last[reference] == first[reference]).all()
    assert (last[policy] != first[policy]).any()


def test_training_is_the_same_with_and_without_it(tmp_path, pipelines):
    weights = []
    for grids in ([], [grid(every_n_steps=1)]):
        module = make(pipelines, LoRA(), AdapterOff())
        trainer(tmp_path, *grids, max_steps=2, accumulate_grad_batches=2).fit(module, pairs())
        weights.append(torch.cat([p.detach().flatten() for p in trained_parameters(module.policy)]))
    assert torch.equal(*weights)


def test_without_a_reference_there_is_one_row(tmp_path, pipelines):
    heights = []
    for reference, objective in ((None, SFT()), (AdapterOff(), None)):
        module, callback = make(pipelines, LoRA(), reference, objective), grid()
        trainer(tmp_path, callback).test(module, DataLoader([0]), verbose=False)
        heights.append(len(read(tmp_path / "samples" / "test_step=0000000.png")))
    assert heights[1] - heights[0] == CELL + 6


def test_a_test_names_the_picture(tmp_path, pipelines, capsys):
    module = make(pipelines, LoRA(), AdapterOff())
    trainer(tmp_path, grid(number=1)).test(module, DataLoader([0]), verbose=False)
    assert "policy above, reference below" in (out := capsys.readouterr().out)
    assert str(tmp_path / "samples" / "test_step=0000000.png") in out


def test_another_kind_of_module_is_refused(tmp_path):
    class Other(LightningModule):
        def test_step(self, batch, batch_idx):
            pass

    with pytest.raises(ConfigError, match="SampleGrid draws with an AlignmentModule's policy and the model is a Other"):
        trainer(tmp_path, grid()).test(Other(), DataLoader([0]), verbose=False)


def test_packaged_prompt_files_are_the_worlds_held_out_splits():
    for split in ("validation", "test"):
        assert prompt_texts(f"embedded/prompts/shapes_{split}.txt") == list(prompt_splits()[split])
    assert prompt_texts("embedded/prompts/shapes_test.txt", 2) == list(prompt_splits()["test"][:2])


def test_predict_writes_a_picture_a_prompt(tmp_path, pipelines):
    module = make(pipelines, FullFineTuning(), None, SFT())
    save = SavePictures(PROMPTS[:2], QUICK, images_per_prompt=2, batch_size=3)
    trainer(tmp_path, save).predict(module, DataLoader([0]))
    folder = tmp_path / "pictures" / "step=0000000"
    assert sorted(file.name for file in folder.glob("*.png")) == [f"0000{p}_0{i}.png" for p in (0, 1) for i in (0, 1)]
    side = module.policy.image_size
    assert read(folder / "00001_00.png").shape == (side, side, 3)
    assert '"a red circle"' in (folder / "pictures.json").read_text()
    with pytest.raises(ConfigError, match="--pictures.prompts=FILE"):
        trainer(tmp_path, SavePictures()).predict(module, DataLoader([0]))
