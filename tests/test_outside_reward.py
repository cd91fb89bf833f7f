"""A reward from outside of the packages, as a class and as a function: it judges, labels, and scores a pool's steps."""

import json

import pytest
import torch
from outside import outside  # noqa: F401  # a fixture

from experiments import prepare_feedback
from lightning_modules.errors import ConfigError

pytestmark = pytest.mark.filterwarnings("ignore:.*dataloader is not resumable:UserWarning")

OWN = '''
import torch
from torch import nn

from lightning_modules.rewards import RewardModel


class Learned(RewardModel):
    """A network on colours, less a number that is the text's."""

    name = "learned"

    def __init__(self, gain: float = 1.0):
        super().__init__()
        self.gain, self.encoded = gain, []
        self.network = nn.Linear(3, 1)
        self.network.load_state_dict({"weight": torch.ones(1, 3), "bias": torch.zeros(1)})

    def encode(self, prompt):
        self.encoded.append(prompt)
        return torch.tensor([len(prompt) / 100])

    def score(self, images, prompts):
        texts = self.remembered(prompts, self.encode)
        return self.gain * (self.network(images.mean(dim=(2, 3))) - texts)[:, 0]

    def parts(self, images, prompts):
        return {"red": images[:, 0].mean(dim=(1, 2))}


def redness(images, prompts):
    return images[:, 0].mean(dim=(1, 2)) - images[:, 1].mean(dim=(1, 2))


def sideways(images, prompts):
    return images.mean(dim=0)


WORD = "red"
'''

JUDGED = (
    "--trainer.callbacks=[{class_path: WinRate, init_args: {prompts: [one small red circle on a black background, "
    "one large blue square on a white background], sampler: {class_path: Sampler, init_args: {steps: 2}}, "
    "rewards: [%s]}}]"
)


def test_it_judges_pictures(outside, tmp_path):  # noqa: F811
    judges = "{class_path: own.Learned, init_args: {gain: 2.0}}, own.redness"
    outside(OWN, JUDGED % judges)
    (entry,) = json.loads((tmp_path / "run" / "win_rate.json").read_text())
    assert set(entry["policy"]) == {"learned", "learned/red", "redness"}
    assert entry["comparisons"]["redness"]["n"] == 2
    assert entry["protocol"]["rewards"] == ["learned", "redness"]
    assert "own.redness" in (tmp_path / "run" / "config.yaml").read_text()


@pytest.mark.parametrize("reward", ["own.Learned", "own.redness"])
def test_it_orders_pairs_and_scores_the_steps_of_a_pool(outside, tmp_path, reward):  # noqa: F811
    (tmp_path / "own.py").write_text(OWN)
    prepare_feedback.main(
        ["--config=dpo_tiny", f"--reward={reward}", "--prompts=embedded/prompts/shapes_test.txt", "--pairs=2",
         "--sampler.steps=2", "--output=feedback"]
    )  # fmt: skip
    assert list((tmp_path / "feedback").glob("*.parquet"))
    pool = ["--data.scorer=RewardScorer", f"--data.scorer.reward={reward}", "--data.sampler.steps=4",
            "--data.sampler.branch_from_step=1", "--data.sampler.threshold=0.0", "--data.prompts_per_pool=4",
            "--data.prompts_per_batch=4", "--data.batch_size=4"]  # fmt: skip
    trained = outside(OWN, "--trainer.max_steps=1", "--trainer.accumulate_grad_batches=1", config="spo_tiny", data=pool)
    assert trained.trainer.global_step == 1
    assert trained.datamodule.scorer.reward.name == reward.removeprefix("own.").lower()


@pytest.mark.parametrize(
    ("reward", "told"),
    [
        (
            "own.sideways",
            r"reward sideways must give a tensor .* \(2,\), got shape \(3, 32, 32\)",
        ),
        ("own.WORD", "'own.WORD' is neither a class nor a function that fits here"),
        ("own.bright", "'own.bright' is neither a class nor a function .* no attribute 'bright'"),
    ],
)
def test_what_is_no_reward_is_one_line(outside, reward, told):  # noqa: F811
    with pytest.raises(ConfigError, match=told) as error:
        outside(OWN, JUDGED % reward)
    assert "\n" not in str(error.value)


def test_its_network_is_in_no_checkpoint(outside, tmp_path):  # noqa: F811
    outside(OWN, JUDGED % "own.Learned")
    saved = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert all(name.startswith("policy.unet.") for name in saved)
