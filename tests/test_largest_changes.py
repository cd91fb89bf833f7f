"""The pictures that a test shows: those whose scores have changed most, from the noise that they were scored with."""

import json

import numpy as np
import pytest
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_world import PROMPTS, QUICK, make, pairs, trainer
from torch.utils.data import DataLoader

from callbacks.evaluation.grid import CELL, LINE, MARGIN, grid_picture
from callbacks.evaluation.largest_changes import largest
from callbacks.win_rate import WinRate
from lightning_modules.objectives import SFT
from lightning_modules.policies.adaptation import FullFineTuning
from lightning_modules.policies.lora import LoRA
from lightning_modules.references import AdapterOff
from lightning_modules.rewards.base import RewardModel


class Brightness(RewardModel):
    """Mean pixel value."""

    name = "brightness"

    def score(self, images, prompts):
        return images.mean(dim=(1, 2, 3))


class Darkness(Brightness):
    name = "darkness"

    def score(self, images, prompts):
        return -images.mean(dim=(1, 2, 3))


def cells(path, columns, top):
    """Mean brightness, 0 to 1, of the cells of two rows of a grid."""
    with Image.open(path) as opened:
        picture = np.asarray(opened) / 255
    left = picture.shape[1] - columns * (CELL + MARGIN)
    return [
        [picture[y : y + CELL, x : x + CELL].mean() for x in range(left, picture.shape[1], CELL + MARGIN)]
        for y in (top, top + CELL + MARGIN)
    ]


def test_the_highest_come_first_and_the_lowest_last():
    assert largest(np.array([0.1, -0.5, 0.9, 0.0, 0.2, -0.1, 0.3, 0.05, -0.2, 0.4])) == (
        [2, 9, 6, 4, 3, 5, 8, 1],
        {0: "gained most", 4: "lost most"},
    )


@pytest.mark.parametrize(
    ("changes", "order", "headings"),
    [
        ([0.2], [0], {0: "gained most"}),
        ([-0.2], [0], {0: "lost least"}),
        ([0.1, 0.2], [1, 0], {0: "gained most", 1: "gained least"}),
        ([-0.1, -0.2, -0.3], [0, 2], {0: "lost least", 1: "lost most"}),
        ([0.0, 0.0, 0.0], [0, 2], {0: "unchanged", 1: "unchanged"}),
    ],
)
def test_few_are_shown_once_and_what_they_did_is_said(changes, order, headings):
    assert largest(np.array(changes)) == (order, headings)


@pytest.mark.parametrize("first", [Brightness, Darkness])
def test_a_test_draws_those_that_the_first_reward_saw_change_most(tmp_path, pipelines, capsys, first):
    rewards = [Brightness(), Darkness()]
    rewards.sort(key=lambda reward: type(reward) is not first)
    judge = WinRate(PROMPTS, rewards, PROMPTS, QUICK, images_per_prompt=4, batch_size=5)
    module = make(pipelines, LoRA(), AdapterOff())
    run = trainer(tmp_path, judge, max_steps=2, logger=TensorBoardLogger(tmp_path, name="", version=""))
    run.fit(module, pairs())
    assert not (tmp_path / "samples").exists()
    run.test(module, DataLoader([0]), verbose=False)
    path = tmp_path / "samples" / "test_changes_step=0000000.png"
    assert capsys.readouterr().out.splitlines()[-1] == f"largest changes, gains and losses: {path}"
    scores = json.loads((tmp_path / "win_rate.json").read_text())[-1]["scores"]
    policy, reference = (np.ravel(scores[whose]["brightness"]) for whose in ("policy", "reference"))
    chosen, _ = largest((policy - reference) * (1 if first is Brightness else -1))
    assert len(set(chosen)) == 8
    drawn = cells(path, 8, MARGIN + LINE)
    assert drawn[0] == pytest.approx(policy[chosen].tolist(), abs=2e-4)
    assert drawn[1] == pytest.approx(reference[chosen].tolist(), abs=2e-4)
    assert max(abs(np.subtract(*drawn))) > 1e-3  # else the rows could be exchanged
    events = EventAccumulator(str(tmp_path), size_guidance={"images": 0}).Reload()
    assert len(events.Images("largest_changes")) == 1


def test_a_picture_that_fails_takes_no_result_with_it(tmp_path, pipelines, monkeypatch):
    def full(*args):
        raise OSError("no space left on device")

    monkeypatch.setattr("callbacks.evaluation.largest_changes.log_picture", full)
    judge = WinRate(PROMPTS, [Brightness()], PROMPTS, QUICK)
    with pytest.raises(OSError, match="no space left"):
        trainer(tmp_path, judge).test(make(pipelines, LoRA(), AdapterOff()), DataLoader([0]), verbose=False)
    assert json.loads((tmp_path / "win_rate.json").read_text())[0]["comparisons"]["brightness"]["n"] == 3


def test_without_a_reference_there_are_none(tmp_path, pipelines, capsys):
    judge = WinRate(PROMPTS, [Brightness()], PROMPTS, QUICK)
    trainer(tmp_path, judge).test(make(pipelines, FullFineTuning(), None, SFT()), DataLoader([0]), verbose=False)
    assert not (tmp_path / "samples").exists()
    assert "largest changes" not in capsys.readouterr().out


def test_headings_stand_above_their_columns_and_captions_below_them():
    rows = {"policy": [np.full((8, 8, 3), 255, np.uint8)] * 3}
    plain = np.asarray(grid_picture(rows, ["", "", ""])).min(-1) < 128
    heading = {1: "a heading that takes two lines or three"}
    headed = np.asarray(grid_picture(rows, ["", "prompt", ""], ["", "score", ""], heading)).min(-1) < 128
    added = headed.shape[0] - plain.shape[0]
    assert added % LINE == 0
    assert added >= LINE
    left = headed.shape[1] - 3 * (CELL + MARGIN)
    second = left + CELL + MARGIN
    above, below = headed[: MARGIN + added], headed[-4 * LINE - MARGIN :]
    assert above.any()
    assert not above[:, :second].any()
    assert below[:LINE, second:].any()  # the score's line
    assert below[LINE : 2 * LINE, second:].any()  # the prompt's
    assert not below[2 * LINE :].any()
    assert not below[:, :second].any()
    long = np.asarray(grid_picture(rows, ["a long\nprompt " * 20] * 3, ["score"] * 3)).min(-1) < 128
    assert long[-LINE - MARGIN : -MARGIN].any()
    assert not long[-MARGIN:].any()  # a fifth line would begin here, cut off
