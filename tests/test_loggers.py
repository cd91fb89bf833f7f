"""Loggers write into the run folder, also into that of a copied run."""

import shutil

import pytest
from pairs_data import write_shards

from experiments import run
from experiments.cli.loggers import in_run_folder


def logger(**settings):
    return {"class_path": "CSVLogger", "init_args": settings}


PLACED = logger(save_dir="${run_dir}", name="csv")


@pytest.mark.parametrize(
    ("before", "words", "after", "left"),
    [
        (None, ["--trainer.logger=CSVLogger", "--x=1"], PLACED, ("--x=1",)),
        ("CSVLogger", [], PLACED, ()),
        (logger(), [], PLACED, ()),
        ([logger(), True], [], [PLACED, True], ()),
        (logger(save_dir="here", name=""), [], logger(save_dir="here", name=""), ()),
        (False, ["--trainer.logger=CSVLogger"], PLACED, ()),
        (False, ["--trainer.logger=true"], False, ("--trainer.logger=true",)),
        (logger(), ["--trainer.logger.save_dir=x"], PLACED, ("--trainer.logger.save_dir=x",)),
        ("mine.Logger", ["--trainer.logger=mine.Other"], "mine.Logger", ("--trainer.logger=mine.Other",)),
    ],
)  # fmt: skip
def test_loggers_get_the_run_folder_unless_they_have_a_place(before, words, after, left):
    tree = {"trainer": {"logger": before}}
    assert in_run_folder(tree, words) == left
    assert tree == {"trainer": {"logger": after}}


def test_settings_without_a_logger_stay_as_they_are():
    tree = {"trainer": {"max_steps": 1}}
    assert in_run_folder(tree, []) == ()
    assert tree == {"trainer": {"max_steps": 1}}


def test_csv_of_a_run_and_of_its_copy(tmp_path):
    shards = write_shards(tmp_path / "shards", [8], (32, 32))
    words = [
        f"--data.shards={shards}",
        "--data.batch_size=4",
        "--trainer.callbacks=[]",
        "--trainer.log_every_n_steps=1",
    ]
    first, copy = tmp_path / "first", tmp_path / "copy"
    run.main(
        ["--config", "dpo_tiny", f"--run_dir={first}", "--trainer.logger=CSVLogger", *words, "--trainer.max_steps=1"]
    )
    shutil.copytree(first, copy)
    run.main([f"--run_dir={copy}", "--resume=last", "--trainer.max_steps=2"])
    assert [path.parent.name for path in sorted(first.rglob("metrics.csv"))] == ["version_0"]
    found = sorted(copy.rglob("metrics.csv"))
    assert [path.parent.name for path in found] == ["version_0", "version_1"]
    assert "train/loss" in found[1].read_text().splitlines()[0]
