"""Objectives from tensors alone: by hand, against the official code, and by their symmetries."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from objective_inputs import SCHEDULE, cond, constant, generators, loss_of, pairs

from lightning_modules.batches import LatentPairs
from lightning_modules.errors import ConfigError
from lightning_modules.objectives import DPO, IPO, SFT, Hinge
from lightning_modules.objectives.pairwise import by_quarter


@pytest.mark.parametrize("beta", [5000, 2000])
def test_dpo_is_the_official_loss(golden, beta):
    known = golden("dpo_loss")
    policy = known["model_pred"].clone().requires_grad_()
    output = loss_of(DPO(beta=float(beta)), known["target"], policy, known["ref_pred"])
    torch.testing.assert_close(output.loss, known[f"beta{beta}_loss"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(output.loss.double(), known[f"beta{beta}_loss_fp64"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(output.metrics["accuracy"], known[f"beta{beta}_implicit_acc"])
    inside = known[f"beta{beta}_inside_term_fp64"].mean().float()
    torch.testing.assert_close(output.metrics["reward_margin"], inside, rtol=1e-4, atol=1e-4)
    output.loss.backward()
    expected = known[f"beta{beta}_grad_model_pred"]
    assert (policy.grad - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize("beta", [5000, 2000])
def test_dpo_inside_term_is_the_official_one_pair_by_pair(golden, beta):
    known = golden("dpo_loss")
    for i in range(4):
        rows = [i, i + 4]
        output = loss_of(
            DPO(beta=float(beta)), known["target"][rows], known["model_pred"][rows], known["ref_pred"][rows]
        )
        inside = known[f"beta{beta}_inside_term"][i]
        torch.testing.assert_close(output.metrics["reward_margin"], inside, rtol=1e-4, atol=1e-4)


def test_dpo_margin_by_hand():
    """Errors: policy 1, 4; reference 9, 1. D = (1 - 9) - (4 - 1) = -11, m = 11."""
    output = loss_of(DPO(beta=0.1), constant(0.0, 0.0), constant(1.0, 2.0), constant(3.0, 1.0))
    assert output.metrics["margin"].item() == 11
    assert output.metrics["chosen_error_delta"].item() == -8
    assert output.metrics["rejected_error_delta"].item() == 3
    assert output.loss.item() == pytest.approx(-math.log(1 / (1 + math.exp(-0.55))), abs=1e-6)


@pytest.mark.parametrize(
    ("objective", "expected"),
    [
        (DPO(beta=0.2), math.log1p(math.exp(-0.2 * 2 / 2))),
        (IPO(tau=0.2), (2 - 1 / 0.4) ** 2),
        (Hinge(beta=0.2), 1 - 0.2 * 2),
        (Hinge(beta=0.6), 0.0),
        (IPO(tau=0.2, label_smoothing=0.25), 0.75 * (2 - 1 / 0.4) ** 2 + 0.25 * (-2 - 1 / 0.4) ** 2),
        (Hinge(beta=0.2, label_smoothing=0.25), 0.75 * 0.6 + 0.25 * 1.4),
    ],
)
def test_losses_by_hand(objective, expected):
    """Errors: policy 1, 4; reference 4, 5. m = (4 - 5) - (1 - 4) = 2."""
    output = loss_of(objective, constant(0.0, 0.0), constant(1.0, 2.0), constant(2.0, 5**0.5))
    assert output.metrics["margin"].item() == pytest.approx(2, abs=1e-6)
    assert output.loss.item() == pytest.approx(expected, abs=1e-5)
    assert ("reward_margin" in output.metrics) == isinstance(objective, DPO)


def test_label_smoothing_by_hand():
    """m = 11 with beta 0.1 and s = 0.25: 3/4 of the loss plus 1/4 of the swapped loss."""
    inputs = (constant(0.0, 0.0), constant(1.0, 2.0), constant(3.0, 1.0))
    expected = 0.75 * math.log1p(math.exp(-0.55)) + 0.25 * math.log1p(math.exp(0.55))
    assert loss_of(DPO(beta=0.1, label_smoothing=0.25), *inputs).loss.item() == pytest.approx(expected, abs=1e-6)


def test_policy_equal_to_reference_gives_ln_2_and_half_accuracy():
    output_of_both = torch.randn(6, 4, 2, 2)
    output = loss_of(DPO(), torch.randn(6, 4, 2, 2), output_of_both, output_of_both)
    assert output.loss.item() == pytest.approx(math.log(2), abs=1e-7)
    assert output.metrics["margin"].item() == 0
    assert output.metrics["accuracy"].item() == 0.5


@given(st.integers(0, 2**31), st.sampled_from([DPO(beta=3.0), IPO(tau=3.0), Hinge(beta=3.0)]))
@settings(max_examples=25, deadline=None)
def test_swapping_chosen_and_rejected_negates_the_margin(seed, objective):
    g = torch.Generator().manual_seed(seed)
    target, policy, reference = torch.randn(3, 4, 4, 2, 2, generator=g)
    swap = torch.tensor([2, 3, 0, 1])
    ahead = loss_of(objective, target, policy, reference)
    behind = loss_of(objective, target[swap], policy[swap], reference[swap])
    assert behind.metrics["margin"].item() == -ahead.metrics["margin"].item()
    assert behind.metrics["accuracy"].item() == pytest.approx(1 - ahead.metrics["accuracy"].item())


def test_dpo_stays_finite_where_log_of_sigmoid_would_not():
    output = loss_of(DPO(beta=5000.0), constant(0.0, 0.0), constant(9.0, 0.0), constant(0.0, 0.0))
    assert output.loss.item() == pytest.approx(0.5 * 5000 * 81, rel=1e-6)


def test_dpo_query_shares_noise_and_timestep_and_keeps_each_pictures_time_ids():
    batch = pairs()
    query = DPO().query(batch, cond(), SCHEDULE, generators())
    chosen, rejected = query.latents.chunk(2)
    t = query.timesteps[:3]
    assert torch.equal(query.timesteps[3:], t)
    assert torch.equal(*query.target.chunk(2))
    signal = SCHEDULE.alphas_cumprod[t].sqrt().reshape(-1, 1, 1, 1)
    torch.testing.assert_close(chosen - rejected, signal * (batch.chosen - batch.rejected), rtol=1e-4, atol=1e-5)
    assert torch.equal(query.cond.time_ids, torch.cat([batch.chosen_time_ids, batch.rejected_time_ids]))
    assert torch.equal(query.cond.embeds, cond().embeds.repeat(2, 1, 1))


@pytest.mark.parametrize("objective", [SFT(), DPO()])
def test_draws_of_a_pair_do_not_depend_on_its_batch(objective):
    """Pair 1 alone looks exactly where it looks as the middle of three."""
    together = objective.query(pairs(), cond(), SCHEDULE, generators())
    batch = pairs()
    alone = LatentPairs(
        batch.chosen[1:2], batch.rejected[1:2], ("a",), batch.chosen_time_ids[1:2], batch.rejected_time_ids[1:2],
        batch.indices[1:2],
    )  # fmt: skip
    one = objective.query(alone, cond()[1:2], SCHEDULE, generators()[1:2])
    assert torch.equal(one.latents[0], together.latents[1])
    assert torch.equal(one.timesteps[0], together.timesteps[1])


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("objective", [SFT(), DPO()])
def test_the_target_is_what_the_schedule_says(objective, prediction_type):
    """A network that answers with the target has error 0."""
    schedule = replace(SCHEDULE, prediction_type=prediction_type)
    query = objective.query(pairs(), cond(), schedule, generators())
    clean, _ = schedule.predict_clean(query.target, query.latents, query.timesteps)
    torch.testing.assert_close(clean[:3], pairs().chosen, rtol=1e-3, atol=1e-3)
    output = objective.loss(pairs(), query, query.target, query.target, schedule)
    assert output.metrics["chosen_error"].item() == 0


def test_sft_by_hand():
    """Errors 1 and 9: their mean is 5."""
    query = SFT().query(pairs(2), cond(2), SCHEDULE, generators(2))
    output = SFT().loss(pairs(2), query, query.target + constant(1.0, 3.0), None, SCHEDULE)
    assert output.loss.item() == pytest.approx(5, abs=1e-5)


def test_metrics_by_quarter_speak_of_their_own_pairs_only():
    """m = 3 at t = 10 and m = -1 at t = 600; the other quarters are empty."""
    policy, reference = constant(1.0, 2.0, 2.0, 1.0), constant(0.0, 0.0, 0.0, 0.0)
    reference = constant(1.0, 1.0, 1.0, 1.0)
    output = loss_of(DPO(), constant(0.0, 0.0, 0.0, 0.0), policy, reference, torch.tensor([10, 600, 10, 600]))
    assert output.metrics["margin/t0-249"].item() == 3
    assert output.metrics["accuracy/t0-249"].item() == 1
    assert output.metrics["margin/t500-749"].item() == -3
    assert output.metrics["margin/t250-499"].isnan()
    assert output.metrics["margin/t750-999"].isnan()


@pytest.mark.parametrize(
    ("t", "quarter"),
    [(0, "t0-249"), (249, "t0-249"), (250, "t250-499"), (499, "t250-499"), (500, "t500-749"), (749, "t500-749"),
     (750, "t750-999"), (999, "t750-999")],
)  # fmt: skip
def test_a_quarter_begins_where_the_one_before_ends(t, quarter):
    values = by_quarter({"margin": torch.tensor([2.0])}, torch.tensor([t]), SCHEDULE)
    assert [name for name, value in values.items() if not value.isnan()] == [f"margin/{quarter}"]


@pytest.mark.parametrize("kind", [DPO, IPO, Hinge])
@pytest.mark.parametrize("value", [0.0, -1.0])
def test_settings_without_meaning_are_refused(kind, value):
    name = "tau" if kind is IPO else "beta"
    with pytest.raises(ConfigError, match=f"objective.{name} must be above 0, got {value}"):
        kind(**{name: value})
    with pytest.raises(ConfigError, match="objective.label_smoothing must lie in"):
        kind(label_smoothing=0.5)
