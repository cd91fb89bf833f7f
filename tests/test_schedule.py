"""The schedule is diffusers' on every step, and the step's probability is the official SPO code's."""

import math

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler

from lightning_modules.errors import ConfigError
from lightning_modules.schedules.base import gaussian_log_prob
from lightning_modules.schedules.discrete import NoiseSchedule

SD15 = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "steps_offset": 1,
    "set_alpha_to_one": False,
    "clip_sample": False,
}


def schedule(**changes):
    return NoiseSchedule.from_scheduler_config(SD15 | changes)


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", ["linear", "scaled_linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("zero_snr", [False, True])
def test_alphas_are_diffusers(kind, zero_snr):
    changes = {"beta_schedule": kind, "rescale_betas_zero_snr": zero_snr}
    theirs = DDIMScheduler.from_config(SD15 | changes).alphas_cumprod
    assert torch.equal(schedule(**changes).alphas_cumprod, theirs)


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("steps", [1, 5, 20, 30, 50, 1000])
def test_inference_timesteps_are_diffusers(spacing, steps):
    theirs = DDIMScheduler.from_config(SD15 | {"timestep_spacing": spacing, "steps_offset": 0})
    theirs.set_timesteps(steps)
    ours = schedule(timestep_spacing=spacing, steps_offset=0).trajectory(steps)
    assert [step.timestep for step in ours] == theirs.timesteps.tolist()
    assert [step.index for step in ours] == list(range(steps))
    # diffusers steps down by T / steps, and a negative end is the clean latents.
    assert [step.next_timestep for step in ours] == [max(-1, step.timestep - 1000 // steps) for step in ours]


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_every_ddim_step_is_diffusers(prediction_type, eta):
    ours = schedule(prediction_type=prediction_type)
    theirs = DDIMScheduler.from_config(SD15 | {"prediction_type": prediction_type})
    theirs.set_timesteps(20)
    for step in ours.trajectory(20):
        t = step.timestep
        x, output, z = (noise(2, 4, 8, 8, seed=t + i) for i in range(3))
        expected = theirs.step(output, t, x, eta=eta, variance_noise=z if eta else None).prev_sample
        actual = ours.step(output, x, torch.tensor([t] * 2), torch.tensor([step.next_timestep] * 2), eta, z)
        torch.testing.assert_close(actual, expected, rtol=0, atol=2e-6 * max(1.0, expected.abs().max().item()))


def test_every_training_timestep_noises_and_targets_as_ddpm():
    theirs = DDPMScheduler.from_config(SD15)
    t = torch.arange(1000)
    clean, z = noise(1000, 1, 2, 2), noise(1000, 1, 2, 2, seed=1)
    assert torch.equal(schedule().add_noise(clean, z, t), theirs.add_noise(clean, z, t))
    velocity = schedule(prediction_type="v_prediction").target(clean, z, t)
    assert torch.equal(velocity, theirs.get_velocity(clean, z, t))
    assert torch.equal(schedule().target(clean, z, t), z)
    assert torch.equal(schedule(prediction_type="sample").target(clean, z, t), clean)


def test_eta_one_over_all_thousand_steps_is_the_ddpm_posterior():
    """DDIM with eta 1 and adjacent timesteps is DDPM's ancestral step (arXiv 2010.02502, section 4.1)."""
    ours, theirs = schedule(), DDPMScheduler.from_config(SD15 | {"variance_type": "fixed_small"})
    t = torch.arange(1, 1000)
    x, output = noise(999, 1, 2, 2), noise(999, 1, 2, 2, seed=1)
    mean, std = ours.step_distribution(output, x, t, t - 1, eta=1.0)
    a_t, a_prev = theirs.alphas_cumprod[t], theirs.alphas_cumprod[t - 1]
    clean, _ = ours.predict_clean(output, x, t)
    beta = 1 - a_t / a_prev
    posterior = ((a_prev.sqrt() * beta / (1 - a_t)).view(-1, 1, 1, 1) * clean) + (
        ((1 - beta).sqrt() * (1 - a_prev) / (1 - a_t)).view(-1, 1, 1, 1) * x
    )
    torch.testing.assert_close(mean, posterior, rtol=1e-4, atol=1e-4)
    variance = torch.stack([theirs._get_variance(int(i)) for i in t])
    torch.testing.assert_close(std**2, variance, rtol=1e-3, atol=1e-8)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_predict_clean_inverts_add_noise(prediction_type):
    ours = schedule(prediction_type=prediction_type)
    t = torch.tensor([0, 250, 700])
    clean, z = noise(3, 4, 8, 8), noise(3, 4, 8, 8, seed=1)
    back, back_noise = ours.predict_clean(ours.target(clean, z, t), ours.add_noise(clean, z, t), t)
    torch.testing.assert_close(back, clean, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(back_noise, z, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("prediction_type", "eta", "key"),
    [("epsilon", 1.0, "logp"), ("epsilon", 0.5, "logp_eta0p5"), ("v_prediction", 1.0, "logp_v_prediction"),
     ("sample", 1.0, "logp_sample")],
)  # fmt: skip
def test_step_log_probability_is_the_official_one(golden, prediction_type, eta, key):
    known = golden("ddim_logprob_20steps")
    ours = schedule(prediction_type=prediction_type)
    t = known["timesteps"]
    mean, std = ours.step_distribution(known["noise_pred"], known["x_t"], t, t - 50, eta)
    if key == "logp":
        torch.testing.assert_close(mean, known["mean"], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(std, known["std"], rtol=1e-5, atol=0)
    actual = gaussian_log_prob(known["x_prev"], mean, std)
    torch.testing.assert_close(actual, known[key], rtol=2e-6, atol=2e-6)


def test_log_probability_by_hand():
    """N(1; 0, 2^2): -1/8 - ln 2 - ln(2 pi)/2, averaged over equal elements."""
    value, mean = torch.ones(1, 2, 3, 3), torch.zeros(1, 2, 3, 3)
    expected = -1 / 8 - math.log(2) - 0.5 * math.log(2 * math.pi)
    assert gaussian_log_prob(value, mean, torch.tensor([2.0])).item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("bad", [{"beta_schedule": "exp"}, {"prediction_type": "x0"}, {"timestep_spacing": "karras"}])
def test_unknown_settings_name_themselves_and_the_known_ones(bad):
    ((key, value),) = bad.items()
    with pytest.raises(ConfigError, match=f"{key} must be one of .* got '{value}'"):
        schedule(**bad)


def test_defaults_are_those_of_diffusers_ddim():
    bare = {key: SD15[key] for key in ("beta_schedule", "beta_start", "beta_end")}
    theirs = DDIMScheduler.from_config(bare)
    theirs.set_timesteps(20)
    ours = NoiseSchedule.from_scheduler_config(bare).trajectory(20)
    assert [step.timestep for step in ours] == theirs.timesteps.tolist()
    # Made by hand it is Stable Diffusion's own: 951, 901, ...
    assert NoiseSchedule(torch.linspace(0.99, 0.01, 1000), 0.99).trajectory(20)[0].timestep == 951


def test_a_step_from_pure_noise_has_no_direction_left_and_no_nan():
    """With zero terminal SNR, s^2 = 1 - a_next at eta 1, of which rounding makes a little more."""
    schedule_ = schedule(rescale_betas_zero_snr=True, prediction_type="v_prediction")
    ends = torch.arange(999)
    starts = torch.full_like(ends, 999)
    std = schedule_.step_std(starts, ends, eta=1.0)
    assert (1 - schedule_.alpha_cumprod(ends) - std**2).min() < 0  # else this test shows nothing
    output, x = noise(999, 1, 2, 2, seed=1), noise(999, 1, 2, 2, seed=2)
    mean, _ = schedule_.step_distribution(output, x, starts, ends, eta=1.0)
    torch.testing.assert_close(
        mean, schedule_.alpha_cumprod(ends).sqrt().view(-1, 1, 1, 1) * -output, atol=2e-3, rtol=0
    )


def test_a_scheduler_of_another_family_is_refused():
    with pytest.raises(ConfigError, match="is no discrete diffusion"):
        NoiseSchedule.from_scheduler_config({"_class_name": "EDMEulerScheduler", "sigma_min": 0.002})
    with pytest.raises(ConfigError, match="is no discrete diffusion"):
        schedule(_class_name="UniPCMultistepScheduler", use_flow_sigmas=True)
    with pytest.raises(ConfigError, match="thresholding"):
        schedule(thresholding=True)
