"""A step that would spoil the weights leaves no trace, whoever saw it; a run of nothing else ends."""

import logging

import pytest
import torch
from kill_harness import Order
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.plugins.precision import MixedPrecision
from tiny_world import make, pairs, trained_parameters, trainer
from torch.utils.data import DataLoader

from callbacks.loss_guard import LossGuard
from lightning_modules.errors import ConfigError, DivergenceError
from lightning_modules.references import AdapterOff
from lightning_modules.weights.averaging import ExponentialMovingAverage


class SpoilsGradient(Callback):
    """One weight's gradient, in the batch that holds a certain sample."""

    def __init__(self, sample, factor):
        self.sample, self.factor, self.here = sample, factor, False

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.here = self.sample in batch.indices.tolist()

    def on_after_backward(self, trainer, module):
        if self.here:
            next(iter(trained_parameters(module.policy))).grad.view(-1)[0] = self.factor


def batches(*numbers, spoiled=None):
    chosen = [batch for n, batch in enumerate(pairs(max(numbers) + 1)) if n in numbers]
    for batch in chosen:
        if spoiled in batch.indices.tolist():
            batch.chosen[batch.indices.tolist().index(spoiled)] = torch.nan
    return DataLoader(chosen, batch_size=None)


def fit(pipelines, folder, data, *callbacks, guard=None, **options):
    module = make(pipelines, reference=AdapterOff())
    guard = guard or LossGuard()
    running = trainer(folder, guard, *callbacks, **({"max_epochs": 1} | options))
    running.fit(module, data)
    return module, running, guard


def state(module, running):
    """What a step changes: trained weights and the optimizer's moments and counts."""
    moments = running.optimizers[0].state_dict()["state"]
    found = [parameter.detach() for parameter in trained_parameters(module.policy)]
    return [*found, *(value for entry in moments.values() for value in entry.values())]


# ------------------------------------------------------------------------------------------- a step


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("a sample", "the loss is not finite (samples 4, 5)"),
        ("a gradient", "the gradient is not finite (samples 4, 5, 6, 7)"),
        ("a limit", "the gradient's norm is above 1000.0 (samples 4, 5, 6, 7)"),
    ],
)
def test_a_faulty_step_leaves_no_trace_but_its_count(pipelines, tmp_path, caplog, fault, reason):
    """Three steps of two accumulated batches, the middle one faulty, against the other two alone."""
    data = batches(0, 1, 2, 3, 4, 5, spoiled=5 if fault == "a sample" else None)
    value = {"a sample": None, "a gradient": torch.nan, "a limit": 1e4}[fault]
    spoilers = [] if value is None else [SpoilsGradient(6, value)]
    guard = LossGuard(max_gradient_norm=1000.0 if fault == "a limit" else None)
    with caplog.at_level(logging.WARNING, "callbacks.loss_guard"):
        module, running, _ = fit(
            pipelines, tmp_path, data, *spoilers, guard=guard, accumulate_grad_batches=2, gradient_clip_val=1.0
        )
    without, shorter, _ = fit(
        pipelines, tmp_path, batches(0, 1, 4, 5), accumulate_grad_batches=2, gradient_clip_val=1.0
    )
    assert all(torch.equal(one, other) for one, other in zip(state(module, running), state(without, shorter)))
    assert (running.global_step, shorter.global_step) == (3, 2)
    assert (guard.skipped, guard.in_a_row) == (1, 0)
    assert running.logged_metrics["train/skipped_steps"] == 1
    assert running.logged_metrics["train/gradient_norm"] > 0
    messages = [record.getMessage() for record in caplog.records if record.name == "callbacks.loss_guard"]
    assert messages == [f"optimizer step 1 is left out, 1 so far: {reason}"]


def test_nothing_but_faulty_steps_ends_the_run_in_one_line(pipelines, tmp_path):
    """Spoiled weights of an attention: torch's, on a CPU, gives 0 for them, so that the gradient alone tells."""
    module = make(pipelines, reference=AdapterOff())
    with torch.no_grad():
        next(iter(trained_parameters(module.policy))).fill_(torch.nan)
    before = [parameter.detach().nan_to_num(7.0) for parameter in trained_parameters(module.policy)]
    guard = LossGuard(max_in_a_row=3)
    running = trainer(tmp_path, guard, max_epochs=1)
    with pytest.raises(
        DivergenceError, match=r"^3 optimizer steps in a row .* step 2: the gradient .* \(samples 4, 5\);"
    ):
        running.fit(module, pairs(8))
    after = [parameter.detach().nan_to_num(7.0) for parameter in trained_parameters(module.policy)]
    assert all(torch.equal(one, other) for one, other in zip(before, after))


@pytest.mark.parametrize(("setting", "value"), [("max_in_a_row", 0), ("max_gradient_norm", 0.0)])
def test_settings_out_of_range(setting, value):
    with pytest.raises(ConfigError, match=f"LossGuard.{setting} must be"):
        LossGuard(**{setting: value})


# -------------------------------------------------------------------------------------- two processes


def test_a_fault_on_one_rank_is_left_out_on_all(pipelines, tmp_path, harness):
    log = tmp_path / "log"
    outcome = harness.run(Order([str(pipelines), str(tmp_path)], str(log), str(tmp_path), "guarded_ranks", ranks=2))
    assert list(outcome.codes) == [0, 0], log.read_text()
    found = {
        name: [torch.load(tmp_path / name / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]
        for name in ("faulty", "without")
    }
    assert [skipped for skipped, _ in found["faulty"]] == [1, 1]
    assert [skipped for skipped, _ in found["without"]] == [0, 0]
    expected = found["without"][0][1]
    for _, values in found["faulty"]:
        assert all(torch.equal(one, other) for one, other in zip(values, expected))


# ----------------------------------------------------------------------- averages, scaler, checkpoints


class Line(LightningModule):
    """One weight w, loss x w, so that its gradient is x; with x in fp16, x x w in fp16. Adam decays w, too."""

    def __init__(self, fused=False, start=1.0):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.full((1,), start))
        self.fused = fused

    def training_step(self, x, batch_idx):
        if x.dtype == torch.half:
            return (self.weight.half() * x * x).float().sum()
        return (self.weight * x).sum()

    def configure_optimizers(self):
        return torch.optim.AdamW([self.weight], lr=0.1, weight_decay=0.1, fused=self.fused)


def follow(folder, values, *callbacks, module=None, **options):
    module = module or Line()
    guard = LossGuard(max_in_a_row=3, max_gradient_norm=100.0)
    running = trainer(folder, guard, *callbacks, **({"max_epochs": 1} | options))
    running.fit(module, DataLoader(list(values), batch_size=None))
    return module, guard


NAN = float("nan")


def test_an_average_does_not_take_in_unchanged_weights(pipelines, tmp_path):
    averages = []
    for data in (batches(0, 1, 2, spoiled=2), batches(0, 2)):
        module = make(pipelines, reference=AdapterOff(), ema=ExponentialMovingAverage(0.5))
        trainer(tmp_path, LossGuard(), max_epochs=1).fit(module, data)
        averages.append(module.ema)
    assert averages[0].steps == averages[1].steps == 2
    assert all(torch.equal(*values) for values in zip(*(average.weights.values() for average in averages)))


def test_counts_survive_a_restart_and_a_good_step_ends_a_row(tmp_path):
    module = Line()
    running = trainer(tmp_path, LossGuard(max_in_a_row=3), max_steps=4)
    running.fit(module, DataLoader([torch.tensor(x) for x in (NAN, 1.0, NAN, NAN)], batch_size=None))
    running.save_checkpoint(tmp_path / "last.ckpt")
    guard = LossGuard(max_in_a_row=3)
    again = trainer(tmp_path, guard, max_epochs=2)
    data = DataLoader([torch.tensor(NAN)], batch_size=None)
    with pytest.raises(DivergenceError, match="3 optimizer steps in a row"):
        again.fit(Line(), data, ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    assert guard.skipped == 4


def half(scale):
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=scale))


@pytest.mark.parametrize("fused", [False, True])
def test_a_scaler_that_looks_for_its_scale_is_not_at_fault_but_an_overflow_without_scale_is(tmp_path, fused):
    """Above 65504 fp16 ends: a gradient of 8 x 8 overflows at scale 1024 and not at 512, one of 3e4 x 3e4 always."""
    x = torch.tensor(8.0, dtype=torch.half)
    module, guard = follow(tmp_path, [x, x, x], module=Line(fused), plugins=[half(1024.0)])
    expected, _ = follow(tmp_path, [x, x], module=Line(fused), plugins=[half(512.0)])
    assert guard.skipped == 0
    assert torch.equal(module.weight, expected.weight)

    module = Line(fused, start=0.0)
    with pytest.raises(DivergenceError, match="3 optimizer steps .* the last is step 4: the gradient is not finite"):
        # At scale 4 and 2 the scaler's own, at 1 and below faults.
        follow(tmp_path, [torch.tensor(3e4, dtype=torch.half)] * 9, module=module, plugins=[half(4.0)])
    assert module.weight.item() == 0.0


@pytest.mark.parametrize("fused", [False, True])
def test_a_limit_holds_with_a_scaler(tmp_path, fused):
    """The norm is of the gradient as it is, not as it is scaled."""
    module, guard = follow(tmp_path, torch.tensor([50.0, 150.0, 50.0]), module=Line(fused), plugins=[half(1024.0)])
    other, _ = follow(tmp_path, torch.tensor([50.0, 50.0]), module=Line(fused), plugins=[half(1024.0)])
    assert guard.skipped == 1
    assert torch.equal(module.weight, other.weight)


def test_a_scaler_goes_on_from_its_scale(tmp_path):
    """It doubles every third step; a run that is resumed in between ends where one that was not does."""
    scaler = lambda: MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", 8.0, growth_interval=3))  # noqa: E731
    data = DataLoader([torch.tensor(x) for x in (1.0, -2.0)], batch_size=None)
    found = []
    for epochs, start in ((4, None), (2, None), (4, tmp_path / "half.ckpt")):
        module, plugin = Line(), scaler()
        running = trainer(tmp_path, LossGuard(), max_epochs=epochs, plugins=[plugin])
        running.fit(module, data, ckpt_path=start, weights_only=True)
        running.save_checkpoint(tmp_path / ("half.ckpt" if epochs == 2 else "whole.ckpt"))
        found.append((module.weight.item(), plugin.scaler.get_scale(), plugin.scaler._get_growth_tracker()))
    assert found[0][1:] == (32.0, 2)
    assert found[2] == found[0] != found[1]
