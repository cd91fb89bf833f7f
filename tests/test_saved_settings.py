"""A run that goes on, or is evaluated, has the settings that it was started with; what may differ is said."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from toy_world import Lenient, Strict, ToyModule, start, toy_folder

from experiments import run
from experiments.cli.compose import CommandLine, load
from experiments.cli.saved_settings import SavedSettings, changes, saved_files
from experiments.cli.start import Start
from lightning_modules.errors import ConfigError
from lightning_modules.learning_rates import ConstantWithWarmup

folder = pytest.fixture(toy_folder)
DATA = Path(__file__).parent / "data"

pytestmark = pytest.mark.filterwarnings("ignore:.*dataloader is not resumable:UserWarning")


class ScheduledModule(ToyModule):
    """Notes the rate and the decay of every step."""

    def __init__(
        self,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_scheduler: LRSchedulerCallable = ConstantWithWarmup,
    ) -> None:
        super().__init__(Strict(), optimizer)
        self.make_scheduler, self.rates = lr_scheduler, []

    def configure_optimizers(self):
        optimizer = self.make_optimizer(self.parameters())
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": self.make_scheduler(optimizer), "interval": "step"},
        }

    def on_before_optimizer_step(self, optimizer):
        self.rates.append((optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["weight_decay"]))


SCHEDULED = """
trainer: {accelerator: cpu, max_steps: 4, enable_progress_bar: false, enable_model_summary: false}
model:
  class_path: ScheduledModule
  init_args:
    optimizer: {class_path: AdamW, init_args: {lr: 1.0, weight_decay: 0.25}}
    lr_scheduler: {class_path: CosineWithWarmup, init_args: {total_steps: "${trainer.max_steps}"}}
data: {class_path: ToyData}
"""


def settings_of(file):
    return yaml.safe_load(Path(file).read_text())


# Resuming


def test_a_resumed_run_needs_neither_config_nor_overrides(folder):
    start("--model.objective.beta=77", "--run_dir=x")
    first = (folder / "x" / "config.yaml").read_text()
    cli = run.main(["--run_dir", "x", "--resume", "last", "--trainer.max_steps=4"])
    assert cli.model.objective == Lenient(beta=77.0)
    assert cli.trainer.global_step == 4
    assert (folder / "x" / "config.yaml").read_text() == first
    second = settings_of("x/config-0002.yaml")
    assert second["model"]["init_args"]["objective"]["init_args"]["beta"] == 77.0
    assert second["trainer"]["max_steps"] == 4
    again = run.main(["fit", "--run_dir=x", "--resume=auto"])
    assert (again.config.trainer.max_steps, again.model.objective.beta) == (4, 77.0)
    assert [file.name for file in saved_files(Path("x"))] == ["config.yaml", "config-0002.yaml", "config-0003.yaml"]


def test_a_config_named_again_does_not_undo_what_was_given_by_hand(folder):
    """The way that the documentation used to teach."""
    start("--model.objective.beta=77", "--trainer.callbacks+=LearningRateMonitor")
    cli = start("--resume=last", "--trainer.max_steps=3")
    assert cli.model.objective == Lenient(beta=77.0)
    assert [type(callback).__name__ for callback in cli.trainer.callbacks].count("LearningRateMonitor") == 1
    cli = start("--resume=auto", "--trainer.callbacks+=LearningRateMonitor")
    assert [type(callback).__name__ for callback in cli.trainer.callbacks].count("LearningRateMonitor") == 1
    assert (cli.trainer.max_steps, cli.model.objective.beta) == (3, 77.0)


def test_a_class_switched_by_hand_stays_switched(folder):
    start("--model.objective=Strict", "--model.objective.beta=5")
    assert start("--resume=last").model.objective == Strict(beta=5.0)
    assert start("--resume=last", "--model.objective.beta=5").model.objective == Strict(beta=5.0)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--model.objective.beta=4"], "model.objective.beta: 11.0 -> 4.0"),
        (["--model.objective=Strict"], "model.objective: Lenient -> Strict."),
        (["--model.optimizer.lr=1e-6"], "model.optimizer.lr: 0.0001 -> 1e-06"),
        (["--data.batch_size=4", "--trainer.precision=bf16-mixed"],
         "trainer.precision: None -> bf16-mixed; data.batch_size: 2 -> 4"),
        (["--seed_everything=3"], "seed_everything: 7 -> 3."),
    ],
)  # fmt: skip
def test_a_setting_that_makes_another_experiment_is_refused_unless_allowed(folder, words, told):
    start()
    for named in ([], ["--config", "toy.yaml"]):
        with pytest.raises(ConfigError) as error:
            run.main([*named, "--run_dir=runs/toy", "--resume=last", "--trainer.max_steps=3", *words])
        assert told in str(error.value)
        assert "runs/toy has other settings (config.yaml): " in str(error.value)
        assert "--allow_changes" in str(error.value)
        assert "\n" not in str(error.value)
    assert len(saved_files(Path("runs/toy"))) == 1
    cli = run.main(["--run_dir=runs/toy", "--resume=last", "--trainer.max_steps=3", *words, "--allow_changes"])
    assert cli.trainer.global_step == 3
    saved = settings_of("runs/toy/config-0002.yaml")
    assert saved["allow_changes"] is False
    assert saved["model"]["init_args"]["seed"] == saved["data"]["init_args"]["seed"] == saved["seed_everything"]


def test_a_config_file_that_was_edited_is_refused(folder):
    start()
    text = Path("toy.yaml").read_text()
    Path("toy.yaml").write_text(text.replace("beta: 11.0", "beta: 12.0"))
    with pytest.raises(ConfigError, match=r"model.objective.beta: 11.0 -> 12.0\. Leave them out"):
        start("--resume=last")
    assert start("--resume=last", "--allow_changes").model.objective.beta == 12.0


def test_what_may_change_is_told(folder, caplog, monkeypatch):
    from experiments.cli import experiment_cli

    told = []
    monkeypatch.setattr(experiment_cli, "rank_zero_info", told.append)
    start()
    assert told == []
    start("--resume=last")
    assert told == []
    start("--resume=last", "--trainer.max_steps=3", "--trainer.log_every_n_steps=5", "--trainer.devices=1")
    assert told == [
        "settings that differ from runs/toy/config-0002.yaml: trainer.devices: auto -> 1; trainer.max_steps: 2 -> 3; "
        "trainer.log_every_n_steps: None -> 5"
    ]


def test_settings_taken_from_others_go_with_them(folder):
    """As the schedule's length with ``trainer.max_steps``: from the saved settings as from the config."""
    (folder / "scheduled.yaml").write_text(SCHEDULED)
    run.main(["--config", "scheduled.yaml", "--trainer.max_steps=2"])
    saved = settings_of("runs/scheduled/config.yaml")
    assert saved["model"]["init_args"]["lr_scheduler"]["init_args"]["total_steps"] == 2
    for words in (["--run_dir=runs/scheduled"], ["--config", "scheduled.yaml"]):
        cli = run.main([*words, "--resume=last", "--trainer.max_steps=4"])
        assert cli.config.model.init_args.lr_scheduler.init_args.total_steps == 4


def test_a_reference_that_was_overridden_is_none_any_more(folder):
    start("--data.seed=3")
    cli = run.main(["--run_dir=runs/toy", "--resume=last", "--seed_everything=9", "--allow_changes"])
    assert (cli.model.seed, cli.datamodule.seed) == (9, 3)


def test_a_run_that_has_saved_nothing_yet_starts_with_what_is_given(folder):
    start("--resume=auto")
    for file in (folder / "runs" / "toy" / "checkpoints").iterdir():
        file.unlink()
    assert start("--resume=auto", "--model.objective.beta=3").model.objective.beta == 3.0
    (folder / "runs" / "toy" / "checkpoints" / "last.ckpt").unlink()
    (folder / "runs" / "toy" / "checkpoints" / "step=0000002.ckpt").unlink()
    assert run.main(["--run_dir=runs/toy", "--resume=auto"]).model.objective.beta == 3.0


@pytest.mark.parametrize("words", [["--run_dir=gone", "--resume=last"], ["test", "--run_dir=gone"], ["--resume=auto"]])
def test_without_config_there_must_be_settings(folder, words):
    with pytest.raises(ConfigError, match=r"holds no run's settings \(config.yaml\); point --run_dir at the run"):
        run.main(words)


def test_a_checkpoint_file_leads_to_its_run(folder):
    start("--model.objective.beta=77", "--run_dir=x")
    cli = run.main(["--resume=x/checkpoints/last.ckpt", "--trainer.max_steps=3"])
    assert (cli.run_dir, cli.model.objective.beta) == (Path("x"), 77.0)
    # Into another folder: the same experiment.
    cli = run.main(["--resume=x/checkpoints/last.ckpt", "--run_dir=y", "--trainer.max_steps=4"])
    assert (cli.trainer.global_step, cli.model.objective.beta) == (4, 77.0)
    with pytest.raises(ConfigError, match=r"y has other settings \(config-0002.yaml\): model.objective.beta"):
        start("--resume=x/checkpoints/last.ckpt", "--run_dir=y", "--model.objective.beta=5")


# Evaluating


def test_an_evaluation_judges_the_model_that_was_trained(folder):
    start("--model.width=2", "--model.objective=Strict")
    for named in ([], ["--config", "toy.yaml"]):
        cli = run.main(["test", *named, "--run_dir=runs/toy", "--trainer.limit_test_batches=1"])
        assert cli.model.objective == Strict()
        with pytest.raises(ConfigError, match=r"model.objective.beta: 5000.0 -> 3.0\. Leave them out"):
            run.main(["test", *named, "--run_dir=runs/toy", "--model.objective.beta=3"])
    assert len(saved_files(Path("runs/toy"))) == 1
    assert start("test", "--ckpt_path=none").model.objective == Lenient(beta=11.0)
    assert run.main(["test", "--run_dir=runs/toy", "--ckpt_path=none"]).model.objective == Strict()


# Copies


def test_the_config_of_a_copied_run_leads_to_the_copy(folder):
    start("--run_dir", str(folder / "x"))
    (folder / "x").rename(folder / "copy")
    cli = run.main(["--config", "copy/config.yaml", "--resume=last", "--trainer.max_steps=3"])
    assert cli.run_dir == Path("copy")
    assert not (folder / "x").exists()
    with pytest.raises(ConfigError, match="already holds a run"):
        run.main(["--config", "copy/config.yaml"])


# Learning rates


def test_an_allowed_rate_takes_effect(folder):
    (folder / "scheduled.yaml").write_text(SCHEDULED)
    run.main(["--config", "scheduled.yaml", "--trainer.max_steps=2", "--model.lr_scheduler.total_steps=4"])
    words = ["--run_dir=runs/scheduled", "--resume=last", "--trainer.max_steps=4"]
    changed = ["--model.optimizer.lr=0.5", "--model.optimizer.weight_decay=0.125", "--allow_changes"]
    cli = run.main([*words, *changed])
    # 0.5 (1 + cos(pi s / 4)) at s = 2, 3
    expected = [(0.5 * 0.5, 0.125), (0.5 * 0.5 * (1 - 0.5**0.5), 0.125)]
    for seen, wanted in zip(cli.model.rates, expected, strict=True):
        assert seen == pytest.approx(wanted)
    cli = run.main([*words, "--trainer.max_steps=5", "--model.lr_scheduler=ConstantWithWarmup", "--allow_changes"])
    assert cli.model.rates == [(0.5, 0.125)]


@pytest.mark.parametrize("allowed", [[], ["--allow_changes"]])
def test_another_optimizer_cannot_take_over_the_moments(folder, allowed):
    (folder / "scheduled.yaml").write_text(SCHEDULED)
    run.main(["--config", "scheduled.yaml"])
    with pytest.raises(ConfigError, match=r"model.optimizer: AdamW -> SGD"):
        run.main(["--run_dir=runs/scheduled", "--resume=last", "--model.optimizer=SGD", *allowed])


# What was written before


@pytest.mark.parametrize("kind", ["dpo", "spo"])
@pytest.mark.filterwarnings("ignore:.*is now.*:UserWarning", "ignore:DPO.s loss_type:UserWarning")
def test_settings_that_an_older_release_has_saved_are_a_runs(folder, kind):
    """It wrote no more than the resolved settings, with the folder in which the run lived."""
    home = folder / "old"
    (home / "checkpoints").mkdir(parents=True)
    (home / "checkpoints" / "last.ckpt").touch()
    (home / "config.yaml").write_text((DATA / f"config-{kind}-0.1.0.yaml").read_text())
    begun = Start.of(CommandLine.split(["--run_dir=old", "--resume=last"]))
    assert begun.run_dir == Path("old")
    assert begun.tree["model"] == load(home / "config.yaml")["model"]
    assert SavedSettings.latest(home).by_hand == ()
    with pytest.raises(ConfigError, match="old/checkpoints/last.ckpt is empty"):
        run.main(["--run_dir=old", "--resume=last"])  # the settings are accepted, and then the checkpoint is looked at


def test_changes_name_a_class_once():
    old = {"a": "x.SPO", "a.beta": 1, "a.eta": 2, "b": 1, "bc": 1}
    new = {"a": "x.DPO", "a.beta": 2, "b": 2, "bc": 1}
    assert [str(change) for change in changes(old, new)] == ["a: SPO -> DPO", "b: 1 -> 2"]


def test_every_setting_that_may_change_exists():
    """Of the trainer and of the packaged data modules."""
    import inspect

    from lightning.pytorch import Trainer

    from datamodules.preference_pairs import PreferencePairsDataModule
    from datamodules.step_pool import StepPoolDataModule
    from experiments.cli.saved_settings import MAY_CHANGE

    known = {f"trainer.{name}" for name in inspect.signature(Trainer).parameters}
    for module in (PreferencePairsDataModule, StepPoolDataModule):
        known |= {f"data.{name}" for name in inspect.signature(module).parameters}
    assert {key for key in MAY_CHANGE if "." in key} <= known
