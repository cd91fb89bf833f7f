"""A flow's levels, noise and steps: those of diffusers and of the official samplers, and by hand."""

import re

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from hypothesis import given, settings
from hypothesis import strategies as st
from no_doubles import NoDoubles
from test_schedule import schedule as stable_diffusion

from lightning_modules.errors import ConfigError
from lightning_modules.randomness import generator
from lightning_modules.schedules.base import Schedule, gaussian_log_prob
from lightning_modules.schedules.flow import DynamicShift, FlowSchedule, shifted
from lightning_modules.schedules.level_draws import LogitNormal, Uniform
from lightning_modules.schedules.step_rules import CPS, Ancestral, FlowSDE, Precise

SD3 = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}
FLUX = {**SD3, "use_dynamic_shifting": True}
# What each name in the file of known answers stands for, and whether its pipeline brings levels of its own.
SCHEDULERS = {
    "static_shift1": ({**SD3, "shift": 1.0}, False),
    "static_shift3": (SD3, False),
    "z_image": (SD3, True),
    "flux": (FLUX, True),
    "linear": ({**FLUX, "time_shift_type": "linear"}, True),
    "qwen": ({**FLUX, "max_shift": 0.9, "max_image_seq_len": 8192, "shift_terminal": 0.02}, True),
}
RULES = [Ancestral(), CPS(), Precise(), FlowSDE()]


def levels(trajectory):
    return torch.tensor([step.timestep for step in trajectory] + [trajectory[-1].next_timestep]) / 1000


def ends(timesteps):
    """Of the steps of a trajectory that starts at these timesteps."""
    return torch.cat([timesteps[1:], timesteps.new_zeros(1)])


def steps(schedule, count=10):
    trajectory = schedule.trajectory(count)
    return tuple(torch.tensor([getattr(step, name) for step in trajectory]) for name in ("timestep", "next_timestep"))


def test_all_known_levels_are_diffusers(golden):
    known, found = golden("flow_scheduler"), 0
    for key, expected in known.items():
        match = re.fullmatch(r"(?P<name>[a-z_]+(_shift\d)?)(_tokens(?P<tokens>\d+))?_steps(?P<steps>\d+)\.sigmas", key)
        if match is None:
            continue
        config, own = SCHEDULERS[match["name"]]
        cells = None if match["tokens"] is None else 4 * int(match["tokens"])
        trajectory = FlowSchedule.from_scheduler_config(config, own).trajectory(int(match["steps"]), cells)
        torch.testing.assert_close(levels(trajectory), expected, rtol=0, atol=1e-6)
        times = torch.tensor([step.timestep for step in trajectory])
        torch.testing.assert_close(times, known[key.replace("sigmas", "timesteps")], rtol=0, atol=1e-3)
        assert [step.index for step in trajectory] == list(range(len(times)))
        assert trajectory[-1].next_timestep == 0
        found += 1
    assert found == 37


def test_the_second_last_level_of_sd3_is_shifted_twice_whatever_the_number_of_steps():
    once = 3 * 0.001 / 1.002
    twice = 3 * once / (1 + 2 * once)
    for count in (2, 10, 28):
        assert levels(FlowSchedule(3.0).trajectory(count))[-2].item() == pytest.approx(twice, abs=1e-7)
    assert levels(FlowSchedule(3.0, own_levels=True).trajectory(10))[-2].item() == pytest.approx(0.3 / 1.2, abs=1e-7)


@pytest.mark.parametrize("shift", [1, 3])
def test_training_tables_and_drawn_rows_are_diffusers(golden, shift):
    known, schedule = golden("flow_scheduler"), FlowSchedule(float(shift))
    middle = (torch.arange(1000) + 0.5) / 1000
    torch.testing.assert_close(schedule.at(middle), known[f"train_shift{shift}.timesteps"], rtol=0, atol=1e-3)
    torch.testing.assert_close(schedule.at(known["draw.u"]), known[f"draw.timesteps_shift{shift}"], rtol=0, atol=1e-3)
    assert schedule.at(torch.tensor([0.0, 1.0])).tolist() == [1000.0, schedule.at(torch.tensor([0.9999])).item()]


def test_a_dynamic_shift_leaves_the_training_table_as_it_is(golden):
    """diffusers shifts on the fly, and trainers read the table; FLUX's configuration says shift 3, too."""
    drawn = FlowSchedule.from_scheduler_config(FLUX, True).at(golden("flow_scheduler")["draw.u"])
    torch.testing.assert_close(drawn, golden("flow_scheduler")["draw.timesteps_shift1"], rtol=0, atol=1e-3)


def test_noising_is_diffusers(golden):
    known = golden("flow_scheduler")
    noisy = FlowSchedule().add_noise(known["noising.clean"], known["noising.noise"], known["noising.timesteps"])
    torch.testing.assert_close(noisy, known["noising.noisy"], rtol=0, atol=1e-6)


def test_ten_steps_without_noise_are_diffusers(golden):
    known, schedule = golden("flow_scheduler"), FlowSchedule(3.0)
    latents = known["euler10.initial"]
    for velocity, step in zip(known["euler10.velocity"], schedule.trajectory(10)):
        start = torch.full((2,), step.timestep)
        latents = schedule.step(velocity, latents, start, torch.full_like(start, step.next_timestep), 0.0)
    torch.testing.assert_close(latents, known["euler10.final"], rtol=0, atol=5e-6)


OFFICIAL = {"sde_a0.7": FlowSDE(0.7), "sde_a1": FlowSDE(1.0), "cps_a0.8": CPS(0.8), "cps_a0.5": CPS(0.5)}


@pytest.mark.parametrize("name", OFFICIAL)
@pytest.mark.parametrize("count", [10, 28])
def test_steps_with_noise_are_flow_grpos(golden, name, count):
    known, schedule = golden(f"flow_sde_{count}steps"), FlowSchedule(3.0, rule=OFFICIAL[name])
    starts, x = known["timesteps"], known["x_t"]
    velocity = known["velocity"].clone().requires_grad_()
    mean, std = schedule.step_distribution(velocity, x, starts, ends(starts), 1.0)
    torch.testing.assert_close(mean, known[f"{name}.mean"], rtol=0, atol=5e-6)
    torch.testing.assert_close(std, known[f"{name}.std"], rtol=0, atol=1e-6)
    step = schedule.step(velocity, x, starts, ends(starts), 1.0, known["noise"])
    torch.testing.assert_close(step, known[f"{name}.step"], rtol=0, atol=5e-6)
    if name.startswith("sde"):
        log_p = gaussian_log_prob(known[f"{name}.x_prev"], mean, std)
        torch.testing.assert_close(log_p, known[f"{name}.logp"], rtol=2e-6, atol=2e-6)
    else:  # the official one leaves out variance and constants
        log_p = -((known[f"{name}.x_prev"] - mean) ** 2).mean(dim=(1, 2, 3))
        torch.testing.assert_close(log_p, known[f"{name}.logp"], rtol=2e-6, atol=2e-6)
    (gradient,) = torch.autograd.grad(log_p.sum(), velocity)
    expected = known[f"{name}.grad_velocity"]
    assert (gradient - expected).abs().max() <= 1e-4 * expected.abs().max()


VARIANTS = {
    "flow_factory.flow-sde_a0.7": FlowSDE(0.7),
    "flow_factory.cps_a0.8": CPS(0.8),
    "precise.precise_a1": Precise(1.0),
    "precise.precise_a1.5": Precise(1.5),
    "precise.precise_a1.414": Ancestral(),  # a = sqrt(2) is DDPM's posterior
    "precise.cps_a0.8": CPS(0.8),
    "precise.flow_grpo_a0.7": FlowSDE(0.7),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_steps_with_noise_are_those_of_other_code(golden, name):
    known, schedule = golden("flow_sde_variants"), FlowSchedule(3.0, rule=VARIANTS[name])
    rows = slice(len(known[f"{name}.mean"]))
    starts, stops = known["timesteps"], ends(known["timesteps"])
    mean, std = schedule.step_distribution(known["velocity"], known["x_t"], starts, stops, 1.0)
    torch.testing.assert_close(mean[rows], known[f"{name}.mean"], rtol=0, atol=5e-6)
    torch.testing.assert_close(std[rows], known[f"{name}.std"], rtol=0, atol=1e-6)
    if "cps" not in name or name.startswith("precise"):
        log_p = gaussian_log_prob(known[f"{name}.step"], mean[rows], std[rows])
        torch.testing.assert_close(log_p, known[f"{name}.logp"], rtol=2e-6, atol=2e-6)


@given(
    level=st.floats(0.01, 1), share=st.floats(0, 0.99), eta=st.floats(0, 1), rule=st.sampled_from(RULES[:3])
)  # fmt: skip
@settings(deadline=None, max_examples=200)
def test_a_right_prediction_arrives_with_the_noise_that_the_level_says(level, share, eta, rule):
    """Signal 1 - s' exactly; the predicted noise and the fresh one, which are independent, make s' together."""
    s, s_next = torch.tensor([level]).double(), torch.tensor([level * share]).double()
    std = rule.std(s, s_next, eta)
    kept = rule.noise_factor(s, s_next, std)
    assert torch.isfinite(std).all()
    torch.testing.assert_close((kept**2 + std**2).sqrt(), s_next, rtol=1e-6, atol=1e-9)


def test_a_device_without_fp64_gives_the_same_numbers():
    schedule = FlowSchedule(3.0)
    starts, stops = steps(schedule)
    output, latents = torch.randn(2, 10, 1, 2, 2, generator=generator(0))

    def numbers():
        factors = (*schedule.signal_and_noise(starts), schedule.step_std(starts, stops, 1.0))
        mean, std = schedule.step_distribution(output, latents, starts, stops, 1.0)
        return *factors, std, mean

    expected = numbers()
    with NoDoubles(starts, stops) as device:
        found = numbers()
    assert all(torch.equal(a, b) for a, b in zip(found, expected))
    assert all(device.holds(number) for number in found[:4])


def test_flow_sde_leaves_more_noise_than_its_level_says():
    """27 times as much in the last step but one of SD3's ten."""
    s, s_next = (values.double() / 1000 for values in steps(FlowSchedule(3.0)))
    std = FlowSDE(0.7).std(s, s_next, 1.0)
    left = (FlowSDE(0.7).noise_factor(s, s_next, std) ** 2 + std**2).sqrt()[:-1] / s_next[:-1]
    assert left[0].item() == pytest.approx(1.04, abs=0.01)
    assert left[8].item() == pytest.approx(26.9, abs=0.1)


@pytest.mark.parametrize("rule", RULES)
def test_eta_zero_is_eulers_step_with_every_rule(rule):
    schedule = FlowSchedule(3.0, rule=rule)
    starts, stops = steps(schedule)
    x, velocity = torch.randn(2, 10, 4, 2, 2, generator=generator(0))
    mean, std = schedule.step_distribution(velocity, x, starts, stops, 0.0)
    assert std.tolist() == [0.0] * 10
    torch.testing.assert_close(mean, x + ((stops - starts) / 1000).view(-1, 1, 1, 1) * velocity, rtol=0, atol=5e-6)


def test_a_velocity_points_from_the_picture_to_the_noise():
    schedule = FlowSchedule()
    clean, noise = torch.randn(2, 3, 4, 2, 2, generator=generator(0))
    t = torch.tensor([1000.0, 400.0, 1.0])
    velocity = schedule.target(clean, noise, t)
    assert torch.equal(velocity, noise - clean)
    back, back_noise = schedule.predict_clean(velocity, schedule.add_noise(clean, noise, t), t)
    torch.testing.assert_close(back, clean, rtol=0, atol=1e-6)
    torch.testing.assert_close(back_noise, noise, rtol=0, atol=1e-6)


def test_gain_is_the_derivative_of_the_mean_over_the_noise():
    """By hand for ancestral noise: (s (1 - s') - k (1 - s)) / d; the numbers that METHODS of flows give."""
    schedule = FlowSchedule(3.0, own_levels=True)
    starts, stops = steps(schedule)
    gain = schedule.gain(starts, stops, 1.0)[:-1]
    expected = [0.04, 0.07, 0.11, 0.15, 0.20, 0.28, 0.40, 0.61, 1.15]
    assert gain.tolist() == pytest.approx(expected, abs=0.006)
    s, n = starts.double() / 1000, stops.double() / 1000
    d = schedule.rule.std(s, n, 1.0)
    torch.testing.assert_close(gain, ((s * (1 - n) - (n**2 - d**2).sqrt() * (1 - s)) / d)[:-1].float())
    assert FlowSchedule(3.0).gain(*steps(FlowSchedule(3.0)), 1.0)[8].item() == pytest.approx(31, abs=1)


def test_gain_of_stable_diffusions_steps():
    ddim = stable_diffusion()
    gain = ddim.gain(*steps(ddim, 20), 1.0)
    at_51 = steps(ddim, 20)[0] == 51
    assert gain[at_51].item() == pytest.approx(5.4, abs=0.1)
    assert all(0.6 < value < 1.15 for value in gain[~at_51].tolist())
    assert FlowSchedule.divides_by_gain
    assert not Schedule.divides_by_gain


@pytest.mark.parametrize("rule", RULES)
def test_the_last_step_compares_nothing_unless_the_rule_draws_noise_in_it(rule):
    schedule = FlowSchedule(3.0, rule=rule)
    trajectory = schedule.trajectory(10)
    last = 10 if isinstance(rule, FlowSDE) else 9
    assert schedule.random_steps(trajectory) == last
    starts, stops = steps(schedule)
    schedule.require_random_steps(starts[:last], stops[:last])
    if last < 10:
        with pytest.raises(ConfigError, match=r"from t = 8.929 to 0 is certain"):
            schedule.require_random_steps(starts, stops)


def test_all_of_stable_diffusions_steps_are_random():
    assert stable_diffusion().random_steps(stable_diffusion().trajectory(20)) == 20


def test_levels_are_drawn_from_each_samples_own_generator():
    schedule = FlowSchedule(3.0)
    together = schedule.draw([generator(i) for i in range(6)])
    assert together.dtype == torch.float32
    for i in range(6):
        assert torch.equal(schedule.draw([generator(i)]), together[i : i + 1])


def test_the_shapes_of_drawn_levels():
    """Quantiles of s: flow_grpo's and diffusers' distributions (10, 50, 90%)."""
    sources = [generator(i) for i in range(4000)]
    for shift, draw, expected in (
        (3.0, LogitNormal(), [0.46, 0.75, 0.92]),
        (3.0, Uniform(), [0.25, 0.75, 0.96]),
        (1.0, LogitNormal(), [0.22, 0.50, 0.78]),
        (1.0, LogitNormal(1.0), [0.09, 0.27, 0.57]),
    ):
        drawn = FlowSchedule(shift, levels=draw).draw(sources) / 1000
        assert drawn.quantile(torch.tensor([0.1, 0.5, 0.9])).tolist() == pytest.approx(expected, abs=0.025)


def test_a_shift_backwards_in_time_is_the_inverse_one():
    u = torch.linspace(0, 1, 11).double()
    torch.testing.assert_close(shifted(1 - u, 3.0), 1 - shifted(u, 1 / 3))


def test_dynamic_shift_by_hand():
    """e^0.5 at 256 tokens, e^1.15 at 4096, and further along the line."""
    shift = DynamicShift()
    assert shift.factor(4 * 256) == pytest.approx(1.6487, abs=1e-4)
    assert shift.factor(4 * 4096) == pytest.approx(3.1582, abs=1e-4)
    assert DynamicShift(kind="linear").factor(4 * 2176) == pytest.approx(0.825)
    with pytest.raises(ValueError, match="no cells were given"):
        FlowSchedule(shift).trajectory(4)


@pytest.mark.parametrize(
    "bad",
    [lambda: CPS(0.0), lambda: CPS(1.5), lambda: Precise(0.0), lambda: FlowSDE(-1.0), lambda: LogitNormal(std=0.0),
     lambda: FlowSchedule().trajectory(0)],
)  # fmt: skip
def test_settings_out_of_range_are_refused(bad):
    with pytest.raises(ConfigError, match=r"must|want"):
        bad()


@pytest.mark.parametrize(
    "config",
    [{"_class_name": "DDIMScheduler"}, *({**SD3, name: True} for name in ("use_karras_sigmas", "invert_sigmas"))],
)
def test_other_schedulers_and_spacings_are_refused(config):
    with pytest.raises(ConfigError, match="no rectified flow|is not supported"):
        FlowSchedule.from_scheduler_config(config, False)


def test_missing_keys_have_diffusers_defaults():
    config = {"_class_name": "FlowMatchEulerDiscreteScheduler"}
    theirs = FlowMatchEulerDiscreteScheduler.from_config(config)
    theirs.set_timesteps(7)
    torch.testing.assert_close(levels(FlowSchedule.from_scheduler_config(config, False).trajectory(7)), theirs.sigmas)
