"""Win rates: the report, and the callback on the real module at tiny size."""

import json
import math

import pytest
import torch
from rich.console import Console
from tiny_world import PROMPTS, QUICK, make, pairs, trained_parameters, trainer
from torch.utils.data import DataLoader

from callbacks.evaluation.kept import add_entry, drop_later_entries
from callbacks.evaluation.report import Report
from callbacks.evaluation.statistics import Mean, WinCount
from callbacks.win_rate import WinRate
from lightning_modules.errors import ConfigError, UserError
from lightning_modules.objectives import SFT
from lightning_modules.policies.adaptation import FullFineTuning
from lightning_modules.policies.lora import LoRA
from lightning_modules.references import AdapterOff, FrozenCopy
from lightning_modules.rewards.base import RewardModel
from lightning_modules.sampling.pictures import Sampler


class Brightness(RewardModel):
    """Mean pixel value; ``sign`` -1 prefers dark pictures."""

    def __init__(self, name="brightness", sign=1.0):
        super().__init__()
        self.name, self.sign = name, sign

    def score(self, images, prompts):
        return self.sign * images.mean(dim=(1, 2, 3))

    def parts(self, images, prompts):
        return {"red": images[:, 0].mean(dim=(1, 2))}


class Broken(RewardModel):
    name = "broken"

    def score(self, images, prompts):
        return torch.full((len(images),), math.nan)


def win_rate(**options):
    return WinRate(**({"prompts": PROMPTS, "rewards": [Brightness()], "sampler": QUICK, "batch_size": 2} | options))


def history(folder):
    return json.loads((folder / "win_rate.json").read_text())


# The report


def test_report_names_its_metrics_and_fits_a_terminal():
    scores = {"shapes": [[0.5], [0.7]], "shapes/correctness": [[0.6], [0.8]]}
    report = Report.of("val", 100, scores, {"shapes": [[0.4], [0.7]], "shapes/correctness": [[0.6], [0.8]]})
    kinds = [f"{kind}/{column}" for kind in ("reward", "reference_reward") for column in scores]
    assert set(report.metrics()) == {
        *(f"val/win_rate/shapes{end}" for end in ("", "_low", "_high")),
        *(f"val/{kind}{end}" for kind in kinds for end in ("", "_se")),
    }
    assert report.metrics()["val/win_rate/shapes"] == 0.75
    console = Console(width=80)
    with console.capture() as capture:
        console.print(report.table())
    assert "75.0% [" in (text := capture.get())
    assert "…" not in text


def test_one_prompt_has_no_error_and_every_rate():
    report = Report.of("val", 1, {"shapes": [[0.5, 0.7]]}, {"shapes": [[0.4, 0.7]]})
    assert set(report.metrics()) == {
        *(f"val/win_rate/shapes{end}" for end in ("", "_low", "_high")),
        "val/reward/shapes",
        "val/reference_reward/shapes",
    }
    assert (report.metrics()["val/win_rate/shapes_low"], report.metrics()["val/win_rate/shapes_high"]) == (0.0, 1.0)
    console = Console(width=80)
    with console.capture() as capture:
        console.print(report.table())
    assert "75.0% [0.0, 100.0]" in capture.get()


# Which pictures


def test_every_picture_has_draws_of_its_own_by_seed_prompt_and_number():
    protocol = win_rate(prompts=["b", "a"], images_per_prompt=2, seed=7).validation
    assert [(request.prompt, request.key) for request in protocol.requests()] == [
        ("b", (7, "win_rate", 0, 0)), ("b", (7, "win_rate", 0, 1)),
        ("a", (7, "win_rate", 1, 0)), ("a", (7, "win_rate", 1, 1)),
    ]  # fmt: skip


# The callback


@pytest.mark.parametrize(
    ("adaptation", "reference"), [(LoRA(), AdapterOff()), (FullFineTuning(), FrozenCopy())], ids=["lora", "full"]
)
def test_before_training_all_pictures_tie_and_after_it_they_differ(tmp_path, pipelines, adaptation, reference):
    module, judge = make(pipelines, adaptation, reference), win_rate(test_prompts=PROMPTS[:2])
    run = trainer(tmp_path, judge, max_steps=2)
    run.test(module, DataLoader([0]), verbose=False)
    run.fit(module, pairs())
    before, after = history(tmp_path)
    assert (before["split"], before["step"]) == ("test", 0)
    assert before["comparisons"]["brightness"]["ties"] == before["comparisons"]["brightness"]["n"] == 2
    assert (after["split"], after["step"]) == ("val", 2)
    assert after["comparisons"]["brightness"]["n"] == 3
    assert after["comparisons"]["brightness"]["ties"] == 0
    # Same prompts, same noise, untouched network: what the reference scored before is what it scores after.
    assert set(after["reference"]) == {"brightness", "brightness/red"}


def test_win_rate_of_a_reward_and_of_its_negative_add_up_to_one(tmp_path, pipelines):
    judge = win_rate(rewards=[Brightness(), Brightness("darkness", -1.0)], images_per_prompt=2)
    module = make(pipelines, LoRA(), AdapterOff())
    trainer(tmp_path, judge, max_steps=1).fit(module, pairs())
    (entry,) = history(tmp_path)
    bright, dark = entry["comparisons"]["brightness"], entry["comparisons"]["darkness"]
    assert bright["n"] == 6
    # Every picture's score, prompt by prompt, of which all of it is counted.
    scores = {whose: entry["scores"][whose]["brightness"] for whose in ("policy", "reference")}
    assert [[len(prompt) for prompt in table] for table in scores.values()] == [[2, 2, 2]] * 2
    assert WinCount(**bright) == WinCount.of(scores["policy"], scores["reference"])
    assert Mean(**entry["policy"]["brightness"]) == Mean.of(scores["policy"])
    assert bright["rate"] + dark["rate"] == 1
    assert entry["policy"]["brightness"]["mean"] == pytest.approx(-entry["policy"]["darkness"]["mean"])


def test_training_is_the_same_with_and_without_it(tmp_path, pipelines):
    weights = []
    for judges in ([], [win_rate(every_n_steps=1)]):
        module = make(pipelines, LoRA(), AdapterOff())
        # Every second batch is judged with gradients of half a step in place.
        trainer(tmp_path, *judges, max_steps=2, accumulate_grad_batches=2).fit(module, pairs())
        weights.append(torch.cat([p.detach().flatten() for p in trained_parameters(module.policy)]))
    assert torch.equal(*weights)
    assert [entry["step"] for entry in history(tmp_path)] == [1, 2]
    assert module.policy.unet.training
    assert not module.policy.vae.training


def test_results_do_not_depend_on_the_batch_size(tmp_path, pipelines):
    entries = []
    for batch_size in (1, 3):
        module = make(pipelines, LoRA(), AdapterOff())
        judge = win_rate(test_prompts=PROMPTS, batch_size=batch_size)
        trainer(tmp_path / str(batch_size), judge).test(module, DataLoader([0]), verbose=False)
        entries += history(tmp_path / str(batch_size))
    one, three = (entry["policy"]["brightness"]["mean"] for entry in entries)
    assert one == pytest.approx(three, abs=1e-5)


def test_the_reference_is_drawn_once_and_again_only_if_something_changed(tmp_path, pipelines):
    def evaluate(adaptation=LoRA(), reference=None, **options):  # noqa: B008
        module = make(pipelines, adaptation, reference or AdapterOff())
        trainer(tmp_path, win_rate(test_prompts=PROMPTS, **options)).test(module, DataLoader([0]), verbose=False)
        return history(tmp_path)[-1]["reference"]["brightness"]["mean"]

    evaluate()
    (cache,) = (tmp_path / "win_rate_reference").iterdir()
    scores = json.loads(cache.read_text())
    cache.write_text(json.dumps(scores | {"brightness": [7.0, 7.0, 7.0]}))
    assert evaluate() == 7.0
    assert evaluate(seed=1) != 7.0
    assert evaluate(sampler=Sampler(steps=3, guidance_scale=2.0)) != 7.0
    assert evaluate(rewards=[Brightness(sign=0.5)]) != 7.0
    assert len(list((tmp_path / "win_rate_reference").iterdir())) == 4


def test_a_repeated_evaluation_replaces_its_entry(tmp_path, pipelines):
    for _ in range(2):
        module = make(pipelines, LoRA(), AdapterOff())
        trainer(tmp_path, win_rate(test_prompts=PROMPTS)).test(module, DataLoader([0]), verbose=False)
    assert len(history(tmp_path)) == 1


def test_without_a_reference_only_rewards_are_reported(tmp_path, pipelines):
    module = make(pipelines, FullFineTuning(), None, SFT())
    run = trainer(tmp_path, win_rate(), max_steps=1)
    run.fit(module, pairs())
    (entry,) = history(tmp_path)
    assert (entry["reference"], entry["comparisons"]) == ({}, {})
    assert set(entry["policy"]) == {"brightness", "brightness/red"}


def test_validation_can_be_monitored(tmp_path, pipelines):
    module = make(pipelines, LoRA(), AdapterOff())
    run = trainer(tmp_path, win_rate())
    run.validate(module, pairs(1), verbose=False)
    metrics = run.callback_metrics  # what ModelCheckpoint and EarlyStopping monitor
    assert metrics["val/win_rate/brightness"] == 0.5
    assert metrics["val/win_rate/brightness_low"] < 0.5 < metrics["val/win_rate/brightness_high"]


def test_a_score_that_is_no_number_is_told(tmp_path, pipelines):
    module = make(pipelines, LoRA(), AdapterOff())
    with pytest.raises(UserError, match="reward broken is nan for a picture of the policy"):
        trainer(tmp_path, win_rate(rewards=[Broken()], test_prompts=PROMPTS)).test(module, DataLoader([0]))


def test_bad_settings_are_told(tmp_path, pipelines):
    with pytest.raises(ConfigError, match="different names"):
        win_rate(rewards=[Brightness(), Brightness()])
    with pytest.raises(ConfigError, match="test_prompts is not set"):
        trainer(tmp_path, win_rate()).test(make(pipelines, LoRA(), AdapterOff()), DataLoader([0]))
    with pytest.raises(UserError, match="nowhere"):
        win_rate(prompts="nowhere.txt")


# What is kept


@pytest.mark.parametrize("damage", [b"", b"[{", b'{"a": 1}', b'[{"split": 1}]', b"[[[[", b"\xff\xfe", b"null"])
def test_a_damaged_history_is_set_aside_and_ends_no_run(tmp_path, pipelines, caplog, damage):
    (tmp_path / "win_rate.json").write_bytes(damage)
    module = make(pipelines, LoRA(), AdapterOff())
    trainer(tmp_path, win_rate(every_n_steps=1), max_steps=1).fit(module, pairs())
    assert [entry["step"] for entry in history(tmp_path)] == [1]
    assert (tmp_path / "win_rate.json.damaged").read_bytes() == damage
    (line,) = [record.getMessage() for record in caplog.records if "damaged" in record.getMessage()]
    assert line == f"{tmp_path / 'win_rate.json'} is damaged; set aside as win_rate.json.damaged, and begun again"


@pytest.mark.parametrize("damage", ["", "[1]", '{"brightness": [0.1]}', '{"brightness": ["a", "b", "c"]}'])
def test_damaged_scores_of_the_reference_are_made_again(tmp_path, pipelines, damage):
    def judged():
        module = make(pipelines, LoRA(), AdapterOff())
        trainer(tmp_path, win_rate(every_n_steps=1), max_steps=1).fit(module, pairs())
        (kept,) = (tmp_path / "win_rate_reference").glob("*.json")
        return kept, kept.read_bytes()

    kept, whole = judged()
    kept.write_text(damage)
    assert judged() == (kept, whole)


def test_a_run_that_goes_back_drops_what_it_left_behind(tmp_path):
    for split, step in (("val", 2), ("val", 4), ("test", 4), ("val", 6)):
        add_entry(tmp_path / "win_rate.json", {"split": split, "step": step})
    drop_later_entries(tmp_path / "win_rate.json", 4)
    assert [(entry["split"], entry["step"]) for entry in history(tmp_path)] == [("val", 2), ("val", 4), ("test", 4)]
    drop_later_entries(tmp_path / "win_rate.json", 3)
    assert [(entry["split"], entry["step"]) for entry in history(tmp_path)] == [("val", 2)]


def test_the_callback_drops_them(tmp_path, pipelines):
    add_entry(tmp_path / "win_rate.json", {"split": "test", "step": 9})
    module = make(pipelines, LoRA(), AdapterOff())
    trainer(tmp_path, win_rate(every_n_steps=1), max_steps=1).fit(module, pairs())
    assert [(entry["split"], entry["step"]) for entry in history(tmp_path)] == [("val", 1)]
