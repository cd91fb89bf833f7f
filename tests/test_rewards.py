"""What the base of all rewards does for each, and functions as rewards."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

from callbacks.win_rate import WinRate
from experiments.cli.experiment_cli import OneLineParser
from lightning_modules.errors import ConfigError
from lightning_modules.preference import RewardLabels
from lightning_modules.rewards import FunctionReward, RandomReward, Reward, RewardModel, as_reward_model
from lightning_modules.rewards import base as rewards_base
from lightning_modules.sampling.step_scorers import RewardScorer, StepScorer

IMAGES = torch.rand(3, 3, 4, 4, generator=torch.Generator().manual_seed(0))
PROMPTS = ["one", "two", "one"]


class Projection(RewardModel):
    """A network on the picture's means, less the length of the text; notes what it encodes and how it is run."""

    name = "projection"

    def __init__(self):
        super().__init__()
        self.network = nn.Sequential(nn.Linear(3, 1), nn.Dropout(0.5))
        self.encoded = []

    def _encode(self, prompt):
        self.encoded.append(prompt)
        return torch.tensor([float(len(prompt))])

    def score(self, images, prompts):
        assert not torch.is_grad_enabled()
        features = self.network(images.mean(dim=(2, 3)))
        assert features.dtype == torch.float32
        return (features - self.remembered(prompts, self._encode)).squeeze(1)

    def parts(self, images, prompts):
        return {"text": self.remembered(prompts, self._encode)[:, 0].double()}


class Gives(RewardModel):
    name = "gives"

    def __init__(self, value):
        super().__init__()
        self.value = value

    def score(self, images, prompts):
        return self.value


def brightness(images, prompts):
    return images.mean(dim=(1, 2, 3))


def a_word(images, prompts):
    return "bright"


@pytest.fixture
def reward():
    torch.manual_seed(0)
    return Projection()


def test_a_network_that_a_reward_is_given_is_frozen_and_stays_in_eval_mode(reward):
    assert not any(module.training for module in reward.network.modules())
    whole = nn.Sequential(nn.Dropout(), reward).train()
    assert whole.training
    assert not any(module.training for module in reward.modules())
    assert not any(parameter.requires_grad for parameter in reward.parameters())


def test_a_score_is_fp32_without_gradient_and_without_autocast(reward):
    expected = reward.score(IMAGES, PROMPTS)
    reward.requires_grad_(True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = reward.score(IMAGES, PROMPTS)
    assert torch.equal(scores, expected)
    assert not scores.requires_grad
    assert reward.parts(IMAGES, PROMPTS)["text"].dtype == torch.float32


@pytest.mark.parametrize("method", ["score", "parts"])
def test_unequal_numbers_of_pictures_and_prompts_are_refused(reward, method):
    with pytest.raises(ValueError, match="Projection: 3 pictures and 2 prompts"):
        getattr(reward, method)(IMAGES, PROMPTS[:2])


@pytest.mark.parametrize(
    ("value", "got"),
    [(torch.ones(3, 1), r"shape \(3, 1\)"), (torch.ones(2), r"shape \(2,\)"), (torch.tensor(1.0), r"shape \(\)"),
     (None, "a NoneType"), ([1.0, 2.0, 3.0], "a list")],
)  # fmt: skip
def test_anything_but_one_number_per_picture_is_one_clear_line(value, got):
    with pytest.raises(ConfigError, match=rf"reward gives must give .* \(3,\), got {got}$") as error:
        rewards_base._per_picture(Gives(value), value, IMAGES)
    assert "\n" not in str(error.value)


# Texts


def test_each_text_is_encoded_once_and_rows_are_in_the_prompts_order(reward):
    assert reward.parts(IMAGES, ["one", "three", "one"])["text"].tolist() == [3.0, 5.0, 3.0]
    reward.score(IMAGES, ["three", "one", "four"])
    assert reward.encoded == ["one", "three", "four"]


@pytest.mark.parametrize(
    "change",
    [
        lambda reward: reward.double().float(),
        lambda reward: reward.load_state_dict(reward.state_dict()),
        lambda reward: reward.network.load_state_dict(reward.network.state_dict()),
        lambda reward: torch.optim.SGD(_with_gradients(reward), lr=1.0).step(),
    ],
    ids=["number type", "load", "load its network", "a step"],
)
def test_texts_are_encoded_again_once_weights_change(reward, change):
    reward.score(IMAGES, PROMPTS)
    change(reward)
    reward.score(IMAGES, PROMPTS)
    assert reward.encoded == ["one", "two", "one", "two"]


def _with_gradients(reward):
    for parameter in reward.parameters():
        parameter.grad = torch.ones_like(parameter)
    return list(reward.parameters())


def test_no_more_texts_are_kept_than_have_room(reward, monkeypatch):
    monkeypatch.setattr(rewards_base, "REMEMBERED", 2)
    reward.score(IMAGES, ["a", "b", "c"])
    reward.score(IMAGES, ["c", "b", "a"])
    assert reward.encoded == ["a", "b", "c", "a"]


# The control


def test_random_scores_belong_to_a_picture_and_a_seed_and_know_nothing_of_it():
    many = torch.randint(256, (400, 3, 2, 2), generator=torch.Generator().manual_seed(1)) / 255
    prompts = ["one"] * 400
    scores = RandomReward(seed=3).score(many, prompts)
    again = RandomReward(seed=3).score(many.flip(0) + 1e-4, ["another"] * 400).flip(0)  # the same as eight bits
    assert torch.equal(scores, again)
    other = RandomReward(seed=4).score(many, prompts)
    brightness_of = many.mean(dim=(1, 2, 3))
    for one, another in ((scores, other), (scores, brightness_of)):
        assert abs(torch.corrcoef(torch.stack([one, another]))[0, 1]) < 0.15  # 3 standard errors of 400
    assert 0 <= scores.min() < 0.05
    assert 0.95 < scores.max() < 1
    assert RandomReward(seed=3).described()["seed"] == 3  # so that relabelled folders of other seeds are others


# Functions


def test_a_function_is_a_reward_of_its_name():
    reward = as_reward_model(brightness)
    assert isinstance(reward, FunctionReward)
    assert reward.name == "brightness"
    assert torch.equal(reward.score(IMAGES, PROMPTS), IMAGES.mean(dim=(1, 2, 3)))
    assert as_reward_model(reward) is reward


def test_a_function_that_gives_no_scores_is_one_clear_line():
    with pytest.raises(ConfigError, match="reward a_word must give a tensor of one number per picture, .* got a str"):
        as_reward_model(a_word).score(IMAGES, PROMPTS)


@pytest.mark.parametrize("wrong", [nn.Identity(), Gives])
def test_what_is_no_reward_is_refused_wherever_one_is_wanted(wrong):
    for take in (as_reward_model, RewardScorer, RewardLabels, lambda given: WinRate(["a"], [given])):
        with pytest.raises(ConfigError, match="a reward is a RewardModel or a function"):
            take(wrong)


@pytest.fixture
def parse(tmp_path, monkeypatch):
    """Settings as the command line reads them; ``own_rewards`` is a module beside it."""
    (tmp_path / "own_rewards.py").write_text("def red(images, prompts):\n    return images[:, 0].mean((1, 2))\nx = 3\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield lambda kind, *words: _parsed(kind, words)
    sys.modules.pop("own_rewards", None)


def _parsed(kind, words):
    parser = OneLineParser(exit_on_error=True)
    parser.add_argument("--it", type=kind)
    settings = parser.parse_args(words)
    again = parser.parse_string(parser.dump(settings))  # as config.yaml is
    return parser.instantiate(again).it


def test_a_functions_dotted_name_stands_for_it_in_settings(parse):
    scorer = parse(StepScorer, "--it=RewardScorer", "--it.reward=own_rewards.red", "--it.scale=2.0")
    assert (scorer.reward.name, scorer.reward.path) == ("red", "own_rewards.red")
    assert torch.equal(scorer.reward.score(IMAGES, PROMPTS), IMAGES[:, 0].mean((1, 2)))
    assert as_reward_model(parse(Reward, "--it=own_rewards.red")).name == "red"
    judges = parse(
        list[Reward], "--it=[own_rewards.red, {class_path: FunctionReward, init_args: {function: own_rewards.red}}]"
    )
    assert [as_reward_model(judge).name for judge in judges] == ["red", "red"]


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (
            "own_rewards.green",
            "it: 'own_rewards.green' is neither a class nor a function .*has no attribute 'green'",
        ),
        ("nowhere.red", "it needs the package nowhere, which is not installed"),
        ("own_rewards.x", "it: 'own_rewards.x' is neither"),
        ("PickScroe", r"it: no class named 'PickScroe' fits here \(did you mean 'PickScore'\?\)"),
        ("{class_path: PickScore, init_args: {scale: big}}", "it.scale wants one of 'logit', 'cosine', got 'big'"),
    ],
)
def test_a_name_that_stands_for_no_reward_is_one_clear_line(parse, given, told):
    with pytest.raises(ConfigError, match=told) as error:
        parse(Reward, f"--it={given}")
    assert "\n" not in str(error.value)
