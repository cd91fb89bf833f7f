"""What can be known beforehand is said before anything is loaded; what a library says of a setting is one line."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from pairs_data import write_shards
from toy_world import start, toy_folder

from experiments import run
from experiments.cli import experiment_cli, preflight
from experiments.cli.compose import find_config, load
from experiments.cli.preflight import check, problems
from experiments.cli.setting_errors import one_line
from lightning_modules.errors import ConfigError, DataError

folder = pytest.fixture(toy_folder)


@pytest.fixture
def nothing_is_built(monkeypatch):
    def build(self):
        raise AssertionError("something is built")

    monkeypatch.setattr(experiment_cli.ExperimentCLI, "instantiate_classes", build)


def refused(*words):
    with pytest.raises(ConfigError) as error:
        run.main(list(words))
    return str(error.value)


# One list


def test_everything_that_is_missing_is_one_list(folder, nothing_is_built):
    """``dpo_sd15`` as a stranger starts it, without data, prompts or the network."""
    lines = refused("--config", "dpo_sd15", "--trainer.logger=WandbLogger").split("\n  - ")
    assert lines[0] == "7 things must be put right first:"
    for line, key in zip(
        lines[1:],
        ("trainer.logger WandbLogger needs the package wandb", "trainer.callbacks.WinRate.prompts: ",
         "trainer.callbacks.WinRate.test_prompts: ", "trainer.callbacks.WinRate.rewards.PickScore.pretrained: ",
         "trainer.callbacks.WinRate.rewards.PickScore.processor: ", "model.policy.pretrained: ", "data.shards: "),
    ):  # fmt: skip
        assert line.startswith(key)
    assert not (folder / "runs").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--trainer.callbacks.WinRate.prompts=gone.txt"],
            "WinRate.prompts: cannot read prompt file gone.txt",
        ),
        (["--model.policy.pretrained=gone/"], "model.policy.pretrained: Pretrained weights: no folder 'gone/'"),
        (["--model.policy.pretrained=some/where"], "model.policy.pretrained: some/where is no folder here and not in"),
        (["--data.shards=gone"], "data.shards: gone does not exist; prepare the pairs first"),
        (["--data.shards=['pairs', 'gone-{0..1}.tar']"], "data.shards: gone-0.tar does not exist"),
        (["--data.val_shards=unfinished"], "data.val_shards: unfinished has no manifest.json"),
        (["--data.shards=https://host/pairs"], "data.shards: https://host/pairs is remote; give data.cache_dir"),
        (["--model.reference=null"], "model.objective DPO compares with a reference, and model.reference is null"),
        (["--model.reference=AdapterOff"], "AdapterOff switches adapters off, and FullFineTuning has none"),
        (
            ["--model.policy.quantisation=Fp8Casting"],
            "and model.policy.adaptation FullFineTuning trains them; use LoRA",
        ),
        (["--model.policy.quantisation=Fp8Casting"], "which model.reference FrozenCopy takes again for a copy"),
        (
            ["--model.policy.quantisation=Fp8Casting", "--trainer.strategy=fsdp2"],
            "Fp8Casting rounds the base's weights, and trainer.strategy fsdp2 cannot share them out; use ddp",
        ),
        (
            ["--model.lr_scheduler.total_steps=50"],
            "model.lr_scheduler reaches 0 at step 50, and trainer.max_steps",
        ),
    ],
)
def test_each_is_said_before_anything_is_built(folder, nothing_is_built, words, message):
    write_shards(folder / "pairs", [4], (32, 32))
    (folder / "unfinished").mkdir()
    said = refused("--config", "dpo_tiny", "--data.shards=pairs", *words)
    assert message in said


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data.prompts=gone.txt"], "data.prompts: cannot read prompt file gone.txt"),
        (
            ["--data.scorer.model.pretrained=gone/"],
            "data.scorer.model.pretrained: Pretrained weights: no folder",
        ),
        (["--data.reuse=[gone]"], "data.reuse: pool gone does not exist"),
        (["--data.sampler.eta=0.5"], "data.sampler has eta 0.5, model.objective has 1.0"),
        (["--trainer.reload_dataloaders_every_n_epochs=0"], "an epoch is a pool: set trainer.reload_dataloaders"),
        (["--model.objective=DPO"], "data StepPoolDataModule is for pairs of denoising steps, and model.objective DPO"),
    ],
)
def test_what_pools_are_made_of_is_looked_at(folder, nothing_is_built, words, message):
    assert message in refused("--config", "spo_tiny", *words)


def test_an_objective_of_steps_gets_no_pairs_of_pictures(folder, nothing_is_built):
    said = refused("--config", "dpo_tiny", "--model.objective=SPO")
    assert said.startswith("data PreferencePairsDataModule is for pairs of pictures, and model.objective SPO trains on")


def test_predict_wants_prompts_and_no_data(folder):
    """The data that a run was trained on may be gone when it is used."""
    settings = load(find_config("dpo_tiny"))
    assert [line.split(":")[0] for line in problems(settings, "fit")] == ["data.shards"]
    assert list(problems(settings, "predict")) == [
        "predict draws pictures and has no prompts; give --pictures.prompts=FILE"
    ]
    settings["pictures"]["prompts"] = "gone.txt"
    assert list(problems(settings, "predict")) == [
        "pictures.prompts: cannot read prompt file gone.txt: No such file or directory"
    ]
    assert list(problems(settings, "test")) == []


def test_a_hub_that_does_not_know_or_answer(monkeypatch):
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    for error, told in (
        (RepositoryNotFoundError, "no repository on the hub that can be read"),
        (GatedRepoError, "is a gated repository"),
        (ConnectionError, "the hub does not answer (ConnectionError)"),
        (None, None),
    ):

        def info(self, repository, timeout, error=error):
            if error is not None:
                raise error.__new__(error)

        monkeypatch.setattr(preflight, "HF_HUB_OFFLINE", False)
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        monkeypatch.setattr(preflight.HfApi, "model_info", info)
        said = preflight._not_on_the_hub("some/where")
        assert (said is None) if told is None else (told in said)


def test_what_is_in_the_cache_is_not_asked_for(monkeypatch, tmp_path):
    (tmp_path / "models--some--where").mkdir()
    monkeypatch.setattr(preflight, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(preflight.HfApi, "model_info", None)
    assert preflight._not_on_the_hub("some/where") is None


def test_one_problem_is_one_line():
    with pytest.raises(ConfigError, match="^predict draws"):
        check({}, "predict")


# What libraries say


@pytest.mark.parametrize(
    "words",
    [
        ["--trainer.accumulate_grad_batches=0"],
        ["--trainer.devices=-1"],
        ["--trainer.accelerator=tpu"],
        ["--trainer.precision=transformer-engine"],
        ["--seed_everything=-1"],
        ["--model.optimizer.lr=-1"],
        ["--model.optimizer.betas=[2, 2]"],
        ["--trainer.gradient_clip_algorithm=other"],
        ["--trainer.limit_train_batches=-1"],
        ["--trainer.max_epochs=-3"],
        ["--trainer.profiler=nosuch"],
        ["--trainer.max_time=soon"],
    ],
)
def test_a_setting_that_a_library_refuses_is_one_line(folder, words):
    said = refused("--config", "toy.yaml", *words)
    assert "\n" not in said
    assert not list(folder.glob("runs/*/checkpoints/*"))


def test_a_job_script_that_lightning_refuses_is_one_line(folder, monkeypatch):
    for name, value in {"JOB_ID": "77", "JOB_NODELIST": "localhost", "NODELIST": "localhost", "PROCID": "0",
                        "LOCALID": "0", "NODEID": "0", "JOB_NAME": "train", "NTASKS": "2"}.items():  # fmt: skip
        monkeypatch.setenv(f"SLURM_{name}", value)
    assert "`--ntasks=2`" in refused("--config", "toy.yaml")


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is not None, reason="the package is there")
def test_an_optimizer_of_a_missing_package_is_one_line(folder):
    said = refused("--config", "toy.yaml", "--model.optimizer=bitsandbytes.optim.AdamW8bit")
    assert "bitsandbytes" in said
    assert "pip install" in said
    assert "\n" not in said


def test_what_is_no_setting_s_fault_keeps_its_traceback():
    for kind in (ValueError, TypeError, AttributeError):
        with pytest.raises(kind, match="ours"), one_line("fit"):
            raise kind("ours")
    with pytest.raises(DataError, match="^theirs$"), one_line("fit"):
        raise DataError("theirs")
    with pytest.raises(ConfigError, match="^fit: Invalid learning rate: -1"), one_line("fit"):
        torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=-1)


def test_a_run_is_not_refused_for_what_it_does_not_need(folder):
    assert start("--trainer.logger=CSVLogger", "--trainer.logger.save_dir=logs").trainer.global_step == 2
