"""Settings on the command line: callbacks by name, null, help, and words that are nearly right."""

import subprocess
import sys

import pytest
from toy_world import toy_folder

from experiments import run
from experiments.cli.compose import CommandLine
from experiments.cli.start import Start
from experiments.cli.tree import find
from lightning_modules.errors import ConfigError

folder = pytest.fixture(toy_folder)


def tree(*words, config="dpo_tiny"):
    return Start.of(CommandLine.split(["--config", config, *words])).tree


def parsed(folder, capsys, *words, config):
    import yaml

    with pytest.raises(SystemExit):
        run.main(["--config", config, *words, "--print_config"])
    return yaml.safe_load(capsys.readouterr().out)


def test_a_value_may_follow_its_key():
    apart = ["--seed", "-1", "--allow_changes", "--trainer.logger", "CSVLogger", "--trainer.callbacks.WinRate", "null"]
    joined = ["--seed=-1", "--allow_changes", "--trainer.logger=CSVLogger", "--trainer.callbacks.WinRate=null"]
    assert CommandLine.split(apart) == CommandLine.split(joined)
    assert CommandLine.split(["--allow_changes", "stray", "--last"]).overrides == ("--allow_changes", "stray", "--last")
    placed = tree(*apart)["trainer"]["logger"]
    assert placed["class_path"] == "CSVLogger"
    assert placed["init_args"]["save_dir"] == "${run_dir}"


# Callbacks


def test_a_setting_of_a_callback_is_that_of_the_named_one():
    changed = tree("--trainer.callbacks.WinRate.every_n_steps=10", "--trainer.callbacks.WinRate.sampler.eta", "0.5")
    was, now = tree()["trainer"]["callbacks"], changed["trainer"]["callbacks"]
    assert [one for one, two in zip(was, now, strict=True) if one != two] == [find(tree(), "trainer.callbacks.WinRate")]
    win_rate = find(changed, "trainer.callbacks.WinRate")
    assert win_rate["init_args"]["every_n_steps"] == 10
    assert win_rate["init_args"]["sampler"] == {
        "class_path": "Sampler", "init_args": {"steps": 20, "guidance_scale": 2.5, "eta": 0.5},
    }  # fmt: skip


def test_the_parser_reads_the_callbacks_as_changed(folder, capsys):
    words = ["--trainer.callbacks.SampleGrid.number=3", "--trainer.callbacks.WinRate=null",
             "--trainer.callbacks+=callbacks.loss_guard.LossGuard"]  # fmt: skip
    read = parsed(folder, capsys, *words, config="dpo_tiny")["trainer"]["callbacks"]
    names = [callback["class_path"].rpartition(".")[2] for callback in read]
    assert names == ["RunCheckpoint", "LearningRateMonitor", "SampleGrid", "Cost", "ExportPolicy", "LossGuard"]
    assert read[2]["init_args"]["number"] == 3
    assert read[2]["init_args"]["every_n_steps"] == 50


def test_callbacks_are_replaced_appended_and_given_as_they_are_typed():
    assert tree("--trainer.callbacks=[]")["trainer"]["callbacks"] == []
    assert tree("--trainer.callbacks=null")["trainer"]["callbacks"] == []
    assert tree("--trainer.callbacks=Cost")["trainer"]["callbacks"] == [{"class_path": "Cost"}]
    words = ["--trainer.callbacks=[Cost]", "--trainer.callbacks+={class_path: SampleGrid, init_args: {number: 2}}",
             "--trainer.callbacks.SampleGrid.number=1e-1"]  # fmt: skip
    assert tree(*words)["trainer"]["callbacks"] == [
        {"class_path": "Cost"}, {"class_path": "SampleGrid", "init_args": {"number": 0.1}},
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("--trainer.callbacks.every_n_steps=5", "trainer.callbacks.every_n_steps: say of which callback, as in "
         "trainer.callbacks.RunCheckpoint.every_n_steps; there are RunCheckpoint, LearningRateMonitor, SampleGrid"),
        ("--trainer.callbacks.WinRat.every_n_steps=5", "trainer.callbacks names no WinRat (did you mean 'WinRate'?); "),
        ("--trainer.callbacks.LossGuard.window=5", "there are RunCheckpoint, LearningRateMonitor, SampleGrid, WinRate, "
         "Cost, ExportPolicy; add it with --trainer.callbacks+=LossGuard"),
        ("--trainer.callbacks.WinRate.every_n_stepz=5", "every_n_stepz' does not exist (did you mean 'every_n_steps'"),
    ],
)  # fmt: skip
def test_a_callback_that_is_not_there_gets_one_line(folder, word, message):
    with pytest.raises(ConfigError) as error:
        run.main(["--config", "dpo_tiny", word])
    assert message in str(error.value)
    assert "\n" not in str(error.value)


# Values


@pytest.mark.parametrize(
    ("config", "key", "text", "value"),
    [
        ("dpo_tiny", "model.policy.negative_prompt", "null", None),
        ("dpo_tiny", "model.policy.negative_prompt", "None", "None"),
        ("dpo_tiny", "model.policy.revision", "null", None),
        ("dpo_tiny", "model.policy.revision", "0123", "0123"),
        ("dpo_tiny", "model.policy.revision", "1.50", "1.50"),
        ("dpo_tiny", "model.policy.negative_prompt", "a: b, [c]", "a: b, [c]"),
        ("dpo_tiny", "model.policy.negative_prompt", "true", "true"),
        ("dpo_tiny", "model.policy.adaptation.text_encoder", "true", True),
        ("dpo_tiny", "model.optimizer.lr", "1e-6", 1e-6),
        ("spo_tiny", "data.scorer.model.processor", "null", None),
        ("spo_tiny", "data.scorer.model.processor", "folder", "folder"),
        ("spo_tiny", "data.pools_dir", "null", None),
    ],
)
@pytest.mark.parametrize("together", [True, False])
def test_a_value_means_what_it_says(folder, capsys, config, key, text, value, together):
    words = [f"--{key}={text}"] if together else [f"--{key}", text]
    read = find(parsed(folder, capsys, *words, config=config), key)
    assert (read, type(read)) == (value, type(value))


def test_classes_within_classes_are_switched(folder, capsys):
    words = ["--data.scorer={class_path: RewardScorer, init_args: {reward: ShapesReward, scale: 8.0}}",
             "--data.sampler.threshold=0.25", "--model.policy.adaptation=LoRA",
             "--model.policy.adaptation.rank=3"]  # fmt: skip
    read = parsed(folder, capsys, *words, config="spo_tiny")
    assert find(read, "data.scorer.reward.class_path") is not None
    assert find(read, "data.scorer.scale") == 8.0
    assert find(read, "model.policy.adaptation.rank") == 3
    assert find(read, "data.sampler.threshold") == 0.25


def test_null_reaches_classes_that_the_command_line_names(folder, capsys):
    words = ["--data.scorer=StepAwareScorer", "--data.scorer.model=StepAwarePreferenceModel",
             "--data.scorer.model.processor", "null", "--data.scorer.model.pretrained=somewhere"]  # fmt: skip
    (folder / "bare.yaml").write_text("data: {class_path: StepPoolDataModule, init_args: {scorer: RewardScorer}}")
    changed = tree(*words, config=str(folder / "bare.yaml"))
    assert find(changed, "data.scorer.model") == {
        "class_path": "StepAwarePreferenceModel", "init_args": {"processor": None},
    }  # fmt: skip
    read = parsed(folder, capsys, "--model.policy.adaptation={class_path: LoRA, init_args: {alpha: null}}", *words,
                  config="spo_tiny")  # fmt: skip
    assert find(read, "data.scorer.model.processor") is None
    assert find(read, "data.scorer.model.pretrained") == "somewhere"
    assert find(read, "model.policy.adaptation.alpha") is None
    with pytest.raises(ConfigError, match="data.scorer.model.processor=null: the settings name no class for data.sco"):
        tree("--data.scorer.model.processor=null", config=str(folder / "bare.yaml"))


def test_a_mapping_replaces_what_was_given_before_it():
    """As everywhere on a command line, the last word counts."""
    begun = Start.of(
        CommandLine.split(
            ["--config", "spo_tiny", "--data.scorer.model.dtype=fp16", "--data.scorer.model=StepAwarePreferenceModel"]
        )
    )
    assert begun.words == ()
    assert find(begun.tree, "data.scorer.model.pretrained") == "embedded/step_aware"


# Help


def test_help_is_a_page_of_its_own_and_needs_no_framework():
    code = (
        "import sys\nfrom experiments import run\ntry:\n    run.main(['--help'])\nexcept SystemExit as end:\n"
        "    assert end.code == 0\nassert not {'torch', 'lightning', 'diffusers'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for word in ("--config NAME", "--resume", "--allow_changes", "--help_all", "  dpo_tiny ", "  spo_sd15 "):
        assert word in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 120


def test_all_help_lists_every_option(folder, capsys):
    with pytest.raises(SystemExit):
        run.main(["--help_all"])
    printed = capsys.readouterr().out
    for option in ("--trainer.max_steps", "--run_dir", "--pictures.sampler.steps", "--seed_everything"):
        assert option in printed


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        (["--config", "spo_tiny", "--model.objective.help"], "ratio_clip"),
        (["--config", "spo_tiny", "--model.objective=DPO", "--model.objective.help"], "label_smoothing"),
        (["--config", "spo_tiny", "--model.objective.help", "IPO"], "tau"),
        (["--config", "dpo_tiny", "--model.policy.adaptation.help"], "text_encoder"),
        (["--config", "dpo_tiny", "--model.help"], "caption_dropout"),
        (["--config", "dpo_tiny", "--trainer.callbacks.WinRate.help"], "images_per_prompt"),
        (["--model.help", "AlignmentModule"], "caption_dropout"),
    ],
)
def test_help_for_the_class_that_a_config_names(folder, capsys, words, shown):
    with pytest.raises(SystemExit) as end:
        run.main(words)
    assert end.value.code in (0, None)
    assert shown in capsys.readouterr().out


# Words that are nearly right


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--confg", "x"], "setting 'confg' does not exist (did you mean --config x?)"),
        (["--cofnig=dpo_tiny", "--trainer.max_steps=3"], "(did you mean --config dpo_tiny?)"),
        (["spo_tiny"], "'spo_tiny' is no job (fit, validate, test, predict); if you mean the config, write "
         "--config spo_tiny"),
        (["spo_tinny"], "write --config spo_tiny"),
        (["dpo_tiny.yaml"], "write --config dpo_tiny"),
        (["toy.yaml", "--trainer.max_steps=3"], "write --config toy.yaml"),
        (["trian", "--config", "toy.yaml"], "job 'trian' is unknown; choose one of fit, validate, test, predict"),
        (["tset", "--config", "toy.yaml"], "job 'tset' is unknown (did you mean 'test'?)"),
    ],
)  # fmt: skip
def test_a_forgotten_or_mistyped_config_is_explained(folder, words, message):
    with pytest.raises(ConfigError) as error:
        run.main(words)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
