"""``evaluation.json``: what is written is read, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from callbacks.evaluation.kept import picture_file
from experiments.evaluation.results import Drawn, Evaluation
from lightning_modules.errors import DataError


def evaluation() -> Evaluation:
    scores = {"shapes": [[0.1, 1 / 3], [0.25, 1e-17]], "shapes/look": [[1.0, 0.0], [0.5, -2.5]]}
    drawn = [
        Drawn("base", "embedded/shapes", True, 5.0, "pictures/base", scores),
        Drawn("DPO", "runs/dpo", False, 5.0, "pictures/dpo", scores),
    ]
    return Evaluation({"name": "shapes", "steps": 20}, ["a <b>red</b> square", "ein größeres Quadrat"], drawn)


def test_it_reads_what_it_writes_to_the_last_bit(tmp_path: Path) -> None:
    evaluation().write(tmp_path)
    first = (tmp_path / "evaluation.json").read_bytes()
    assert Evaluation.read(tmp_path) == evaluation()
    Evaluation.read(tmp_path).write(tmp_path)
    assert (tmp_path / "evaluation.json").read_bytes() == first


def test_a_picture_is_found_by_its_prompt_and_number() -> None:
    assert picture_file(12, 3) == "00012_03.png"
    assert evaluation().drawn[1].picture(0, 1) == "pictures/dpo/00000_01.png"


def test_a_folder_without_one_says_what_is_wanted(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds no evaluation\.json; name the --output of a finished"):
        Evaluation.read(tmp_path)


@pytest.mark.parametrize("damage", ["a prompt less", "ragged", "no number", "no drawn", "another field", "no list"])
def test_a_damaged_one_is_refused_in_one_line(tmp_path: Path, damage: str) -> None:
    evaluation().write(tmp_path)
    path = tmp_path / "evaluation.json"
    value = json.loads(path.read_text())
    column = value["drawn"][1]["scores"]["shapes"]
    if damage == "a prompt less":
        column.pop()
    elif damage == "ragged":
        column[0].pop()
    elif damage == "no number":
        column[0][0] = "0.1"
    elif damage == "no drawn":
        del value["drawn"]
    elif damage == "another field":
        value["drawn"][0]["seed"] = 3
    else:
        column[0] = 3.0
    path.write_text(json.dumps(value))
    with pytest.raises(DataError, match="is damaged or of another version") as caught:
        Evaluation.read(tmp_path)
    assert "\n" not in str(caught.value)
