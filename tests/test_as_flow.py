"""A noise predictor as a flow: the same steps as DDIM's in other coordinates, and pure noise at the one end."""

import json
import shutil

import pytest
import torch
from no_doubles import NoDoubles

from lightning_modules.batches import DenoiserQuery
from lightning_modules.errors import ConfigError
from lightning_modules.policies import LoRA, StableDiffusion, StableDiffusionAsFlow
from lightning_modules.preference_views import NoisyLatents
from lightning_modules.randomness import generator
from lightning_modules.rewards import LatentRewardModel
from lightning_modules.sampling.pictures import Sampler, initial_noise
from lightning_modules.sampling.step_scorers import LatentScorer
from lightning_modules.schedules.base import per_sample

ROWS = torch.tensor([951, 501, 51])
NEXT = torch.tensor([901, 451, 1])


@pytest.fixture(scope="module")
def both(pipelines):
    folder = str(pipelines / "tiny-sd15")
    torch.manual_seed(0)
    plain = StableDiffusion(folder, LoRA()).eval()
    torch.manual_seed(0)
    return plain, StableDiffusionAsFlow(folder, LoRA()).eval()


def levels(schedule, timesteps):
    """The flow's timesteps of a table's rows, and what its latents are multiplied by to be variance preserving."""
    signal, noise = schedule.signal_and_noise(timesteps)
    level = noise / (signal + noise)
    return 1000 * level, per_sample(signal / (1 - level))


@torch.no_grad()
@pytest.mark.parametrize(("guidance", "eta"), [(1.0, 0.0), (2.0, 0.0), (2.0, 1.0)])
def test_a_step_is_ddims(both, guidance, eta):
    plain, flow = both
    start, scale = levels(plain.schedule, ROWS)
    end, next_scale = levels(plain.schedule, NEXT)
    x, noise = torch.randn(2, 3, 4, 8, 8, generator=generator(0))
    cond = plain.encode_prompts(["a cat", "a dog", "the sea"])
    output = flow.predict_noise(DenoiserQuery(x, start, cond, guidance))
    theirs = plain.predict_noise(DenoiserQuery(scale * x, ROWS, cond, guidance))
    expected = plain.schedule.step(theirs, scale * x, ROWS, NEXT, eta, noise)
    found = next_scale * flow.schedule.step(output, x, start, end, eta, noise)
    assert (found - expected).abs().max() <= 1e-3 * expected.abs().max()


@torch.no_grad()
def test_pure_noise_is_seen_at_the_noisiest_row_and_kept(both):
    """s = 1: x' = (1 - s') x_0 + s' x, whatever the network takes x for."""
    plain, flow = both
    x = torch.randn(2, 4, 8, 8, generator=generator(1))
    cond, last = plain.encode_prompts(["a cat", "a dog"]), torch.tensor([999, 999])
    start, end = torch.full((2,), 1000.0), torch.full((2,), 950.0)
    velocity = flow.predict_noise(DenoiserQuery(x, start, cond))
    top, scale = levels(plain.schedule, last)
    seen = scale * per_sample(top / 1000) * x
    clean, _ = plain.schedule.predict_clean(plain.predict_noise(DenoiserQuery(seen, last, cond)), seen, last)
    found = flow.schedule.step(velocity, x, start, end, 0.0)
    assert (found - (0.05 * clean + 0.95 * x)).abs().max() <= 1e-3 * clean.abs().max()


@torch.no_grad()
def test_every_level_has_a_finite_velocity(both):
    _, flow = both
    timesteps = torch.tensor([1000.0, 936.0, 500.0, 10.0, 0.0])
    x = torch.randn(5, 4, 8, 8, generator=generator(2))
    velocity = flow.predict_noise(DenoiserQuery(x, timesteps, flow.encode_prompts(["a"] * 5)))
    assert velocity.isfinite().all()


def test_pictures_start_at_pure_noise_and_have_the_bases_size(both):
    _, flow = both
    noise, sources = initial_noise(flow, [(0,), (1,)])
    pictures = Sampler(steps=3, guidance_scale=2.0).generate(flow, flow.predict_noise, ["a", "b"], noise, sources)
    assert pictures.shape == (2, 3, 64, 64)


@torch.no_grad()
def test_a_device_without_fp64_gives_the_same_velocity(both):
    _, flow = both
    x, timesteps = torch.randn(2, 4, 8, 8, generator=generator(2)), torch.tensor([1000.0, 500.0])
    query = DenoiserQuery(x, timesteps, flow.encode_prompts(["a cat", "a dog"]))
    expected = flow.predict_noise(query)
    with NoDoubles(timesteps, x, flow.alphas_cumprod):
        found = flow.predict_noise(query)
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("scheduler", "options", "said"),
    [
        ({"prediction_type": "v_prediction"}, {}, "the base predicts v_prediction; give one that predicts noise"),
        ({"prediction_type": "sample"}, {}, "the base predicts sample; give one that predicts noise"),
        ({}, {"shift": 0.0}, "model.policy.shift must be above 0, got 0.0; 1 leaves the levels even"),
        ({}, {"shift": -1.0}, "model.policy.shift must be above 0, got -1.0"),
    ],
)
def test_what_is_no_noise_predictor_or_no_shift_is_refused_in_one_line(tmp_path, pipelines, scheduler, options, said):
    folder = shutil.copytree(pipelines / "tiny-sd15", tmp_path / "base")
    config = folder / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | scheduler))
    with pytest.raises(ConfigError, match=said) as caught:
        StableDiffusionAsFlow(str(folder), LoRA(), **options)
    assert "\n" not in str(caught.value)


def test_a_model_of_the_tables_noisy_latents_is_refused(both, pipelines):
    """The same VAE and UNet, but other latents at other timesteps."""
    plain, flow = both
    model = LatentRewardModel(str(pipelines / "tiny-lrm-sd15"), str(pipelines / "tiny-sd15"))
    for check in (LatentScorer(model).check, lambda policy: NoisyLatents().check(policy, model)):
        check(plain)
        with pytest.raises(
            ConfigError, match="timesteps of a diffusion schedule, .*AsFlow has a flow schedule"
        ) as said:
            check(flow)
        assert "\n" not in str(said.value)
