"""DPO and SPO on flows: the official code's losses and gradients, from tensors alone."""

import pytest
import torch

from lightning_modules.batches import Conditioning, LatentPairs, StepPairs
from lightning_modules.errors import ConfigError
from lightning_modules.objectives import DPO, SFT, SPO
from lightning_modules.objectives.pairwise import NoisedPairs, by_quarter
from lightning_modules.randomness import generator
from lightning_modules.schedules.flow import FlowSchedule
from lightning_modules.schedules.step_rules import CPS, FlowSDE


def pairs_of(known):
    ids = torch.zeros(len(known["chosen"]), 6)
    return LatentPairs(known["chosen"], known["rejected"], ("a",) * len(ids), ids, ids, torch.arange(len(ids)))


def noised_pairs(known, schedule):
    clean = torch.cat([known["chosen"], known["rejected"]])
    noise, timesteps = known["noise"].repeat(2, 1, 1, 1), known["timesteps"]
    return NoisedPairs(
        latents=schedule.add_noise(clean, noise, timesteps),
        timesteps=timesteps,
        cond=Conditioning(torch.zeros(len(clean), 1, 1)),
        target=schedule.target(clean, noise, timesteps),
    )


@pytest.mark.parametrize("beta", [100, 2000])
def test_flow_dpo_is_the_official_loss_and_gradient(golden, beta):
    known, schedule = golden("flow_dpo_loss"), FlowSchedule(3.0)
    query = noised_pairs(known, schedule)
    torch.testing.assert_close(schedule.at(known["u"]).repeat(2), known["timesteps"], rtol=0, atol=1e-3)
    torch.testing.assert_close(query.latents, known["noisy"], rtol=0, atol=1e-6)
    assert torch.equal(query.target, known["target"])
    policy = known["policy_velocity"].clone().requires_grad_()
    torch.testing.assert_close(query.errors(policy), known["theta_mse"], rtol=0, atol=1e-6)
    output = DPO(beta=float(beta)).loss(pairs_of(known), query, policy, known["reference_velocity"], schedule)
    torch.testing.assert_close(output.loss, known[f"beta{beta}.loss"], rtol=0, atol=1e-6)
    torch.testing.assert_close(output.loss, known[f"beta{beta}.flow_factory_loss"], rtol=0, atol=1e-6)
    torch.testing.assert_close(output.loss.double(), known[f"beta{beta}_fp64.loss"], rtol=0, atol=5e-5)
    assert output.metrics["accuracy"] == known[f"beta{beta}.accuracy"]
    output.loss.backward()
    expected = known[f"beta{beta}.grad_policy"]
    assert (policy.grad - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_pairs_of_a_flow_share_level_and_noise_and_ask_for_the_velocity():
    schedule = FlowSchedule(3.0)
    chosen, rejected = torch.randn(2, 3, 4, 2, 2, generator=generator(0))
    ids = torch.zeros(3, 6)
    batch = LatentPairs(chosen, rejected, ("a", "b", "c"), ids, ids, torch.arange(3))
    query = DPO().query(batch, Conditioning(torch.zeros(3, 1, 1)), schedule, [generator(i) for i in range(3)])
    assert torch.equal(query.timesteps, schedule.draw([generator(i) for i in range(3)]).repeat(2))
    noise = query.target[:3] + chosen
    torch.testing.assert_close(query.target[3:], noise - rejected)
    torch.testing.assert_close(
        query.latents, schedule.add_noise(torch.cat([chosen, rejected]), noise.repeat(2, 1, 1, 1), query.timesteps)
    )
    output = SFT().loss(batch, query, query.target + 0.5, None, schedule)
    assert output.loss.item() == pytest.approx(0.25)


def step_pairs(known, name, rows):
    cut = slice(rows)
    next_timesteps = 1000 * known["next_sigmas"][cut]
    return StepPairs(
        known["x_t"][cut], known[f"{name}.x_prev_win"], known[f"{name}.x_prev_lose"], known["timesteps"][cut],
        next_timesteps, ("a",) * rows, torch.full((rows,), 0.5), torch.arange(rows),
    )  # fmt: skip


@pytest.mark.parametrize(("name", "rule", "rows"), [("sde", FlowSDE(0.7), 6), ("cps", CPS(0.8), 5)])
def test_spo_on_a_flows_steps_is_the_composed_official_one(golden, name, rule, rows):
    known, schedule = golden("flow_spo_loss"), FlowSchedule(3.0, rule=rule)
    pairs = step_pairs(known, name, rows)
    policy = known["policy_velocity"][:rows].clone().requires_grad_()
    objective = SPO(normalise=False)
    query = objective.query(pairs, Conditioning(torch.zeros(rows, 1, 1)), schedule, [])
    output = objective.loss(pairs, query, policy, known["reference_velocity"][:rows], schedule)
    torch.testing.assert_close(output.loss, known[f"{name}.loss"], rtol=0, atol=5e-5)
    free = known[f"{name}.log_ratio"].exp()
    assert output.metrics["clip_fraction"].item() == pytest.approx(((free < 0.9) | (free > 1.1)).float().mean().item())
    assert output.metrics["ratio_chosen"].item() == pytest.approx(known[f"{name}.ratio"][0].mean().item(), abs=1e-5)
    output.loss.backward()
    expected = known[f"{name}.grad_policy"]
    assert (policy.grad - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_a_flows_log_ratios_are_divided_by_the_steps_gain_unless_told_otherwise(golden):
    """The same displacement of the network then gives ratios of one size at every step."""
    known, schedule = golden("flow_spo_loss"), FlowSchedule(3.0, rule=CPS(0.8))
    pairs = step_pairs(known, "cps", 5)
    query = SPO().query(pairs, Conditioning(torch.zeros(5, 1, 1)), schedule, [])
    outputs = known["policy_velocity"][:5], known["reference_velocity"][:5]
    margins = {}
    for normalise in (None, True, False):
        wide = SPO(normalise=normalise, ratio_clip=0.999)  # so that nothing is clipped from below
        metrics = wide.loss(pairs, query, *outputs, schedule).metrics
        margins[normalise] = metrics["margin"]
    assert margins[None] == margins[True] != margins[False]
    gain = schedule.gain(pairs.timesteps, pairs.next_timesteps, 1.0)
    ratios = (known["cps.log_ratio"] / gain).clamp(max=torch.tensor(1.999).log())
    torch.testing.assert_close(margins[True], (ratios[0] - ratios[1]).mean(), rtol=1e-4, atol=1e-5)


def test_the_noisiest_level_belongs_to_the_last_quarter():
    timesteps = torch.tensor([1000.0, 750.0, 749.9, 0.9])
    metrics = by_quarter({"x": torch.tensor([1.0, 2.0, 3.0, 4.0])}, timesteps, FlowSchedule())
    assert [metrics[f"x/t{name}"].item() for name in ("0-249", "500-749", "750-999")] == [4.0, 3.0, 1.5]


def test_a_certain_step_is_refused():
    one = torch.zeros(1, 4, 2, 2)
    pairs = StepPairs(one, one, one, torch.tensor([9.0]), torch.tensor([0.0]), ("a",), torch.ones(1), torch.arange(1))
    with pytest.raises(ConfigError, match="is certain"):
        SPO().query(pairs, Conditioning(torch.zeros(1, 1, 1)), FlowSchedule(), [])
