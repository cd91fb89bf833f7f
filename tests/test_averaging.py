"""The average of the trained weights: what it is, where it is used, and that a run goes on with it."""

import pytest
import torch
from diffusers.training_utils import EMAModel
from lightning.pytorch import Callback
from safetensors.torch import load_file
from tiny_world import make, pairs, trainer

from callbacks.evaluation.pictures import evaluation_mode
from callbacks.export_policy import ExportPolicy
from callbacks.resume.checkpoint_files import AtomicCheckpointIO
from callbacks.resume.checkpointing import RunCheckpoint
from experiments import run
from lightning_modules.errors import ConfigError
from lightning_modules.references import AdapterOff
from lightning_modules.weights.averaging import ExponentialMovingAverage


def weights(module):
    return {name: value.detach().clone() for name, value in module._trained().items()}


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# ----------------------------------------------------------------------------------------------- formula


def test_the_average_by_hand():
    """Of 1, 3, 0 with d = 0, 2/11, min(0.2, 3/12)."""
    ema = ExponentialMovingAverage(decay=0.2)
    for value in (1.0, 3.0, 0.0):
        ema.update({"w": torch.tensor([value])})
    expected = 0.2 * (2 / 11 * 1.0 + 9 / 11 * 3.0)
    torch.testing.assert_close(ema.weights["w"], torch.tensor([expected]))


@pytest.mark.parametrize("decay", [0.9999, 0.3])
def test_it_is_that_of_diffusers(decay):
    weight = torch.nn.Parameter(torch.randn(5, generator=torch.Generator().manual_seed(0)))
    ema, other = ExponentialMovingAverage(decay), EMAModel([weight], decay=decay)
    for _ in range(20):
        weight.data += torch.randn(5)
        ema.update({"w": weight})
        other.step([weight])
    torch.testing.assert_close(ema.weights["w"], other.shadow_params[0].data)


@pytest.mark.parametrize("decay", [-0.1, 1.0])
def test_a_decay_out_of_range(decay):
    with pytest.raises(ConfigError, match=r"decay must lie in \[0, 1\)"):
        ExponentialMovingAverage(decay)


# --------------------------------------------------------------------------------------------------- runs


class Watches(Callback):
    """What is in the policy's weights as pictures are drawn, and what was before and is afterwards."""

    def on_train_end(self, trainer, module):
        before = weights(module)
        with evaluation_mode(module):
            self.drawn = weights(module)
            with evaluation_mode(module):
                assert equal(weights(module), self.drawn)
        assert equal(weights(module), before)

    def on_test_epoch_end(self, trainer, module):
        self.on_train_end(trainer, module)


def fit(pipelines, folder, *callbacks, ema, epochs, ckpt_path=None):
    module = make(pipelines, reference=AdapterOff(), ema=ema)
    running = trainer(
        folder, *callbacks, max_epochs=epochs, accumulate_grad_batches=2, enable_checkpointing=True,
        plugins=[AtomicCheckpointIO()],
    )  # fmt: skip
    running.fit(module, pairs(4), ckpt_path=ckpt_path, weights_only=True)
    return module


def test_a_run_goes_on_with_its_average_which_is_drawn_with_and_exported(pipelines, tmp_path):
    """Four steps of two batches, and the same interrupted in the middle; the weights of training are not touched."""
    plain = fit(pipelines, tmp_path / "plain", RunCheckpoint(), ema=None, epochs=2)
    module = fit(
        pipelines, tmp_path / "whole", RunCheckpoint(), ExportPolicy(), seen := Watches(),
        ema=ExponentialMovingAverage(0.5), epochs=2,
    )  # fmt: skip
    assert equal(weights(module), weights(plain))
    assert module.ema.steps == 4
    assert equal(seen.drawn, module.ema.weights)
    assert not equal(seen.drawn, weights(module))
    exported = load_file(tmp_path / "whole" / "export" / "step=0000004" / "pytorch_lora_weights.safetensors")
    assert sorted(map(float, (value.sum() for value in exported.values()))) == sorted(
        map(float, (value.sum() for value in module.ema.weights.values()))
    )

    fit(pipelines, tmp_path / "half", RunCheckpoint(), ema=ExponentialMovingAverage(0.5), epochs=1)
    again = fit(
        pipelines, tmp_path / "half", RunCheckpoint(), ema=ExponentialMovingAverage(0.5), epochs=2,
        ckpt_path=tmp_path / "half" / "checkpoints" / "last.ckpt",
    )  # fmt: skip
    assert again.ema.steps == 4
    assert equal(again.ema.weights, module.ema.weights)
    assert equal(weights(again), weights(module))

    for ema, expected in ((ExponentialMovingAverage(0.5), module.ema.weights), (None, weights(module))):
        judged = make(pipelines, reference=AdapterOff(), ema=ema)
        trainer(tmp_path, seen := Watches(), RunCheckpoint(), enable_checkpointing=True).test(
            judged,
            range(1),
            ckpt_path=tmp_path / "whole" / "checkpoints" / "last.ckpt",
            weights_only=True,
            verbose=False,
        )
        assert equal(seen.drawn, expected)


def test_a_run_without_an_average_can_go_on_with_one(pipelines, tmp_path, caplog):
    fit(pipelines, tmp_path, RunCheckpoint(), ema=None, epochs=1)
    last = tmp_path / "checkpoints" / "last.ckpt"
    with caplog.at_level("INFO"):
        module = fit(pipelines, tmp_path, RunCheckpoint(), ema=ExponentialMovingAverage(), epochs=2, ckpt_path=last)
    assert "the checkpoint holds no average of its weights: a new one starts here" in caplog.text
    assert module.ema.steps == 2


def test_lightnings_averages_are_refused_and_ours_is_a_setting(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"EMAWeightAveraging averages .*; use --model.ema=ExponentialMovingAverage"):
        run.main(["--config", "spo_tiny", "--trainer.callbacks+=EMAWeightAveraging"])
    words = ["--config", "spo_tiny", "--model.ema=ExponentialMovingAverage", "--model.ema.decay=0.99"]
    with pytest.raises(SystemExit):
        run.main([*words, "--print_config"])
    assert "decay: 0.99\n" in capsys.readouterr().out
