"""From people's preferences to the judge that learns from them alone, and how judges are measured."""

import json

import pytest
import torch

from experiments import build_people
from experiments.shapes import collect_preferences, measure_judges
from lightning_modules.errors import ConfigError
from lightning_modules.policies import Frozen, StableDiffusion
from lightning_modules.rewards.latent import LatentRewardModel
from lightning_modules.rewards.step_aware import StepAwarePreferenceModel
from lightning_modules.sampling.step_scorers import RandomScorer, RewardScorer
from lightning_modules.shapes.reward import ShapesReward

PROMPTS = ["one large red circle on a white background", "two small blue squares on a gray background"]


def names(capsys):
    lines = capsys.readouterr().out.splitlines()
    return [line.split()[3].removeprefix("experiments.") for line in lines if line.startswith("$ python -m")]


@pytest.fixture
def few_ways(monkeypatch):
    monkeypatch.setattr(collect_preferences, "WAYS", ((2, 2.0),))


@pytest.mark.filterwarnings("ignore:.*dataloader is not resumable:UserWarning")
def test_the_road_from_labels_to_the_judges_is_one_command_that_makes_nothing_twice(
    tmp_path, monkeypatch, few_ways, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(build_people, "EARLY", 1)
    monkeypatch.setattr(build_people, "TRAIN", {"people": (0, 12), "people-2": (2, 12)})
    monkeypatch.setattr(build_people, "VALIDATION", {"people-val": (1, 12)})
    monkeypatch.setattr(build_people, "MATCHING", 1)
    short = ("--trainer.max_steps=2", "--trainer.val_check_interval=1", "--data.batch_size=4")
    judges = {folder: (*settings, *short) for folder, settings in build_people.JUDGES.items()}
    monkeypatch.setattr(build_people, "JUDGES", judges)
    build_people.main(["--seeds", "7"])
    assert names(capsys) == [
        *("shapes.build_pipeline", "run", "shapes.build_pipeline"),
        *["shapes.collect_preferences", "prepare_pickapic"] * 3,
        *["relabel"] * 2,
        *("shapes.build_preference", "run", "run"),
    ]
    aware, latent = (str(tmp_path / "runs" / name / "export" / "preference") for name in ("people_spm", "people_lrm"))
    assert StepAwarePreferenceModel(aware, processor=None)
    assert LatentRewardModel(latent, tokenizer="embedded/shapes")
    pairs, coin = (
        json.loads((tmp_path / "data" / "shapes" / name / "manifest.json").read_text())
        for name in ("people-pairs", "people-pairs-coin7")
    )
    assert pairs["counts"]["pairs"] == coin["counts"]["pairs"] > 0
    early, start = (
        (tmp_path / "runs" / name / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
        for name in ("early", "early_start")
    )
    assert early != start
    shards = {path: path.read_bytes() for path in (tmp_path / "data").rglob("*.tar")}
    build_people.main(["--seeds", "7"])
    told = capsys.readouterr().out
    assert told.count("is there already and is taken as it is") == 4
    assert "shapes.build_" not in told
    assert {path: path.read_bytes() for path in (tmp_path / "data").rglob("*.tar")} == shards
    monkeypatch.setattr(build_people, "VALIDATION", {"people-val": (9, 12)})
    with pytest.raises(ConfigError, match=r"people-val was begun with other settings \(seed;"):
        build_people.main(["--seeds", "7"])


def collected(folder, *words):
    collect_preferences.main(["--output", str(folder), "--pairs", "8", *words])
    return measure_judges.Choices.read(folder)


def test_choices_are_read_with_the_preferred_picture_first(tmp_path, few_ways):
    choices = collected(tmp_path / "people", "--sharpness=1e9", "--tie=0")  # people who never err
    rewards = ShapesReward().score(choices.pictures / 255, choices.prompts * 2)
    assert choices.agreement(rewards) == 1
    assert choices.agreement(-rewards) == 0
    assert choices.agreement(torch.tensor([1.0, 0.0] * 8)) == 0  # equal scores are no preference
    (tmp_path / "nothing").mkdir()
    with pytest.raises(ConfigError, match="holds no choices"):
        measure_judges.Choices.read(tmp_path / "nothing")


@pytest.fixture(scope="module")
def policy():
    return StableDiffusion("embedded/shapes", Frozen()).eval()


@torch.no_grad()
def test_pictures_of_a_choice_are_noised_alike_and_finished_from_there(tmp_path, few_ways, policy):
    choices = collected(tmp_path / "people")
    little, much = (measure_judges.noised(choices, policy, t) for t in (1, 951))
    n = len(choices.prompts)
    signal, noise = policy.schedule.signal_and_noise(torch.tensor([1, 951]))
    clean = torch.cat([policy.encode_images(choices.pictures / 127.5 - 1)])
    for candidates, a, s in zip((little, much), signal, noise):
        drawn = (candidates.latents - a * clean) / s
        assert torch.allclose(drawn[:n], drawn[n:], atol=2e-2 / s)  # but for the posterior's deviation
    ended = measure_judges.finished(little, policy)
    assert (ended - little.images).abs().mean() < 0.02  # a single step from t = 1
    assert (measure_judges.finished(much, policy) - much.images).abs().mean() > 0.05


def test_the_exact_reward_leads_further_than_chance(policy):
    prompts = PROMPTS * 2
    exact, chance = (
        measure_judges.reached(policy, judge, prompts, pictures=2).mean
        for judge in (RewardScorer(ShapesReward()), RandomScorer())
    )
    assert exact > chance + 0.1


def test_both_tables_are_told(tmp_path, monkeypatch, few_ways, capsys):
    collected(tmp_path / "people")
    monkeypatch.setattr(measure_judges, "TIMESTEPS", (1, 951))
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    monkeypatch.setenv("COLUMNS", "200")
    capsys.readouterr()
    measure_judges.main(
        ["--preferences", str(tmp_path / "people"), "--step_aware", "embedded/step_aware", "--pictures=1",
         "--latent", "embedded/latent_reward", "--prompts", str(tmp_path / "prompts.txt")]
    )  # fmt: skip
    told = capsys.readouterr().out
    assert "choices of people" in told
    for judge in ("embedded/step_aware", "embedded/latent_reward", "exact reward of the x0-prediction"):
        assert told.count(judge) == 2
    assert told.count("%") == 1 + 4 * 2  # the exact reward as it is; four judges at two timesteps
