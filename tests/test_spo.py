"""SPO from tensors alone and through three real training steps: the official code's numbers, by hand, and the cost."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from tiny_world import trained_parameters

from lightning_modules.alignment import AlignmentModule
from lightning_modules.batches import Conditioning, StepPairs
from lightning_modules.errors import ConfigError
from lightning_modules.objectives import SPO
from lightning_modules.policies.lora import LoRA
from lightning_modules.policies.stable_diffusion import StableDiffusion
from lightning_modules.references import AdapterOff
from lightning_modules.schedules.base import gaussian_log_prob
from lightning_modules.schedules.discrete import NoiseSchedule

SD15 = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}
SCHEDULE = NoiseSchedule.from_scheduler_config(SD15)
STEP = 50  # 20 steps of 1000
CLIPPED = [1, 3, 4]


def known_pairs(known):
    return StepPairs(
        latents=known["x_t"],
        chosen=known["x_prev_win"],
        rejected=known["x_prev_lose"],
        timesteps=known["timesteps"],
        next_timesteps=(known["timesteps"] - STEP).clamp(min=-1),
        prompts=("a",) * len(known["timesteps"]),
        score_gap=torch.full((len(known["timesteps"]),), 0.5),
        indices=torch.arange(len(known["timesteps"])),
    )


def random_pairs(b=4, t=501, seed=0, apart=False):
    latents, chosen, rejected, other = torch.randn(4, b, 4, 2, 2, generator=torch.Generator().manual_seed(seed))
    timesteps = torch.full((b,), t)
    gap = torch.arange(1.0, b + 1) / 10
    pairs = StepPairs(latents, chosen, rejected, timesteps, timesteps - STEP, ("a",) * b, gap, torch.arange(b))
    return replace(pairs, rejected_latents=other) if apart else pairs


def rows(pairs, i):
    cut = slice(i, i + 1)
    return StepPairs(
        pairs.latents[cut], pairs.chosen[cut], pairs.rejected[cut], pairs.timesteps[cut], pairs.next_timesteps[cut],
        pairs.prompts[cut], pairs.score_gap[cut], pairs.indices[cut],
    )  # fmt: skip


def spo(pairs, policy, reference, objective=None, schedule=SCHEDULE):
    objective = objective or SPO()
    cond = Conditioning(torch.zeros(len(pairs), 1, 1))
    query = objective.query(pairs, cond, schedule, [])
    return objective.loss(pairs, query, policy, reference, schedule)


def at_log_ratios(chosen, rejected, sigma_t=501, eta=1.0):
    """Pairs with one number as latent, and outputs, for which log r has the given values.

    The reference's mean is mu, the policy's mu + d: log r(x) = ((x - mu)^2 - (x - mu - d)^2) / 2s^2, which x solves.
    """
    b = len(chosen)
    timesteps = torch.full((b,), sigma_t)
    latents, reference = torch.ones(b, 1, 1, 1), torch.zeros(b, 1, 1, 1)
    policy = torch.full((b, 1, 1, 1), 0.5)
    mean, std = SCHEDULE.step_distribution(reference, latents, timesteps, timesteps - STEP, eta)
    moved, _ = SCHEDULE.step_distribution(policy, latents, timesteps, timesteps - STEP, eta)
    d = (moved - mean).flatten()
    solve = [mean.flatten() + (torch.tensor(value) * 2 * std**2 + d**2) / (2 * d) for value in (chosen, rejected)]
    ends = [x.reshape(-1, 1, 1, 1) for x in solve]
    pairs = StepPairs(latents, *ends, timesteps, timesteps - STEP, ("a",) * b, torch.full((b,), 0.5), torch.arange(b))
    return pairs, policy, reference


def test_spo_is_the_official_loss_and_gradient(golden):
    known = golden("spo_loss")
    policy = known["noise_pred"].clone().requires_grad_()
    output = spo(known_pairs(known), policy, known["noise_ref_pred"])
    torch.testing.assert_close(output.loss, known["loss"], rtol=0, atol=1e-5)
    torch.testing.assert_close(output.loss.double(), known["loss_fp64"], rtol=0, atol=1e-5)
    output.loss.backward()
    expected = known["grad_noise_pred_shared"]
    assert (policy.grad - expected).abs().max() <= 1e-4 * expected.abs().max()
    in_fp64 = known["grad_noise_pred_win_fp64"] + known["grad_noise_pred_lose_fp64"]
    assert (policy.grad - in_fp64).abs().max() <= 1e-4 * in_fp64.abs().max()


def test_spo_clips_the_official_samples_and_no_other(golden):
    known = golden("spo_loss")
    pairs = known_pairs(known)
    policy = known["noise_pred"].clone().requires_grad_()
    for i in range(6):
        output = spo(rows(pairs, i), policy[i : i + 1], known["noise_ref_pred"][i : i + 1])
        torch.testing.assert_close(output.loss, known["loss_per_sample"][i], rtol=0, atol=1e-5)
        torch.testing.assert_close(output.metrics["ratio_chosen"], known["ratio_win"][i], rtol=0, atol=1e-5)
        torch.testing.assert_close(output.metrics["ratio_rejected"], known["ratio_lose"][i], rtol=0, atol=1e-5)
        free = torch.stack([known["ratio_win_unclipped"][i], known["ratio_lose_unclipped"][i]])
        assert output.metrics["clip_fraction"] == ((free < 0.9) | (free > 1.1)).float().mean()
        assert (output.metrics["clip_fraction"] > 0) == (i in CLIPPED)
    spo(pairs, policy, known["noise_ref_pred"]).loss.backward()
    assert policy.grad[4].abs().max() == 0  # both of its ratios are clipped
    assert all(policy.grad[i].abs().max() > 0 for i in (0, 1, 2, 3, 5))


def test_log_probs_of_policy_and_reference_are_the_official_ones(golden):
    known = golden("spo_loss")
    t = known["timesteps"]
    for output, prefix in ((known["noise_pred"], "logp"), (known["noise_ref_pred"], "logp_ref")):
        mean, std = SCHEDULE.step_distribution(output, known["x_t"], t, t - STEP, 1.0)
        torch.testing.assert_close(std, known["std_dev"], rtol=0, atol=1e-6)
        for end, name in (("x_prev_win", "win"), ("x_prev_lose", "lose")):
            actual = gaussian_log_prob(known[end], mean, std)
            torch.testing.assert_close(actual, known[f"{prefix}_{name}"], rtol=0, atol=2e-6)


@pytest.mark.parametrize(("prefix", "objective"), [("", SPO(beta=500.0)), ("beta100_eps0.03.", SPO(100.0, 0.03))])
def test_at_lpos_beta_it_is_lpos_loss_and_gradient(golden, prefix, objective):
    known = golden("lpo_loss")
    policy = known["noise_pred"].clone().requires_grad_()
    output = spo(known_pairs(known), policy, known["noise_ref_pred"], objective)
    torch.testing.assert_close(output.loss, known[f"{prefix}loss"], rtol=1e-4, atol=0)
    torch.testing.assert_close(output.loss.double(), known[f"{prefix}loss_fp64"], rtol=1e-4, atol=0)
    output.loss.backward()
    for name in ("grad_noise_pred_shared", "grad_noise_pred_shared_fp64"):
        expected = known[f"{prefix}{name}"]
        assert (policy.grad - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_where_lpos_own_formula_overflows_the_loss_and_its_gradient_are_the_exact_ones(golden):
    known = {name.removeprefix("extreme."): value for name, value in golden("lpo_loss").items() if "extreme." in name}
    assert known["loss_official_fp32"].isinf()
    assert known["grad_official_fp32_is_nan"].any()
    policy = known["noise_pred"].clone().requires_grad_()
    output = spo(known_pairs(known), policy, known["noise_ref_pred"], SPO(beta=500.0))
    torch.testing.assert_close(output.loss.double(), known["loss_fp64"], rtol=1e-4, atol=0)
    output.loss.backward()
    expected = known["grad_noise_pred_shared_fp64"]
    assert (policy.grad - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_on_policy_the_loss_is_ln_2_and_still_teaches(golden):
    known = golden("spo_loss") | golden("spo_loss_onpolicy")
    policy = known["noise_pred"].clone().requires_grad_()
    output = spo(known_pairs(known), policy, policy.detach().clone())
    assert output.loss.item() == pytest.approx(math.log(2), abs=1e-7)
    assert output.metrics["accuracy"].item() == 0.5
    assert output.metrics["margin"].item() == output.metrics["clip_fraction"].item() == 0
    output.loss.backward()
    expected = known["grad_noise_pred_shared"]
    assert expected.abs().max() > 0
    assert (policy.grad - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_margin_by_hand():
    """log r_w = 0.05, log r_l = -0.02: margin 0.07, loss log(1 + exp(-0.7))."""
    output = spo(*at_log_ratios([0.05], [-0.02]))
    assert output.metrics["margin"].item() == pytest.approx(0.07, abs=1e-5)
    assert output.loss.item() == pytest.approx(math.log1p(math.exp(-0.7)), abs=1e-4)
    assert output.metrics["ratio_chosen"].item() == pytest.approx(math.exp(0.05), abs=1e-5)
    assert output.metrics["accuracy"].item() == 1
    assert output.metrics["clip_fraction"].item() == 0


@pytest.mark.parametrize("beta", [2.0, 30.0])
def test_beta_multiplies_the_margin(beta):
    output = spo(*at_log_ratios([0.05], [-0.02]), SPO(beta=beta))
    assert output.metrics["margin"].item() == pytest.approx(0.07, abs=1e-5)
    assert output.loss.item() == pytest.approx(math.log1p(math.exp(-beta * 0.07)), abs=3e-4)


def test_eta_is_the_steps():
    """The ratios of a step of eta 0.5 are those only for an objective of eta 0.5."""
    step = at_log_ratios([0.05], [-0.02], eta=0.5)
    assert spo(*step, SPO(eta=0.5)).metrics["margin"].item() == pytest.approx(0.07, abs=1e-5)
    assert spo(*step, SPO(eta=1.0)).metrics["margin"].item() != pytest.approx(0.07, abs=0.02)


def test_ratio_clip_is_where_the_ratio_is_clipped():
    output = spo(*at_log_ratios([0.15], [-0.15]), SPO(ratio_clip=0.2))
    assert output.metrics["clip_fraction"].item() == 0
    output = spo(*at_log_ratios([0.15], [-0.15]), SPO(ratio_clip=0.05))
    assert output.metrics["ratio_chosen"].item() == pytest.approx(1.05)
    assert output.metrics["ratio_rejected"].item() == pytest.approx(0.95)
    assert output.metrics["clip_fraction"].item() == 1


def test_the_clip_holds_ratios_and_stops_their_gradients():
    """Chosen 2 (clipped to 1.1), rejected 0.95: only the rejected one's gradient is left."""
    pairs, policy, reference = at_log_ratios([math.log(2.0)], [math.log(0.95)])
    policy.requires_grad_()
    output = spo(pairs, policy, reference)
    margin = math.log(1.1) - math.log(0.95)
    assert output.metrics["margin"].item() == pytest.approx(margin, abs=1e-5)
    assert output.metrics["clip_fraction"].item() == 0.5
    left = torch.autograd.grad(output.loss, policy)[0]
    mean, std = SCHEDULE.step_distribution(policy, pairs.latents, pairs.timesteps, pairs.next_timesteps, 1.0)
    pull = torch.autograd.grad(gaussian_log_prob(pairs.rejected, mean, std).sum(), policy)[0]
    expected = 10 / (1 + math.exp(10 * margin)) * pull
    torch.testing.assert_close(left, expected, rtol=1e-4, atol=1e-6)


def test_a_ratio_too_far_for_exp_costs_no_more_than_the_clip():
    output = spo(*at_log_ratios([500.0], [-500.0]))
    assert output.loss.item() == pytest.approx(math.log1p((0.9 / 1.1) ** 10), abs=1e-6)
    assert output.metrics["ratio_chosen"].item() == pytest.approx(1.1)
    assert output.metrics["clip_fraction"].item() == 1


@given(st.integers(0, 2**31), st.booleans())
@settings(max_examples=25, deadline=None)
def test_swapping_chosen_and_rejected_negates_the_margin(seed, apart):
    pairs = random_pairs(seed=seed, apart=apart)
    n = 8 if apart else 4
    outputs = torch.randn(2, n, 4, 2, 2, generator=torch.Generator().manual_seed(seed + 1)) * 0.1
    swapped = replace(pairs, chosen=pairs.rejected, rejected=pairs.chosen)
    if apart:
        swapped = replace(swapped, latents=pairs.rejected_latents, rejected_latents=pairs.latents)
    behind = spo(swapped, *(outputs.roll(4, dims=1) if apart else outputs))
    ahead = spo(pairs, *outputs)
    assert behind.metrics["margin"].item() == pytest.approx(-ahead.metrics["margin"].item(), abs=1e-7)
    assert behind.metrics["accuracy"].item() == pytest.approx(1 - ahead.metrics["accuracy"].item())


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_one_row_for_a_shared_x_t_equals_two(prediction_type):
    schedule = NoiseSchedule.from_scheduler_config(SD15 | {"prediction_type": prediction_type})
    pairs = random_pairs()
    one = torch.randn(4, 4, 2, 2, generator=torch.Generator().manual_seed(5)).requires_grad_()
    reference = one.detach() + 0.02
    output = spo(pairs, one, reference, schedule=schedule)
    two = torch.cat([one.detach()] * 2).requires_grad_()
    doubled = spo(replace(pairs, rejected_latents=pairs.latents), two, torch.cat([reference] * 2), schedule=schedule)
    assert torch.equal(output.loss, doubled.loss)
    output.loss.backward()
    doubled.loss.backward()
    torch.testing.assert_close(one.grad, two.grad[:4] + two.grad[4:])


def test_velocity_and_noise_prediction_of_one_step_have_one_loss():
    """The velocity that stands for a noise prediction describes the same Gaussian."""
    pairs = random_pairs()
    outputs = torch.randn(2, 4, 4, 2, 2, generator=torch.Generator().manual_seed(6))
    outputs[1] = outputs[0] + 0.05 * outputs[1]
    in_v = NoiseSchedule.from_scheduler_config(SD15 | {"prediction_type": "v_prediction"})
    velocities = []
    for noise in outputs:
        clean, _ = SCHEDULE.predict_clean(noise, pairs.latents, pairs.timesteps)
        velocities.append(in_v.target(clean, noise, pairs.timesteps))
    torch.testing.assert_close(spo(pairs, *velocities, schedule=in_v).loss, spo(pairs, *outputs).loss)


def test_the_query_is_one_row_a_pair_or_chosen_rows_then_rejected():
    cond = Conditioning(torch.arange(4.0).reshape(4, 1, 1))
    pairs = random_pairs()
    query = SPO(guidance_scale=3.0).query(pairs, cond, SCHEDULE, [])
    assert torch.equal(query.latents, pairs.latents)
    assert query.guidance_scale == 3.0
    apart = random_pairs(apart=True)
    query = SPO().query(apart, cond, SCHEDULE, [])
    assert torch.equal(query.latents, torch.cat([apart.latents, apart.rejected_latents]))
    assert query.timesteps.shape == (8,)
    assert torch.equal(query.cond.embeds.flatten(), torch.arange(4.0).repeat(2))


def test_metrics_have_the_same_names_at_every_call_and_are_detached():
    policy = torch.zeros(4, 4, 2, 2, requires_grad=True)
    outputs = [spo(random_pairs(t=t), policy, torch.ones(4, 4, 2, 2)) for t in (51, 951)]
    assert outputs[0].metrics.keys() == outputs[1].metrics.keys()
    assert not any(value.requires_grad for value in outputs[0].metrics.values())
    assert {"margin", "accuracy", "ratio_chosen", "ratio_rejected", "clip_fraction", "score_gap"} <= set(
        outputs[0].metrics
    )
    for name in ("margin", "accuracy", "clip_fraction"):
        early, late = outputs[0].metrics, outputs[1].metrics
        assert early[f"{name}/t0-249"] == early[name]
        assert early[f"{name}/t750-999"].isnan()
        assert late[f"{name}/t750-999"] == late[name]
    assert outputs[0].metrics["score_gap"].item() == pytest.approx(0.25)


@pytest.mark.parametrize("wrong", [{"beta": 0.0}, {"ratio_clip": 1.0}, {"eta": 0.0}, {"guidance_scale": 0.5}])
def test_values_out_of_range_are_refused_in_one_line(wrong):
    with pytest.raises(ConfigError) as error:
        SPO(**wrong)
    assert f"objective.{next(iter(wrong))}" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_last_step_without_noise_is_refused():
    certain = NoiseSchedule.from_scheduler_config(SD15 | {"set_alpha_to_one": True})
    objective, cond = SPO(), Conditioning(torch.zeros(4, 1, 1))
    objective.query(random_pairs(t=51), cond, certain, [])  # arrives at t = 1: a Gaussian like any other
    with pytest.raises(ConfigError, match="set_alpha_to_one") as error:
        objective.query(random_pairs(t=1), cond, certain, [])
    assert "\n" not in str(error.value)


# Three AdamW steps through the real module


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=6e-5, weight_decay=1e-4)


def lora_module(pipelines, known):
    policy = StableDiffusion(str(pipelines / "tiny-sd15"), LoRA(rank=4))
    initial = {name.removeprefix("lora_init."): value for name, value in known.items() if name.startswith("lora_init")}
    set_peft_model_state_dict(policy.unet, initial)
    module = AlignmentModule(policy, SPO(), AdapterOff(), adamw)
    module.setup("fit")
    return module


def recorded_pairs(known, start, stop, module):
    """The recorded transitions; ``module`` encodes their prompts as recorded."""
    recorded = Conditioning(known["sample.prompt_embeds"][start:stop, 0])
    own = partial(type(module.policy).encode_prompts, module.policy)  # of the negative prompt, which is one
    module.policy.encode_prompts = lambda prompts: recorded if len(prompts) == len(recorded) else own(prompts)
    timesteps = known["sample.timesteps"][start:stop, 0]
    n = stop - start
    return StepPairs(
        latents=known["sample.latents"][start:stop, 0],
        chosen=known["sample.next_latents"][start:stop, 0],
        rejected=known["sample.next_latents"][start:stop, 1],
        timesteps=timesteps,
        next_timesteps=(timesteps - STEP).clamp(min=-1),
        prompts=("",) * n,
        score_gap=torch.full((n,), 0.5),
        indices=torch.arange(start, stop),
    )


@pytest.mark.parametrize("start", ["official_init", "perturbed"])
def test_three_training_steps_are_the_official_ones(golden, pipelines, start):
    known = golden(f"spo_train_step_{start}")
    module = lora_module(pipelines, known)
    optimizer = module.configure_optimizers()["optimizer"]
    calls = []
    module.policy.unet.register_forward_pre_hook(
        lambda unet, inputs: calls.append((inputs[0].shape[0], torch.is_grad_enabled()))
    )
    for step, (first, last) in enumerate([(0, 5), (5, 10), (10, 12)]):
        calls.clear()
        pairs = recorded_pairs(known, first, last, module)
        output = module.compute_loss(pairs, "train")
        optimizer.zero_grad()
        output.loss.backward()
        # One reference and one policy forward, each with guidance's two halves.
        assert calls == [(2 * len(pairs), False), (2 * len(pairs), True)]
        assert output.loss.item() == pytest.approx(known["losses"][step].item(), abs=1e-5)
        assert output.metrics["ratio_chosen"].item() == pytest.approx(known["ratio_win"][step].item(), abs=1e-5)
        assert output.metrics["ratio_rejected"].item() == pytest.approx(known["ratio_lose"][step].item(), abs=1e-5)
        if step == 0:
            gradients = {n: p.grad for n, p in module.policy.unet.named_parameters() if p.requires_grad}
            expected = {n.removeprefix("grad_step0."): g for n, g in known.items() if n.startswith("grad_step0.")}
            assert gradients.keys() == expected.keys()
            largest = max(gradient.abs().max() for gradient in expected.values())
            for name, gradient in expected.items():
                assert (gradients[name] - gradient).abs().max() <= 1e-4 * largest
        norm = torch.cat([p.grad.flatten() for p in trained_parameters(module.policy)]).norm().item()
        assert norm == pytest.approx(known["grad_norms"][step].item(), rel=1e-4)
        optimizer.step()
        prefix = f"lora_after{step}."
        after = {n.removeprefix(prefix): value for n, value in known.items() if n.startswith(prefix)}
        weights = get_peft_model_state_dict(module.policy.unet)
        if after:
            assert after.keys() == weights.keys()
            for name, value in after.items():
                torch.testing.assert_close(weights[name], value, rtol=0, atol=5e-6)
    assert after


def test_pairs_that_have_moved_apart_cost_two_rows_in_one_forward_each(golden, pipelines):
    known = golden("spo_train_step_official_init")
    module = lora_module(pipelines, known)
    calls = []
    module.policy.unet.register_forward_pre_hook(lambda unet, inputs: calls.append(inputs[0].shape[0]))
    pairs = recorded_pairs(known, 0, 3, module)
    shared = module.compute_loss(pairs, "train").loss
    doubled = module.compute_loss(replace(pairs, rejected_latents=pairs.latents), "train").loss
    assert calls == [6, 6, 12, 12]
    torch.testing.assert_close(shared, doubled, rtol=0, atol=1e-5)
