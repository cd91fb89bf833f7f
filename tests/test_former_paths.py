"""Configurations written by the release before still name what they named, and say how it is called now.

``tests/data/config-*-0.1.0.yaml`` were written by runs of ``dpo_tiny`` and ``spo_tiny`` of that release.
"""

import importlib
import warnings
from pathlib import Path

import pytest

from experiments.cli.compose import CommandLine, known_classes, load
from experiments.cli.former_paths import FORMER_MODULES, with_present_objectives, with_present_paths
from lightning_modules.objectives import DPO, IPO, Hinge

DATA = Path(__file__).parent / "data"


def class_paths(node):
    if isinstance(node, dict):
        yield from [node["class_path"]] if isinstance(node.get("class_path"), str) else []
        for value in node.values():
            yield from class_paths(value)
    elif isinstance(node, list):
        for value in node:
            yield from class_paths(value)


@pytest.mark.parametrize("kind", ["dpo", "spo"])
def test_every_class_of_an_old_runs_config_is_found(kind):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        tree = load(DATA / f"config-{kind}-0.1.0.yaml")
    told = [str(warning.message) for warning in seen]
    assert any("callbacks.checkpointing.RunCheckpoint is now callbacks.resume.checkpointing" in line for line in told)
    paths = list(class_paths(tree))
    assert "callbacks.resume.checkpointing.RunCheckpoint" in paths
    for path in paths:
        module, _, name = path.rpartition(".")
        assert getattr(importlib.import_module(module), name).__name__ == name


def test_a_former_path_on_the_command_line_is_the_present_one():
    word = "--trainer.callbacks+=callbacks.export.ExportPolicy"
    with pytest.warns(
        UserWarning, match=r"callbacks\.export\.ExportPolicy is now callbacks\.export_policy\.ExportPolicy"
    ):
        line = CommandLine.split(["--config", "dpo_tiny", word])
    assert line.overrides == ("--trainer.callbacks+=callbacks.export_policy.ExportPolicy",)


@pytest.mark.parametrize(
    "text",
    [
        "class_path: lightning_modules.objectives.DPO",
        "class_path: callbacks.checkpointing.NoSuchClass",
        "class_path: torch.optim.AdamW",
        "my.callbacks.export_policy.ExportPolicy",
        "class_path: lightning_modules.sampling.pictures.Sampler",
    ],
)
def test_other_texts_stay_as_they_are(text):
    assert with_present_paths(text, known_classes()) == text


def test_no_former_module_of_a_class_is_where_it_is_now():
    here = set(known_classes().values())
    split = {"lightning_modules.objectives.dpo", "lightning_modules.policies.adaptation"}  # others of its classes stay
    assert (FORMER_MODULES & here) - split == set()


@pytest.mark.parametrize(
    ("loss_type", "objective"),
    [
        ({"class_path": "lightning_modules.objectives.Sigmoid"}, DPO(beta=77.0, label_smoothing=0.1)),
        ({"class_path": "lightning_modules.objectives.IPO"}, IPO(tau=77.0, label_smoothing=0.1)),
        ("Hinge", Hinge(beta=77.0, label_smoothing=0.1)),
    ],
)
def test_a_former_loss_type_is_the_objective_that_it_became(loss_type, objective):
    init_args = {"beta": 77.0, "loss_type": loss_type, "label_smoothing": 0.1}
    former = {"model": {"init_args": {"objective": {"class_path": "DPO", "init_args": init_args}}}}
    with pytest.warns(UserWarning, match="loss_type"):
        node = with_present_objectives(former)["model"]["init_args"]["objective"]
    assert {"DPO": DPO, "IPO": IPO, "Hinge": Hinge}[node["class_path"]](**node["init_args"]) == objective
