"""SPO's resampler on flows: the official window of noise, certain last steps, pools whose timesteps are no integers."""

import json

import pytest
import torch
from outside import outside  # noqa: F401  # a fixture

from datamodules.pools.folder import open_pool
from datamodules.pools.samples import step_pair
from datamodules.stream.order import StoredOrder
from lightning_modules.batches import DenoiserQuery
from lightning_modules.errors import ConfigError
from lightning_modules.policies import LoRA, StableDiffusion3
from lightning_modules.rewards import StepAwarePreferenceModel
from lightning_modules.sampling.step_sampler import Draws, SeededDraws, StepSampler
from lightning_modules.sampling.step_scorers import RandomScorer, StepAwareScorer, StepScorer
from lightning_modules.schedules.base import gaussian_log_prob
from lightning_modules.schedules.step_rules import CPS, FlowSDE

pytestmark = pytest.mark.filterwarnings("ignore:.*dataloader is not resumable:UserWarning")

PROMPTS = ("a photo of a red cat on a wooden table", "two large green triangles on a white background")


class KnownNoise(Draws):
    """The official run's noise for the first candidate, and its negative for every other one."""

    def __init__(self, known):
        self.normal = [known["initial"], *known["noise"]]

    def randn(self, copies, shape):
        noise = self.normal.pop(0)
        return torch.stack([noise] + [-noise] * (copies - 1))

    def randint(self, high):
        raise AssertionError("the best candidate goes on")

    def control_noise(self, copies):
        return torch.zeros(copies, len(PROMPTS))


class TheFirstIsBest(StepScorer):
    """And asks for no prediction."""

    def score(self, candidates):
        return -torch.arange(candidates.control_noise.shape[0]).repeat_interleave(len(PROMPTS)).float()


def sd3(pipelines, **options):
    return StableDiffusion3(str(pipelines / "tiny-sd3"), LoRA(), t5_tokens=32, **options).eval()


@pytest.fixture(scope="module")
def policy(pipelines):
    return sd3(pipelines)


def rollout(policy, scorer=None, calls=None, **settings):
    known = {"steps": 5, "branch_from_step": 1, "candidates": 2, "threshold": 0.0, "guidance_scale": 1.0}
    after = [] if calls is None else calls
    draws = SeededDraws(0, 0, range(len(PROMPTS)))
    return StepSampler(**(known | settings)).sample(
        policy, scorer or RandomScorer(), PROMPTS, draws, after_step=after.append
    )


@torch.no_grad()
def test_noise_in_a_window_alone_goes_where_flow_grpos_went(golden, pipelines):
    """Euler's steps, three steps with noise, Euler's steps: latents, log-probabilities and pictures."""
    known, policy = golden("sd3_cps_window_rollout"), sd3(pipelines, step_rule=CPS(0.8))
    first = int(known["window_start"])
    sampler = StepSampler(steps=10, guidance_scale=4.5, candidates=2, branch_from_step=first, threshold=0.0,
                          branch_until_step=first + 3, plain_eta=0.0, continuation="best")  # fmt: skip
    pairs = sampler.sample(policy, TheFirstIsBest(), PROMPTS, KnownNoise(known)).pairs
    torch.testing.assert_close(pairs.timesteps[::2], known["timesteps"], rtol=0, atol=1e-3)
    torch.testing.assert_close(pairs.latents, known["latents"][:3].flatten(0, 1), rtol=0, atol=1e-4)
    torch.testing.assert_close(pairs.chosen, known["latents"][1:].flatten(0, 1), rtol=0, atol=1e-4)
    cond, latents = policy.encode_prompts(PROMPTS), pairs.chosen[-2:]
    mean, std = policy.schedule.step_distribution(
        policy.predict_noise(DenoiserQuery(pairs.latents[:2], pairs.timesteps[:2], cond, 4.5)),
        pairs.latents[:2], pairs.timesteps[:2], pairs.next_timesteps[:2], 1.0,
    )  # fmt: skip
    density = gaussian_log_prob(pairs.chosen[:2], mean, std)
    distance = -2 * std**2 * (density + std.log() + 0.5 * torch.tensor(2 * torch.pi).log())
    torch.testing.assert_close(-distance, known["logp"][0], rtol=0, atol=5e-6)  # the official CPS has no variance
    for step in policy.schedule.trajectory(10)[first + 3 :]:
        start = torch.full((2,), step.timestep)
        output = policy.predict_noise(DenoiserQuery(latents, start, cond, 4.5))
        latents = policy.schedule.step(output, latents, start, torch.full_like(start, step.next_timestep), 0.0)
    torch.testing.assert_close(policy.decode(latents), known["images"], rtol=0, atol=1e-4)


def test_the_certain_last_step_compares_nothing_and_costs_nothing(policy):
    calls = []
    result = rollout(policy, calls=calls)
    trajectory = policy.schedule.trajectory(5)
    compared = [step.timestep for step in trajectory[1:4]]
    assert result.comparisons.timesteps.tolist() == [t for t in compared for _ in PROMPTS]
    assert result.comparisons.judged_at.tolist() == [step.next_timestep for step in trajectory[1:4] for _ in PROMPTS]
    assert result.unet_evaluations == 2 * 4  # a plain step and three compared ones, of which nobody asks what follows
    assert calls == [1, 2, 3, 4, 5]
    assert f"score_gap/t{round(compared[0])}" in result.comparisons.metrics()


def test_a_step_aware_model_is_told_the_level_at_which_each_step_ends(policy, pipelines):
    model, told = StepAwarePreferenceModel(str(pipelines / "tiny-spm"), None), []
    model.model.t_embedder.register_forward_pre_hook(lambda _, inputs: told.append(inputs[0]))
    rollout(policy, StepAwareScorer(model))
    compared = policy.schedule.trajectory(5)[1:-1]  # the first is a plain step, the last is certain
    ends = [step.next_timestep for step in compared]
    assert [times.unique().tolist() for times in told] == [[end] for end in ends]


def test_a_rule_with_noise_in_the_last_step_compares_it(pipelines):
    result = rollout(sd3(pipelines, step_rule=FlowSDE()))
    assert len(result.comparisons) == 2 * 4
    assert result.comparisons.judged_at[-1] == 0


def test_inner_steps_end_where_noise_ends(policy):
    result = rollout(policy, num_inner_step=1)
    starts = [step.timestep for step in policy.schedule.trajectory(5)]
    assert result.comparisons.timesteps.unique().tolist() == sorted((starts[1], starts[3]))
    assert set(result.pairs.timesteps.tolist()) <= set(starts[1:4])


def test_comparisons_end_where_they_are_told_to(policy):
    assert len(rollout(policy, branch_until_step=2).comparisons) == 2


def test_plain_steps_without_noise_do_not_depend_on_it(policy):
    """The first compared step starts at Euler's latents, whatever was drawn."""
    first = {eta: rollout(policy, plain_eta=eta, branch_from_step=2).pairs.latents[0] for eta in (0.0, 1.0, None)}
    assert torch.equal(first[1.0], first[None])
    assert not torch.equal(first[0.0], first[None])


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"branch_from_step": 4}, "of 5 steps the first 4 draw noise"),
        ({"branch_until_step": 1}, "branch_until_step must be null, or above branch_from_step"),
        ({"branch_until_step": 6}, "branch_until_step must be null"),
        ({"plain_eta": 1.5}, "plain_eta must be null or in"),
    ],
)
def test_settings_that_compare_nothing_are_refused(policy, settings, reason):
    with pytest.raises(ConfigError, match=reason):
        rollout(policy, **settings)


FROM_NOISE = """
def brightness(images, prompts):
    return images.mean(dim=(1, 2, 3))
"""


def test_a_run_makes_pools_of_a_flow_and_trains_on_them(outside, pipelines, tmp_path):  # noqa: F811
    """Timesteps keep their bits on the disk, t = 1000 among them, and land in the quarters' names."""
    trained = outside(
        FROM_NOISE,
        "--model.policy=StableDiffusion3",
        f"--model.policy.pretrained={pipelines / 'tiny-sd3'}",
        "--model.policy.t5_tokens=16",
        "--model.policy.adaptation=LoRA",
        "--model.reference=AdapterOff",
        "--model.objective.guidance_scale=1.5",
        "--data.scorer={class_path: RewardScorer, init_args: {reward: own.brightness, scale: 1000.0}}",
        "--data.prompts=[a cat, a dog, the sea, a red house]",
        "--data.sampler.steps=4",
        "--data.sampler.candidates=2",
        "--data.sampler.branch_from_step=0",
        "--data.sampler.threshold=0.0",
        "--data.prompts_per_pool=2",
        "--data.prompts_per_batch=1",
        "--data.batch_size=3",
        "--data.keep_pools=true",
        config="spo_tiny",
        data=(),
    )
    assert trained.trainer.global_step == 2
    (pool,) = sorted((tmp_path / "run" / "pools").iterdir())
    manifest = json.loads((pool / "manifest.json").read_text())
    assert manifest["counts"]["comparisons"] == 2 * 3
    schedule = trained.model.policy.schedule
    starts = [step.timestep for step in schedule.trajectory(4)][:3]
    assert {f"score_gap/t{round(t)}" for t in starts} <= manifest["statistics"].keys()
    shards = open_pool(pool)
    pairs = [step_pair(shards.read(*StoredOrder(shards.sizes)[n]), n) for n in range(len(shards))]
    assert {pair.timesteps.item() for pair in pairs} == set(starts)
    assert all(pair.timesteps.dtype == pair.next_timesteps.dtype == torch.float32 for pair in pairs)
    assert "train/margin/t750-999" in trained.trainer.logged_metrics
