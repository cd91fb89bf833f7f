"""DMPO, DSPO, MaPO, D3PO, InPO, SmPO, the safeguard and the automatic beta: official numbers, and by hand."""

import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from objective_inputs import SCHEDULE, constant, loss_of
from tiny_world import make, trainer
from tiny_world import pairs as tiny_pairs

from datamodules.prompts import prompt_texts
from experiments.cli.compose import find_config, load
from lightning_modules.batches import Conditioning, StepPairs
from lightning_modules.errors import ConfigError
from lightning_modules.objectives import DMPO, DPO, DSPO, IPO, SFT, SPO, AutomaticBeta, MaPO, Safeguard
from lightning_modules.policies.adaptation import FullFineTuning
from lightning_modules.policies.stable_diffusion import StableDiffusion
from lightning_modules.references import AdapterOff
from lightning_modules.sampling.step_sampler import SeededDraws, StepSampler
from lightning_modules.sampling.step_scorers import RewardScorer
from lightning_modules.schedules.discrete import NoiseSchedule
from lightning_modules.shapes.reward import ShapesReward

SD15 = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}


def with_gradient(objective, known, prefix=""):
    """``objective``'s result on the known outputs, and the gradient in the policy's."""
    policy = known[f"{prefix}model_pred"].clone().requires_grad_()
    output = loss_of(objective, known[f"{prefix}target"], policy, known.get(f"{prefix}ref_pred"))
    output.loss.backward()
    return output, policy.grad


def assert_gradient(found, expected, tolerance):
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()


# ------------------------------------------------------------------------------------------- against official code


@pytest.mark.parametrize(
    ("case", "objective"),
    [
        ("", DMPO()),
        ("beta6000.", DMPO(beta=6000.0)),
        ("alpha0.1.", DMPO(alpha=0.1)),
        ("alpha0.", DMPO(alpha=1e-6)),  # to where the official code clamps 0
    ],
)
def test_dmpo_is_the_official_loss(golden, case, objective):
    known = golden("dmpo_loss")
    output, gradient = with_gradient(objective, known)
    torch.testing.assert_close(output.loss.double(), known[f"{case}loss_fp64"], rtol=5e-5, atol=5e-5)
    assert_gradient(gradient, known[f"{case}grad_model_pred_fp64"], 1e-4)
    if case != "alpha0.":  # whose fp32 loses 1 - (1 - 1e-6)
        torch.testing.assert_close(output.loss, known[f"{case}loss"], rtol=5e-5, atol=5e-5)
        assert_gradient(gradient, known[f"{case}grad_model_pred"], 1e-4)
    torch.testing.assert_close(output.metrics["accuracy"], known[f"{case}implicit_acc"])
    inside = known[f"{case}inside_term_fp64"].mean().float()
    torch.testing.assert_close(output.metrics["reward_margin"], inside, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("case", "beta"), [("", 0.001), ("beta0.05.", 0.05), ("beta5.", 5.0)])
def test_dspo_is_the_official_loss_of_sd15(golden, case, beta):
    known = golden("dspo_loss")
    output, gradient = with_gradient(DSPO(beta), known)
    torch.testing.assert_close(output.loss, known[f"{case}loss"], rtol=0, atol=1e-6)
    torch.testing.assert_close(output.loss.double(), known[f"{case}loss_fp64"], rtol=0, atol=1e-6)
    for twin in ("", "_fp64"):
        expected = known[f"{case}grad_model_pred{twin}"]
        assert_gradient(gradient, expected, 1e-5)
        if beta == 5:  # else what the rejected pictures are taught is lost beside the chosen ones'
            assert_gradient(gradient[4:], expected[4:], 1e-4)
    torch.testing.assert_close(output.metrics["accuracy"], known[f"{case}implicit_acc"])


def test_dspo_at_its_default_beta_is_sft(golden):
    known = golden("dspo_loss")
    _, gradient = with_gradient(DSPO(), known)
    chosen = known["model_pred"][:4].clone().requires_grad_()
    loss_of(SFT(), known["target"][:4], chosen, None).loss.backward()
    assert_gradient(gradient[:4], chosen.grad, 1e-3)
    assert gradient[4:].abs().max() < 1e-8 * gradient[:4].abs().max()
    _, bent = with_gradient(DSPO(beta=5.0), known)
    assert (bent[:4] - chosen.grad).abs().max() > 0.1 * chosen.grad.abs().max()


@pytest.mark.parametrize(("case", "objective"), [("", MaPO()), ("beta0.5_c1.", MaPO(beta=0.5, scale=1.0))])
def test_mapo_is_the_official_loss_in_fp64(golden, case, objective):
    known = golden("mapo_loss")
    output, gradient = with_gradient(objective, known)
    torch.testing.assert_close(output.loss.double(), known[f"{case}loss_fp64"], rtol=2e-5, atol=0)
    assert_gradient(gradient, known[f"{case}grad_model_pred_fp64"], 1e-4)
    margin = 1000 * (known[f"{case}win_score_fp64"] - known[f"{case}lose_score_fp64"]).mean()
    torch.testing.assert_close(output.metrics["margin"].double(), margin, rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(output.metrics["chosen_error"], known["model_losses_w"].mean())
    torch.testing.assert_close(output.metrics["rejected_error"], known["model_losses_l"].mean())


@pytest.mark.parametrize("mu", [0.0, 0.2, 0.6, 0.9, 1.0])
@pytest.mark.parametrize("residuals", ["aligned", "weak", "opposed"])
def test_the_safeguard_allows_the_official_share(golden, residuals, mu):
    known = golden("sdpo_loss")
    shares = Safeguard(DPO(), mu).shares(known[f"{residuals}.model_pred"] - known[f"{residuals}.target"])
    assert shares.shape == (4,)
    for twin in ("", "_fp64"):
        expected = known[f"{residuals}.mu{mu}.lambda{twin}"].expand(4)
        torch.testing.assert_close(shares.to(expected.dtype), expected, rtol=1e-5, atol=1e-5)


SAFEGUARDED = {
    "dpo": (DPO(beta=5000.0), 0.9),
    "dpo_mu0.2": (DPO(beta=2000.0), 0.2),
    "dspo": (DSPO(), 0.2),
    "dspo_beta5": (DSPO(beta=5.0), 0.2),
    "dmpo": (DMPO(), 0.9),
}
KNOWN = [("aligned", case) for case in SAFEGUARDED]
KNOWN += [("weak", case) for case in ("dpo", "dpo_mu0.2", "dspo")] + [("opposed", "dpo"), ("opposed", "dmpo")]


@pytest.mark.parametrize(("residuals", "case"), KNOWN)
def test_the_safeguarded_losses_are_the_official_ones(golden, residuals, case):
    known, (objective, mu) = golden("sdpo_loss"), SAFEGUARDED[case]
    output, gradient = with_gradient(Safeguard(objective, mu), known, f"{residuals}.")
    for twin in ("", "_fp64"):
        expected = known[f"{residuals}.{case}.loss{twin}"]
        torch.testing.assert_close(output.loss.to(expected.dtype), expected, rtol=1e-5, atol=1e-5)
        gradients = known[f"{residuals}.{case}.grad_model_pred{twin}"]
        assert_gradient(gradient, gradients, 1e-4)
        if objective != DSPO():
            assert_gradient(gradient[4:], gradients[4:], 1e-4)


@pytest.mark.parametrize(("case", "beta"), [("", 0.1), ("beta10.", 10.0)])
def test_spo_on_whole_trajectories_is_the_official_d3po(golden, case, beta):
    """Of the five pairs of steps one is a tie: ln 2 without gradient there, and left out of the pool here."""
    known = golden("d3po_loss")
    decided = known["human_prefer"][:, 0] != 0
    first = known["human_prefer"][decided][:, 0] > 0

    def sides(name):
        one, other = known[f"{name}_0"][decided], known[f"{name}_1"][decided]
        flag = first.reshape(-1, *[1] * (one.ndim - 1))
        return one.where(flag, other), other.where(flag, one)

    chosen_from, rejected_from = sides("x_t")
    timesteps = known["timesteps"][decided]
    pairs = StepPairs(
        chosen_from, *sides("x_prev"), timesteps, (timesteps - 50).clamp(min=-1), ("a",) * 4, torch.ones(4),
        torch.arange(4), rejected_from,
    )  # fmt: skip
    schedule = NoiseSchedule.from_scheduler_config(SD15)
    objective = SPO(beta=beta)
    query = objective.query(pairs, Conditioning(torch.zeros(4, 1, 1)), schedule, [])
    policy = torch.cat(sides("noise_pred")).requires_grad_()
    output = objective.loss(pairs, query, policy, torch.cat(sides("noise_ref_pred")), schedule)
    output.loss.backward()
    for twin in ("", "_fp64"):
        whole = known[f"{case}loss{twin}"]
        found = (4 * output.loss.to(whole.dtype) + math.log(2)) / 5
        torch.testing.assert_close(found, whole, rtol=0, atol=1e-5)
        official = [known[f"{case}grad_noise_pred_{i}{twin}"] for i in (0, 1)]
        assert all(gradient[~decided].abs().max() == 0 for gradient in official)
        one, other = (gradient[decided] for gradient in official)
        flag = first.reshape(-1, 1, 1, 1)
        expected = torch.cat([one.where(flag, other), other.where(flag, one)]) * 5 / 4
        assert_gradient(policy.grad, expected, 1e-4)


@pytest.mark.parametrize(("case", "beta"), [("inpo", 2000.0), ("inpo_beta5000", 5000.0), ("smpo", 2000.0)])
def test_dpo_on_inverted_latents_is_the_official_inpo_and_smpo(golden, case, beta):
    """InPO is DPO with the noise that inverted latents imply; SmPO multiplies its argument by 10 (2 p - 1)."""
    known = golden("inpo_smpo_loss")
    schedule = NoiseSchedule.from_scheduler_config(SD15)
    alphas = schedule.alphas_cumprod.double()[known["timesteps"]].reshape(-1, 1, 1, 1)
    implied = (known["inverted"].double() - alphas.sqrt() * known["clean"].double()) / (1 - alphas).sqrt()
    torch.testing.assert_close(implied, known["implied_noise_fp64"], rtol=0, atol=1e-6)
    sharpness = 10 * (2 * known["smpo.prob"].item() - 1) if case == "smpo" else 1.0
    inputs = {"model_pred": known["model_pred"], "ref_pred": known["ref_pred"], "target": known["implied_noise"]}
    output, gradient = with_gradient(DPO(beta=beta * sharpness), inputs)
    torch.testing.assert_close(output.loss, known[f"{case}.loss"], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(output.loss.double(), known[f"{case}.loss_fp64"], rtol=1e-5, atol=1e-5)
    assert_gradient(gradient, known[f"{case}.grad_model_pred"], 1e-6)


# ------------------------------------------------------------------------------------------- by hand


def test_dmpo_by_hand():
    """u = 0: 1/2 ln(1/2 / 0.9) + 1/2 ln(1/2 / 0.1); at u = ln 9 the two are one; beyond it, pulled back."""
    same = (constant(0.0, 0.0), constant(1.0, 1.0), constant(1.0, 1.0))
    expected = 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1)
    assert loss_of(DMPO(alpha=0.1), *same).loss.item() == pytest.approx(expected, abs=1e-6)
    # m = (4 - 1) - (0 - 0) = 3: beta 2 ln(9) / 3 gives u = ln 9.
    inputs = (constant(0.0, 0.0), constant(0.0, 2.0), constant(0.0, 1.0))
    assert loss_of(DMPO(beta=2 * math.log(9) / 3, alpha=0.1), *inputs).loss.item() == pytest.approx(0, abs=1e-6)
    rejected = constant(0.0, 2.0).requires_grad_()
    loss_of(DMPO(beta=4 * math.log(9) / 3, alpha=0.1), inputs[0], rejected, inputs[2]).loss.backward()
    assert rejected.grad[1].item() > 0  # a step down lowers the rejected error, and with it the margin


@pytest.mark.parametrize(("margin", "expected"), [(81.0, -math.log(0.99)), (-81.0, -math.log(0.01))])
def test_dmpo_stays_finite_far_out(margin, expected):
    """u = +-202500: p is 1 or 0, and one of its two terms is left."""
    inputs = (constant(0.0, 0.0), constant(*((0.0, 9.0) if margin > 0 else (9.0, 0.0))), constant(0.0, 0.0))
    policy = inputs[1].requires_grad_()
    output = loss_of(DMPO(beta=5000.0), inputs[0], policy, inputs[2])
    output.loss.backward()
    assert output.loss.item() == pytest.approx(expected, rel=1e-6)
    assert policy.grad.isfinite().all()


def test_dspo_by_hand():
    """o 1, o_ref 3, target 0 on the chosen picture; m = 0 - (1 - 9) = 8, u = 0.8: o - 0 - 0.2 sigmoid(-0.8) (1 - 3)."""
    output = loss_of(DSPO(beta=0.2), constant(0.0, 0.0), constant(1.0, 2.0), constant(3.0, 2.0))
    bend = 0.2 / (1 + math.exp(0.8)) * -2
    assert output.metrics["reward_margin"].item() == pytest.approx(0.8, abs=1e-6)
    assert output.loss.item() == pytest.approx((1 - bend) ** 2, abs=1e-6)


def test_mapo_by_hand():
    """Errors 1 and 4, c = 1/2: f(1/2) - f(2), 1000 times, is far above 0: only the chosen error stays. And swapped."""
    output = loss_of(MaPO(beta=0.2), constant(0.0, 0.0), constant(1.0, 2.0), None)
    assert output.loss.item() == pytest.approx(1, abs=1e-6)
    assert output.metrics["accuracy"].item() == 1
    swapped = loss_of(MaPO(beta=0.2), constant(0.0, 0.0), constant(2.0, 1.0), None)
    margin = 1000 * (0.5 / (math.exp(0.5) - 1) - 2 / (math.exp(2) - 1))
    assert swapped.metrics["margin"].item() == pytest.approx(-margin, rel=1e-5)
    assert swapped.loss.item() == pytest.approx(4 + 0.2 * margin, rel=1e-5)


def test_mapo_is_finite_at_an_error_of_0_and_keeps_its_gradient():
    policy = constant(0.0, 0.0).requires_grad_()
    output = loss_of(MaPO(), constant(0.0, 0.0), policy, None)
    output.loss.backward()
    assert output.loss.item() == pytest.approx(0.1 * math.log(2), abs=1e-6)
    assert policy.grad.abs().max() == 0


def test_the_safeguard_by_hand():
    """d_w 2, d_l 1 and d_w 1, d_l 3 as two pairs: |d_w|^2 5, inner 5; a pair: 4 / 2 and 1 / 3. mu 1/2."""
    residuals = constant(2.0, 1.0, 1.0, 3.0)
    torch.testing.assert_close(Safeguard(DPO(), 0.5).shares(residuals), torch.tensor([0.5, 0.5]))
    torch.testing.assert_close(Safeguard(DPO(), 0.5, "pair").shares(residuals), torch.tensor([1.0, 1 / 6]))
    opposed = constant(2.0, 1.0, -1.0, 3.0)  # inner 1: 2.5 is held to 1; the first pair alone is opposed
    torch.testing.assert_close(Safeguard(DPO(), 0.5).shares(opposed), torch.tensor([1.0, 1.0]))
    torch.testing.assert_close(Safeguard(DPO(), 0.5, "pair").shares(opposed), torch.tensor([1.0, 1 / 6]))


def test_the_safeguard_leaves_the_value_and_the_chosen_gradient():
    target, policy, reference = torch.randn(3, 4, 4, 2, 2, generator=torch.Generator().manual_seed(1))
    policy[2:] += 2 * policy[:2]  # residuals that point alike
    known = {"target": target, "model_pred": policy, "ref_pred": reference}
    plain, without = with_gradient(DPO(beta=3.0), known)
    output, held = with_gradient(Safeguard(DPO(beta=3.0), per="pair"), known)
    assert torch.equal(output.loss, plain.loss)
    assert torch.equal(held[:2], without[:2])
    shares = Safeguard(DPO(), per="pair").shares(policy - target)
    assert (shares < 1).any()
    torch.testing.assert_close(held[2:], shares.reshape(-1, 1, 1, 1) * without[2:])
    torch.testing.assert_close(output.metrics["safeguard"], shares.mean())


@pytest.mark.parametrize("per", ["pair", "batch"])
def test_accumulation_changes_the_safeguard_of_a_batch_and_not_that_of_a_pair(per):
    generator = torch.Generator().manual_seed(2)
    target, policy, reference = torch.randn(3, 4, 4, 2, 2, generator=generator)
    policy[2:] += 2 * policy[:2]
    objective = Safeguard(DPO(beta=3.0), per=per)
    _, together = with_gradient(objective, {"target": target, "model_pred": policy, "ref_pred": reference})
    alone = torch.zeros_like(together)
    for pair in ([0, 2], [1, 3]):
        inputs = {"target": target[pair], "model_pred": policy[pair], "ref_pred": reference[pair]}
        alone[pair] = with_gradient(objective, inputs)[1] / 2
    assert torch.allclose(alone, together, atol=1e-7) == (per == "pair")


# ------------------------------------------------------------------------------------------- automatic beta


def observed(objective, *sizes):
    for size in sizes:
        objective.observe({"margin_size": size})
    return objective


def test_automatic_beta_gives_a_mean_margin_the_gradient_asked_for():
    """After a mean |m| of 0.5, beta is 2 ln 4 / 0.5, and a pair of margin 0.5 weighs sigmoid(-beta 0.5 / 2) = 0.2."""
    objective = observed(AutomaticBeta(DPO(), highest=100.0), 0.5)
    inputs = (constant(0.0, 0.0), constant(0.0, 0.5**0.5), constant(0.0, 0.0))
    output = loss_of(objective, *inputs)
    assert output.metrics["beta"].item() == pytest.approx(2 * math.log(4) / 0.5, rel=1e-6)
    assert output.loss.item() == pytest.approx(-math.log(0.8), rel=1e-6)
    assert output.metrics["margin_size"].item() == pytest.approx(0.5)
    expected = loss_of(DPO(beta=2 * math.log(4) / 0.5), *inputs)
    torch.testing.assert_close(output.loss, expected.loss)


def test_automatic_beta_follows_the_mean_over_steps_and_starts_with_the_first_that_is_not_0():
    objective = observed(AutomaticBeta(DPO(), decay=0.75, lowest=1e-9, highest=1e9), 0.0, 0.5, 1.5, math.inf, math.nan)
    assert objective.beta(1) == pytest.approx(2 * math.log(4) / (0.75 * 0.5 + 0.25 * 1.5))


@pytest.mark.parametrize(("sizes", "beta"), [((), 16.0), ((1e-9,), 16.0), ((1e9,), 16 * 0.001)])
def test_automatic_beta_keeps_within_bounds_of_summed_errors(sizes, beta):
    """Latents of 16 numbers."""
    assert observed(AutomaticBeta(DPO()), *sizes).beta(16) == pytest.approx(beta)
    target = torch.zeros(2, 4, 2, 2)
    output = loss_of(observed(AutomaticBeta(DPO()), *sizes), target, target, target)
    assert output.metrics["beta"].item() == pytest.approx(beta)


def test_automatic_beta_is_kept_and_restored():
    one = observed(AutomaticBeta(DMPO()), 0.3, 0.2)
    other = AutomaticBeta(DMPO())
    guarded = Safeguard(other)
    guarded.load_state_dict(one.state_dict())
    assert other.beta(64) == one.beta(64) == pytest.approx(2 * math.log(4) / (0.99 * 0.3 + 0.01 * 0.2))
    observed(guarded, 0.9)
    observed(one, 0.9)
    assert guarded.state_dict() == one.state_dict() == {"margin_size": pytest.approx(0.99 * 0.299 + 0.009)}
    with pytest.raises(ConfigError, match="keeps margin_size of its objective, and DPO keeps nothing"):
        DPO().load_state_dict(one.state_dict())


def test_automatic_beta_says_that_it_begins_anew(caplog):
    objective = observed(AutomaticBeta(DPO()), 0.3)
    objective.load_state_dict({})
    assert objective.beta(16) == 16
    assert "holds no mean of margins" in caplog.text


def test_automatic_beta_moves_once_an_optimizer_step_and_is_in_the_checkpoint(pipelines, tmp_path):
    """Two batches a step: M is the mean of both batches' |m|; the first step's are 0. A new run takes it over."""
    objective = AutomaticBeta(DPO())
    module = make(pipelines, reference=AdapterOff(), objective=objective)
    seen = []
    module.on_train_batch_end = lambda *_: seen.append(objective.state_dict())  # type: ignore[method-assign]
    running = trainer(tmp_path, max_epochs=1, accumulate_grad_batches=2)
    running.fit(module, tiny_pairs(batches=6))
    assert seen[:3] == [{}, {}, {}]
    assert seen[3] == seen[4] != seen[5]
    sizes = running.callback_metrics["train/margin_size"].item()
    assert seen[5]["margin_size"] == pytest.approx(0.99 * seen[3]["margin_size"] + 0.01 * sizes)
    running.save_checkpoint(tmp_path / "run.ckpt")
    other = AutomaticBeta(DPO())
    resumed = make(pipelines, reference=AdapterOff(), objective=other)
    trainer(tmp_path, max_epochs=1).fit(
        resumed, tiny_pairs(batches=6), ckpt_path=tmp_path / "run.ckpt", weights_only=True
    )
    assert other.state_dict() == seen[5]


@pytest.mark.parametrize(
    ("make_objective", "message"),
    [
        (lambda: DMPO(beta=0.0), "objective.beta must be above 0, got 0.0"),
        (lambda: DMPO(alpha=0.0), "objective.alpha must lie in"),
        (lambda: DMPO(alpha=0.5), "objective.alpha must lie in"),
        (lambda: DSPO(beta=0.0), "objective.beta must be above 0, got 0.0"),
        (lambda: MaPO(beta=-1.0), "objective.beta must be above 0, got -1.0"),
        (lambda: MaPO(scale=0.0), "objective.scale must be above 0, got 0.0"),
        (lambda: Safeguard(DPO(), mu=1.1), r"objective.mu must lie in \[0, 1\], got 1.1"),
        (lambda: Safeguard(MaPO()), "compares pairs with a reference, such as DPO, and MaPO does not"),
        (lambda: Safeguard(SFT()), "compares pairs with a reference, such as DPO, and SFT does not"),
        (lambda: AutomaticBeta(SFT()), "and SFT does not"),
        (lambda: AutomaticBeta(IPO()), "AutomaticBeta sets beta, and IPO has none; use DPO or DMPO"),
        (lambda: AutomaticBeta(Safeguard(DPO())), "AutomaticBeta sets beta, and Safeguard has none"),
        (lambda: AutomaticBeta(DPO(), gradient_share=0.5), "gradient_share in"),
        (lambda: AutomaticBeta(DPO(), decay=1.0), "decay in"),
        (lambda: AutomaticBeta(DPO(), lowest=2.0), "lowest <= highest"),
        (lambda: AutomaticBeta(DPO(), lowest=0.0), "lowest <= highest"),
    ],
)  # fmt: skip
def test_settings_without_meaning_are_refused(make_objective, message):
    with pytest.raises(ConfigError, match=message):
        make_objective()


def test_mapo_counts_the_schedules_own_timesteps():
    """The factor is the number of training timesteps, not 1000 as such."""
    inputs = (constant(0.0, 0.0), constant(1.0, 1.5), None)
    short = replace(SCHEDULE, alphas_cumprod=SCHEDULE.alphas_cumprod[:500])
    margins = [loss_of(MaPO(), *inputs, schedule=schedule).metrics["margin"].item() for schedule in (short, SCHEDULE)]
    assert margins[0] == pytest.approx(margins[1] / 2)


def test_the_readmes_table_of_methods_counts_each_files_lines():
    root = Path(__file__).parent.parent
    pattern = r"\[(\w+\.py)\]\((lightning_modules/objectives/\w+\.py)\), (\d+)"
    rows = re.findall(pattern, (root / "README.md").read_text())
    assert len(rows) >= 9
    for name, path, lines in rows:
        assert (root / path).name == name
        assert len((root / path).read_text().splitlines()) == int(lines), path


def test_d3po_tiny_makes_twenty_pairs_of_each_prompts_two_finished_pictures():
    """The config's sampler, with the world's reward: the first pair shares x_T, one label is on all of a prompt's."""
    tree = load(find_config("d3po_tiny"))
    settings = tree["data"]["init_args"]
    sampler = StepSampler(**settings["sampler"] | {"guidance_scale": 2.0, "eta": 1.0})
    assert tree["model"]["init_args"]["objective"]["init_args"]["beta"] == 0.1
    policy = StableDiffusion("embedded/shapes", FullFineTuning())
    scorer = RewardScorer(ShapesReward())
    texts = prompt_texts("embedded/prompts/shapes_train.txt")[:2]
    rollout = sampler.sample(policy, scorer, texts, SeededDraws(1, 0, [0, 1]))
    assert len(rollout.comparisons) == 2
    assert rollout.decodes == 4
    assert rollout.unet_evaluations == 2 * 2 * (1 + 19 * 2)  # guidance, prompts; x_T is shared
    assert rollout.comparisons.judged_at.tolist() == [0, 0]
    valid = int(rollout.comparisons.valid.sum())
    pairs = rollout.pairs
    assert len(pairs) == 20 * valid > 0
    own = pairs.rejected_latents
    apart = (own - pairs.latents).flatten(1).abs().amax(dim=1) > 0
    first = pairs.timesteps == pairs.timesteps.max()
    assert torch.equal(apart, ~first)
    for row in set(rollout.prompt_rows.tolist()):
        mine = rollout.prompt_rows == row
        assert len(set(pairs.timesteps[mine].tolist())) == 20
        assert len(set(pairs.score_gap[mine].tolist())) == 1
        # Each step begins where the one before has ended, on either side.
        order = pairs.timesteps[mine].argsort(descending=True)
        for ends, begins in ((pairs.chosen, pairs.latents), (pairs.rejected, own)):
            assert torch.equal(ends[mine][order][:-1], begins[mine][order][1:])
