"""The command line: composing YAMLs, overrides, class switches, run folders, one-line errors, jobs, resuming."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from tiny_world import trained_parameters
from toy_world import Lenient, Strict, start, toy_folder

from datamodules.shapes.drawing import prompt_splits
from experiments import prepare_pickapic, run
from experiments.cli.compose import (
    CommandLine,
    find_config,
    known_classes,
    load,
    packaged_configs,
    settings,
)
from experiments.cli.tree import merge, same_class, switch_class
from experiments.shapes import prepare as prepare_shapes
from lightning_modules.errors import ConfigError, UserError

folder = pytest.fixture(toy_folder)

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.filterwarnings("ignore:.*dataloader is not resumable:UserWarning")


# Composition


def test_the_job_is_the_first_word_or_fit():
    line = CommandLine.split(["test", "--config", "a", "--x=1", "-c", "b.yaml", "--config=c"])
    assert (line.job, line.configs, line.overrides) == ("test", ("a", "b.yaml", "c"), ("--x=1",))
    assert line.run_name == "a+b+c"
    assert CommandLine.split(["--config", "a"]).job == "fit"


def test_packaged_configs_are_found_with_and_without_their_ending(folder):
    assert {"dpo_sd15.yaml", "dpo_sdxl.yaml", "sft_sd15.yaml", "dpo_tiny.yaml"} <= set(packaged_configs())
    assert find_config("dpo_tiny") == find_config("dpo_tiny.yaml")
    assert find_config("toy.yaml") == Path("toy.yaml")


def test_later_files_win_key_by_key():
    below = {"trainer": {"max_steps": 1, "callbacks": ["A"]}, "seed": 1}
    assert merge(below, {"trainer": {"max_steps": 2}}) == {"trainer": {"max_steps": 2, "callbacks": ["A"]}, "seed": 1}
    assert merge(below, {"trainer": {"callbacks": ["B"]}})["trainer"]["callbacks"] == ["B"]
    assert merge(below, {"trainer": {"callbacks+": "B"}})["trainer"]["callbacks"] == ["A", "B"]
    assert below["trainer"]["callbacks"] == ["A"]


SPO = {"class_path": "SPO", "init_args": {"beta": 10.0, "eps": 0.1}}


@pytest.mark.parametrize("above", [{"class_path": "DPO"}, "DPO", {"class_path": "objectives.DPO"}])
def test_another_class_in_a_later_file_takes_nothing_of_the_former(above):
    merged = merge({"objective": SPO}, {"objective": above})["objective"]
    assert same_class(merged["class_path"], "DPO")
    assert "init_args" not in merged


@pytest.mark.parametrize(
    "above", [{"class_path": "a.SPO", "init_args": {"eps": 0.2}}, {"init_args": {"eps": 0.2}}, {"eps": 0.2}]
)
def test_the_same_class_in_a_later_file_keeps_its_arguments(above):
    assert merge({"objective": SPO}, {"objective": above})["objective"]["init_args"] == {"beta": 10.0, "eps": 0.2}


def test_arguments_over_the_bare_name_of_a_class_are_its_arguments():
    assert merge({"a": "SPO"}, {"a": {"eps": 0.2}}) == {"a": {"class_path": "SPO", "init_args": {"eps": 0.2}}}
    assert merge({"a": "some text"}, {"a": {"eps": 0.2}}) == {"a": {"eps": 0.2}}


@pytest.mark.parametrize("change", [{"n": 2}, {"init_args": {"n": 2}}, {"class_path": "Grid", "init_args": {"n": 2}}])
@pytest.mark.parametrize("below", ["Grid", {"class_path": "Grid"}, {"class_path": "Grid", "init_args": {"n": 1}}])
def test_a_callback_named_in_a_later_file_takes_arguments_with_and_without_their_keyword(below, change):
    assert merge([below, "Cost"], {"Grid": change}) == [{"class_path": "Grid", "init_args": {"n": 2}}, "Cost"]


def test_lists_are_appended_to_within_a_class_whose_keyword_is_left_out():
    below = {"class_path": "WinRate", "init_args": {"rewards": ["A"]}}
    assert merge(below, {"rewards+": "B"})["init_args"]["rewards"] == ["A", "B"]


def test_a_class_laid_over_settings_without_one_takes_them():
    above = {"class_path": "Sampler", "init_args": {"steps": 50}}
    merged = {"class_path": "Sampler", "init_args": {"steps": 50, "eta": 0.0}}
    assert merge({"steps": 20, "eta": 0.0}, above) == merged


@pytest.mark.parametrize("above", ["rewards.brightness", "${model.reward}", "embedded/shapes"])
def test_a_text_that_names_no_class_replaces_one(above):
    assert merge({"reward": {"class_path": "PickScore"}}, {"reward": above}) == {"reward": above}


def test_what_is_no_list_is_appended_to_as_one_and_settings_are_not():
    assert merge({"shards": "a"}, {"shards+": "b"}) == {"shards": ["a", "b"]}
    assert merge({"shards": None}, {"shards+": ["b"]}) == {"shards": ["b"]}
    with pytest.raises(ConfigError, match="appends to callbacks, which is no list below it, but has WinRate"):
        merge({"callbacks": {"WinRate": {}}}, {"callbacks+": ["Cost"]})


def test_entries_that_go_by_number_are_those_of_the_list_below():
    assert merge(["A", "B", "C"], {0: None, "1": None}) == ["C"]
    assert merge(["A", "B"], {0: None, "B": {"n": 1}}) == [{"class_path": "B", "init_args": {"n": 1}}]
    assert merge({"weights": {1: 0.5, 2: 1.0}}, {"weights": {2: 3.0}}) == {"weights": {1: 0.5, 2: 3.0}}


def test_an_overlay_with_a_base_changes_what_lies_below_both(tmp_path):
    """What it appends is appended to the config's list, and what it changes of a class is the class's."""
    (tmp_path / "mine.yaml").write_text(
        "base: [one, two]\nmodel: {objective: {beta: 100}}\ntrainer: {callbacks+: [Third]}\n"
    )
    (tmp_path / "one.yaml").write_text("trainer: {callbacks+: [First], callbacks: {WinRate: {batch_size: 3}}}\n")
    (tmp_path / "two.yaml").write_text("model: {init_args: {seed: 5}}\ntrainer: {callbacks: {First: {n: 2}}}\n")
    plain = CommandLine.split(["--config", "dpo_tiny"]).tree()
    tree = CommandLine.split(["--config", "dpo_tiny", "--config", str(tmp_path / "mine.yaml")]).tree()
    assert tree["model"]["init_args"]["objective"]["init_args"]["beta"] == 100
    assert tree["model"]["init_args"]["seed"] == 5
    assert tree["model"].keys() == plain["model"].keys()
    *kept, first, third = tree["trainer"]["callbacks"]
    assert (first, third) == ({"class_path": "First", "init_args": {"n": 2}}, "Third")
    changed = [node["class_path"] for node, was in zip(kept, plain["trainer"]["callbacks"], strict=True) if node != was]
    assert changed == ["WinRate"]


def test_a_class_switched_on_the_command_line_takes_nothing_of_the_former():
    for key, value in settings(["--model.objective=DPO", "--model.objective", "DPO"]):
        tree = {"model": {"class_path": "M", "init_args": {"objective": dict(SPO), "width": 3}}}
        switch_class(tree, key, value)
        assert tree == {"model": {"class_path": "M", "init_args": {"objective": {"class_path": "DPO"}, "width": 3}}}
    for value in ("SPO", "objectives.SPO", "5", "null"):
        tree = {"model": {"class_path": "M", "init_args": {"objective": dict(SPO)}}}
        switch_class(tree, "model.objective.init_args.beta" if value == "5" else "model.objective", value)
        assert tree["model"]["init_args"]["objective"]["init_args"] == SPO["init_args"] or value == "null"


def test_every_class_of_the_framework_is_known_without_importing_it():
    known = known_classes()
    assert known["DPO"] == "lightning_modules.objectives.dpo"
    assert known["WinRate"] == "callbacks.win_rate"
    assert known["PreferencePairsDataModule"] == "datamodules.preference_pairs"


PRESETS = {"spo_recommended": "spo_sd15", "spo_tiny_shuffled": "spo_tiny"}  # over which configs


@pytest.mark.parametrize("name", [file.removesuffix(".yaml") for file in packaged_configs()])
def test_packaged_configs_parse_and_say_what_they_cost(name, folder, capsys):
    below = ["--config", PRESETS[name]] if name in PRESETS else []
    with pytest.raises(SystemExit) as exit_:
        run.main([*below, "--config", name, "--print_config"])
    assert exit_.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    seed = printed["seed_everything"]
    assert printed["model"]["init_args"]["seed"] == printed["data"]["init_args"]["seed"] == seed
    lines = find_config(name).read_text().splitlines()
    head = "\n".join(line for line in lines if line.startswith("#"))
    if name in PRESETS:
        assert f"--config {PRESETS[name]} --config {name}" in head
        return
    assert f"python -m experiments.run --config {name}" in head
    assert all(word in head for word in ("Hardware:", "Cost:", "Expected:"))


@pytest.mark.parametrize(
    ("below", "overlay"),
    [
        ("dpo_sd15", "lora"), ("dpo_sdxl", "lora"), ("dpo_sdxl", "sft"), ("dpo_sd15", "pickapic"),
        ("dpo_sd15", "dmpo"), ("dpo_sdxl", "dmpo"), ("dpo_sd15", "dspo"), ("dpo_sd15", "kto"), ("dpo_sdxl", "mapo"),
        ("dpo_sd15", "sdpo"), ("dpo_sdxl", "sdpo"), ("dpo_tiny", "automatic_beta"),
        ("dpo_sd15", "smaller_card"), ("spo_sd15", "smaller_card"),
        ("spo_sd15", "tiny_decoder"), ("spo_tiny", "tiny_decoder"),
    ],
)  # fmt: skip
def test_overlays_compose(below, overlay, folder, capsys):
    with pytest.raises(SystemExit) as exit_:
        run.main(["--config", below, "--config", overlay, "--print_config"])
    assert exit_.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    expected = {"lora": ("reference", "lightning_modules.references.AdapterOff"),
                "pickapic": None, "smaller_card": None, "tiny_decoder": None}  # fmt: skip
    objectives = {"sft": "SFT", "dmpo": "DMPO", "dspo": "DSPO", "mapo": "MaPO", "kto": "KTO", "sdpo": "Safeguard",
                  "automatic_beta": "AutomaticBeta"}  # fmt: skip
    expected |= {name: ("objective", f"lightning_modules.objectives.{kind}") for name, kind in objectives.items()}
    if overlay == "tiny_decoder":
        assert printed["data"]["init_args"]["decoder"]["init_args"]["pretrained"] == "madebyollin/taesd"
    if overlay == "smaller_card":
        assert printed["data"]["init_args"]["batch_size"] == 1
        assert (
            printed["data"]["init_args"]["pairs_per_step"]
            == load(find_config(below))["data"]["init_args"]["pairs_per_step"]
        )
        assert printed["model"]["init_args"]["policy"]["init_args"]["gradient_checkpointing"] is True
    if expected[overlay]:
        key, path = expected[overlay]
        assert printed["model"]["init_args"][key]["class_path"] == path


def test_a_config_lies_over_the_configs_that_it_names(folder):
    (folder / "below.yaml").write_text("trainer: {max_steps: 1, callbacks: [Cost, {class_path: SampleGrid}]}")
    (folder / "middle.yaml").write_text("base: below\ntrainer: {max_steps: 2}\nseed_everything: 3")
    (folder / "above.yaml").write_text(
        "base: [middle.yaml]\ntrainer: {callbacks: {SampleGrid: {number: 4}, Cost: null}, callbacks+: [WinRate]}"
    )
    assert load(Path("above.yaml")) == {
        "trainer": {
            "max_steps": 2,
            "callbacks": [{"class_path": "SampleGrid", "init_args": {"number": 4}}, "WinRate"],
        },
        "seed_everything": 3,
    }
    (folder / "above.yaml").write_text("base: below\ntrainer: {callbacks: {WinRate: null}}")
    with pytest.raises(ConfigError, match="changes WinRate, which the list below it does not hold; there are Cost, S"):
        load(Path("above.yaml"))
    (folder / "below.yaml").write_text("base: middle")
    with pytest.raises(ConfigError, match="its base middle has it as a base again"):
        load(Path("middle.yaml"))


def test_the_baseline_differs_from_dpo_in_its_objective_alone():
    tree = load(find_config("dpo_sd15"))
    tree["model"]["init_args"]["objective"] = {"class_path": "SFT"}
    assert load(find_config("sft_sd15")) == tree


@pytest.mark.parametrize("name", ["dpo_sd15_lora", "dpo_sdxl_lora", "spo_sd15_lora24"])
def test_configs_for_one_small_gpu_hold_no_second_network(name):
    tree = load(find_config(name))["model"]["init_args"]
    assert tree["policy"]["init_args"]["adaptation"]["class_path"] == "LoRA"
    assert tree["policy"]["init_args"]["gradient_checkpointing"] is True
    assert tree["policy"]["init_args"]["frozen_dtype"] in ("bf16", "fp16")
    assert tree["reference"] == {"class_path": "AdapterOff"}


# Overrides


def test_every_field_can_be_overridden(folder):
    cli = start(
        "--model.objective.beta=2000", "--data.batch_size=4", "--trainer.max_steps=1", "--seed_everything=3",
        "--model.optimizer.lr", "0.5", "--trainer.callbacks+=LearningRateMonitor",
    )  # fmt: skip
    assert cli.model.objective == Lenient(beta=2000.0)
    assert (cli.model.seed, cli.datamodule.seed, cli.datamodule.batch_size) == (3, 3, 4)
    assert cli.model.configure_optimizers().defaults["lr"] == 0.5
    assert cli.trainer.global_step == 1
    saved = yaml.safe_load((folder / "runs" / "toy" / "config.yaml").read_text())
    assert saved["model"]["init_args"]["objective"]["init_args"]["beta"] == 2000.0
    assert saved["data"]["init_args"]["seed"] == 3


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--model.objective=Strict"], Strict(beta=5000.0)),
        (["--model.objective=Strict", "--model.objective.beta=3"], Strict(beta=3.0)),
        (["--config", "switch.yaml"], Strict(beta=5000.0)),
        (["--model.objective=Lenient"], Lenient(beta=11.0)),
    ],
)
def test_switching_the_objective_does_not_keep_the_others_beta(folder, words, expected):
    (folder / "switch.yaml").write_text("model: {init_args: {objective: {class_path: Strict}}}")
    cli = run.main(["--config", "toy.yaml", *words, "--trainer.max_steps=0"])
    assert cli.model.objective == expected


def test_only_a_data_module_that_knows_the_position_keeps_lightnings_samplers_away(folder, world):
    """Another's loaders would give every process the same samples."""

    def replaces(*words):
        cli = run.main([*words, "--trainer.max_steps=0", "--run_dir=samplers"])
        return cli.trainer._accelerator_connector.use_distributed_sampler

    assert replaces("--config", "toy.yaml") is True
    assert replaces("--config", str(world)) is False


# Bad input


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--config", "dpo_sd53"], "config 'dpo_sd53' is no file and no packaged config (did you mean 'dpo_sd35'?)"),
        (["--config"], "--config wants a name; there are d3po_sd15.yaml, d3po_tiny.yaml, dpo_flow_tiny.yaml"),
        ([], "--config NAME is missing; there are d3po_sd15.yaml"),
        (["train", "--config", "toy.yaml"], "job 'train' is unknown"),
        (["--config", "broken.yaml"], "config broken.yaml: cannot be read as YAML"),
        (["--config", "list.yaml"], "config list.yaml: wants settings such as 'model: ...' at its top, got a list"),
    ],
)
def test_files_and_jobs_that_do_not_exist(folder, words, message):
    (folder / "broken.yaml").write_text("model: [")
    (folder / "list.yaml").write_text("- 1")
    with pytest.raises(ConfigError) as error:
        run.main(words)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        (
            "--model.objective.betta=1",
            "setting 'model.objective.betta' does not exist (did you mean 'beta'?); Lenient takes beta, clip",
        ),
        ("--model.objektive.beta=1", "setting 'model.objektive' does not exist (did you mean 'objective'?)"),
        ("--data.batchsize=1", "setting 'data.batchsize' does not exist (did you mean 'batch_size'?)"),
        ("--trainer.max_step=1", "setting 'trainer.max_step' does not exist (did you mean 'trainer.max_steps'?)"),
        ("--modle.seed=1", "setting 'modle.seed' does not exist (did you mean 'model'?)"),
        ("--model.objective.beta=much", "model.objective.beta wants a value of type float, got 'much'"),
        ("--data.batch_size=1.5", "data.batch_size wants a value of type int, got '1.5'"),
        ("--trainer.max_steps=many", "trainer.max_steps wants a value of type int, got 'many'"),
        (
            "--model.objective=Strickt",
            "model.objective wants a class of kind Loss, got 'Strickt' (did you mean 'Strict'?); "
            "there are Lenient, Strict",
        ),
        ("--model.objective=AdamW", "model.objective wants a class of kind Loss, got 'AdamW'; there are"),
        ("--trainer.callbacks=SampleGird", "no class named 'SampleGird' fits here (did you mean 'SampleGrid'?)"),
        ("--data.seed=${nowhere}", "interpolation in the settings: Interpolation key 'nowhere' not found"),
        ("--trainer.callbacks=RichProgressBar", "trainer: Trainer was configured with `enable_progress_bar=False`"),
        (
            "--trainer.callbacks=[{class_path: SampleGrid, init_args: {prompts: [a]}}, "
            "{class_path: SampleGrid, init_args: {prompts: [b]}}]",
            "trainer.callbacks names SampleGrid 2 times, and all would write the same files",
        ),
        ("--ckpt_path=last", "no checkpoint in runs/toy/checkpoints; start without --ckpt_path"),
        ("--ckpt_path=gone.ckpt", "checkpoint gone.ckpt does not exist"),
    ],
)
def test_a_wrong_setting_gets_one_line(folder, word, message):
    with pytest.raises(ConfigError) as error:
        start(word)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert not (folder / "runs").exists()  # nothing half-written


def test_a_typo_in_a_file_gets_one_line(folder):
    (folder / "more.yaml").write_text("model: {init_args: {objective: {init_args: {bta: 3}}}}")
    with pytest.raises(ConfigError, match=r"'model.objective.bta' does not exist \(did you mean 'beta'\?\)"):
        start("--config", "more.yaml")


def test_missing_weights_get_one_line(folder):
    with pytest.raises(UserError, match="no folder 'nosuch'") as error:
        run.main(["test", "--config", "dpo_tiny", "--model.policy.pretrained=nosuch", "--ckpt_path=none"])
    assert "\n" not in str(error.value)
    assert not (folder / "runs").exists()


def test_the_shell_sees_one_line_and_status_2(folder):
    words = [sys.executable, "-m", "experiments.run", "--config", "nosuch"]
    done = subprocess.run(words, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: config 'nosuch' is no file and no packaged config; there are d3po_sd15.yaml")
    assert done.stderr.count("\n") == 1


# Run folders and resuming


def test_a_run_keeps_everything_in_one_folder_and_no_other_run_starts_there(folder):
    start()
    here = folder / "runs" / "toy"
    assert (here / "config.yaml").is_file()
    assert list(here.glob("events.out.tfevents.*"))
    assert {file.name for file in (here / "checkpoints").iterdir()} == {"last.ckpt", "step=0000002.ckpt"}
    with pytest.raises(ConfigError, match=r"already holds a run .*--ckpt_path last, or give another --run_dir"):
        start()
    start("--run_dir", "elsewhere")
    assert (folder / "elsewhere" / "config.yaml").is_file()


def test_a_run_can_be_repeated_from_its_saved_config(folder):
    first = start("--model.objective=Strict", "--model.objective.beta=9", "--seed_everything=5")
    start("--ckpt_path=last", "--trainer.max_steps=3", "--model.objective=Strict", "--model.objective.beta=9")
    again = run.main(["--config", "runs/toy/config.yaml", "--run_dir=again", "--trainer.max_steps=2"])
    assert again.model.objective == first.model.objective
    assert again.checkpoint is None


@pytest.mark.parametrize("checkpoint", ["last", "auto", "runs/toy/checkpoints/step=0000002.ckpt"])
def test_going_on_from_a_checkpoint_obeys_the_command_line(folder, checkpoint):
    start("--ckpt_path=auto")  # nothing there yet: starts
    cli = start("--ckpt_path", checkpoint, "--trainer.max_steps=3")
    assert cli.trainer.global_step == 3
    assert yaml.safe_load((folder / "runs" / "toy" / "config-0002.yaml").read_text())["trainer"]["max_steps"] == 3


def test_an_evaluation_wants_trained_weights_unless_told_otherwise(folder):
    with pytest.raises(ConfigError, match="fit first, or evaluate with --ckpt_path none"):
        start("test")
    assert start("test", "--ckpt_path=none").checkpoint is None
    start()
    assert start("test").checkpoint == Path("runs/toy/checkpoints/last.ckpt")


# The embedded world's road, on a tiny pipeline


@pytest.fixture(scope="module")
def world(tmp_path_factory, pipelines):
    """dpo_tiny cut down to seconds, and its shards."""
    home = tmp_path_factory.mktemp("world")
    prepare_shapes.main(["--output", str(home / "parquet"), "--pairs", "32"])
    prepare_pickapic.main(["--input", str(home / "parquet"), "--output", str(home / "pairs")])
    tree = load(find_config("dpo_tiny"))
    tree["trainer"] |= {"max_steps": 4, "enable_progress_bar": False, "enable_model_summary": False}
    tree["trainer"]["accumulate_grad_batches"] = 2
    policy = tree["model"]["init_args"]["policy"]["init_args"]
    policy["pretrained"] = str(pipelines / "tiny-sd15")
    tree["data"]["init_args"] |= {"shards": str(home / "pairs"), "batch_size": 4}
    quick = {"sampler": {"class_path": "Sampler", "init_args": {"steps": 2}}, "image_size": 32}
    for callback in tree["trainer"]["callbacks"]:
        if callback["class_path"] in ("WinRate", "SampleGrid"):
            callback["init_args"] |= quick | {"every_n_steps": 3}
        if callback["class_path"] == "SampleGrid":
            callback["init_args"] |= {"number": 2}
        if callback["class_path"] == "WinRate":
            few = {
                "prompts": list(prompt_splits()["validation"][:4]),
                "test_prompts": list(prompt_splits()["test"][:5]),
            }
            callback["init_args"] |= few | {"images_per_prompt": 1}
    (home / "tiny.yaml").write_text(yaml.safe_dump(tree))
    return home / "tiny.yaml"


def weights(cli):
    return torch.cat([parameter.detach().flatten() for parameter in trained_parameters(cli.model.policy)])


def test_fit_test_predict_and_an_exact_resume(folder, world, capsys):
    whole = run.main(["--config", str(world)])
    run.main(["--config", str(world), "--run_dir=cut", "--trainer.max_steps=3"])
    resume = ["--run_dir=cut", "--ckpt_path=last", "--trainer.max_steps=4", "--trainer.accumulate_grad_batches=1"]
    with pytest.raises(ConfigError, match=r"cut took 8 pairs per step, now 1 device x 4 x 1 = 4 pairs per step; give"):
        run.main(resume)
    resumed = run.main([*resume, "--data.pairs_per_step=8"])
    assert resumed.trainer.accumulate_grad_batches == 2
    assert torch.equal(weights(whole), weights(resumed))

    run.main(["test", "--config", str(world)])
    printed = capsys.readouterr().out
    assert "test prompts, step 4" in printed
    last = [
        "pictures (policy above, reference below): runs/tiny/samples/test_step=0000004.png",
        "largest changes, gains and losses: runs/tiny/samples/test_changes_step=0000004.png",
    ]
    assert printed.splitlines()[-2:] == last  # below the table, where one looks
    history = json.loads((folder / "runs" / "tiny" / "win_rate.json").read_text())
    assert [(entry["split"], entry["step"]) for entry in history] == [("val", 3), ("val", 4), ("test", 4)]
    assert history[-1]["comparisons"]["shapes"]["n"] == 5

    with pytest.raises(ConfigError, match="validate found no validation batches"):
        run.main(["validate", "--config", str(world)])

    (folder / "prompts.txt").write_text("a red circle\ntwo blue squares\n")
    run.main(["predict", "--config", str(world), "--pictures.prompts=prompts.txt", "--pictures.sampler.steps=2"])
    pictures = folder / "runs" / "tiny" / "pictures" / "step=0000004"
    assert sorted(file.name for file in pictures.iterdir()) == ["00000_00.png", "00001_00.png", "pictures.json"]


def test_two_processes_judge_as_one_does(folder, world):
    run.main(["test", "--config", str(world), "--ckpt_path=none", "--run_dir=one"])
    # Forked, because a fresh interpreter takes seconds to import; the processes and their exchange are the same.
    two = ["--run_dir=two", "--trainer.devices=2", "--trainer.strategy=ddp_fork"]
    run.main(["test", "--config", str(world), "--ckpt_path=none", *two])
    one, two = (json.loads((folder / name / "win_rate.json").read_text())[0] for name in ("one", "two"))
    for column in ("shapes", "shapes/correctness", "shapes/look"):
        assert two["policy"][column]["mean"] == pytest.approx(one["policy"][column]["mean"], abs=1e-6)
        assert two["comparisons"][column]["n"] == 5
