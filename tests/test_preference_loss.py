"""The preference model's criterion equals the official one, alone and over several processes."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed
import torch.multiprocessing
from jaxtyping import TypeCheckError
from torch.nn.functional import normalize

from lightning_modules.preference_loss import agreement, labels_from_scores, of_all_ranks, preference_loss


@pytest.mark.parametrize("negatives", [False, True])
def test_criterion_and_its_gradients_equal_the_official_ones(golden, negatives):
    known, form = golden("spm_loss"), f"neg{int(negatives)}"
    inputs = {
        name: known[key].clone().requires_grad_()
        for name, key in (
            ("image_0", "image_0_features"),
            ("image_1", "image_1_features"),
            ("text", "text_features"),
            ("log_logit_scale", "log_logit_scale"),
        )
    }
    loss = preference_loss(
        inputs["image_0"], inputs["image_1"], inputs["text"], inputs["log_logit_scale"].exp(),
        known["label_0"], 1 / known["num_examples_per_prompt"], negatives,
    )  # fmt: skip
    loss.backward()
    torch.testing.assert_close(loss, known[f"{form}_loss"], rtol=1e-5, atol=0)
    for name, value in inputs.items():
        expected = known[f"{form}_grad_{name}"]
        assert (value.grad - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize(
    ("argument", "value"),
    [("weights", torch.ones(1)), ("text", torch.ones(6, 1)), ("rejected", torch.ones(6, 1)), ("labels", torch.ones(1)),
     ("labels", torch.ones(6, 1)), ("logit_scale", torch.ones(1))],
)  # fmt: skip
@pytest.mark.parametrize("negatives", [False, True])
def test_what_would_be_broadcast_is_refused(argument, value, negatives):
    """Shapes are checked while tests run: a weight for all pairs, or a text of width 1, would give a wrong loss."""
    vectors, ones = normalize(torch.ones(6, 4), dim=-1), torch.ones(6)
    right = {"chosen": vectors, "rejected": vectors, "text": vectors, "logit_scale": torch.tensor(1.0),
             "labels": ones, "weights": ones, "in_batch_negatives": negatives}  # fmt: skip
    preference_loss(**right)
    with pytest.raises(TypeCheckError, match=argument):
        preference_loss(**(right | {argument: value}))


def test_a_perfect_tie_costs_nothing_and_a_coin_toss_on_a_clear_pair_costs_ln_2():
    vectors = torch.nn.functional.normalize(torch.ones(1, 4), dim=-1)
    arguments = (vectors, vectors, vectors, torch.tensor(100.0))
    tie, clear = (preference_loss(*arguments, torch.tensor([label]), torch.ones(1)) for label in (0.5, 1.0))
    assert tie.item() == pytest.approx(0, abs=1e-6)
    assert clear.item() == pytest.approx(math.log(2), abs=1e-6)


def test_swapping_pictures_and_labels_changes_nothing(golden):
    known = golden("spm_loss")
    first, second, text = known["image_0_features"], known["image_1_features"], known["text_features"]
    weights, scale = torch.ones(6), torch.tensor(7.0)
    for negatives in (False, True):
        one = preference_loss(first, second, text, scale, known["label_0"], weights, negatives)
        other = preference_loss(second, first, text, scale, known["label_1"], weights, negatives)
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("threshold", ["0.1", "0.3"])
def test_labels_from_scores_equal_the_official_ones(golden, threshold):
    known = golden("pickscore_label")
    labels = labels_from_scores(known["scores_0"], known["scores_1"], float(threshold))
    assert torch.equal(labels, known[f"thr{threshold}_label_0"])
    assert torch.equal(1 - labels, known[f"thr{threshold}_label_1"])


def test_agreement_leaves_ties_out_and_counts_indifference_half():
    margin = torch.tensor([2.0, -1.0, 0.0, 5.0])
    assert agreement(margin, torch.tensor([1.0, 0.0, 1.0, 0.5])).item() == pytest.approx(2.5 / 3)
    assert agreement(margin, torch.full((4,), 0.5)).isnan()


def half_of_the_gradient(rank, folder):
    """One of two processes: its gradient of the loss over the pairs of both, which DDP would average."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    parameter, features, targets = problem()
    own = slice(2 * rank, 2 * rank + 2)
    gathered = of_all_ranks(normalize(features[:, own] * parameter[:-1], dim=-1))
    labels, weights = of_all_ranks(targets[:, own])
    loss = preference_loss(*gathered, parameter[-1].exp(), labels, weights, in_batch_negatives=True)
    loss.backward()
    torch.save((loss.detach(), parameter.grad), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def problem():
    """Three features of four pairs, and a parameter: what scales the features, and last the logit scale."""
    source = torch.Generator().manual_seed(0)
    parameter = torch.rand(9, generator=source).requires_grad_()
    targets = torch.stack([torch.tensor([1.0, 0.5, 0.0, 1.0]), torch.tensor([1.0, 0.5, 0.2, 1.0])])
    return parameter, torch.randn(3, 4, 8, generator=source), targets


def test_two_processes_learn_what_one_process_learns_from_the_negatives_of_both(tmp_path):
    torch.multiprocessing.spawn(half_of_the_gradient, (str(tmp_path),), nprocs=2)
    parameter, features, targets = problem()
    assert torch.equal(of_all_ranks(features), features)  # alone there is nobody to gather from
    vectors = normalize(features * parameter[:-1], dim=-1)
    loss = preference_loss(*vectors, parameter[-1].exp(), *targets, in_batch_negatives=True)
    loss.backward()
    losses, gradients = zip(*[torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)])
    torch.testing.assert_close(losses[0], loss.detach())
    torch.testing.assert_close(losses[1], loss.detach())
    torch.testing.assert_close(sum(gradients) / 2, parameter.grad)


@pytest.mark.parametrize("terms", ["pair", "batch", "both", "pair_aux0.3"])
def test_lpos_criterion_is_the_same_one(golden, terms):
    """``both`` adds half of the in-batch loss; ``aux``: a pair with two timesteps weighs 0.3, but not in the mean."""
    known = golden("lrm_loss")
    names = ("image_0", "image_1", "text")
    inputs = {name: known[f"{name}_features"].clone().requires_grad_() for name in names}
    log_scale = known["log_logit_scale"].clone().requires_grad_()
    weights = 1 / known["num_examples_per_prompt"]

    def loss_of(weights, **options):
        return preference_loss(*inputs.values(), log_scale.exp(), known["label_0"], weights, **options)

    if terms == "pair_aux0.3":
        first, second = known["timesteps"].reshape(-1, 2).T
        less = torch.where(first == second, weights, 0.3 * weights)
        loss = loss_of(less) * less.sum() / weights.sum()
    else:
        pair, batch = {"pair": (1, 0), "batch": (0, 1), "both": (1, 0.5)}[terms]
        loss = pair * loss_of(weights) + batch * loss_of(weights, in_batch_negatives=True)
    loss.backward()
    torch.testing.assert_close(loss, known[f"{terms}.loss"], rtol=1e-5, atol=0)
    for name, value in (*inputs.items(), ("log_logit_scale", log_scale)):
        expected = known[f"{terms}.grad_{name}"]
        assert (value.grad - expected).abs().max() <= 1e-5 * expected.abs().max()
