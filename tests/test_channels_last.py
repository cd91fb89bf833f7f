"""``policy.channels_last``: the same weights in another order in memory, and the same runs within rounding."""

from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import load_file
from test_alignment import fit, loader, weights
from tiny_world import trained_parameters
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from callbacks.resume.checkpoint_files import AtomicCheckpointIO, newest_checkpoint
from callbacks.resume.checkpointing import RunCheckpoint
from callbacks.resume.exact_resume import ExactResume
from datamodules.pools.fingerprint import fingerprint
from lightning_modules.alignment import AlignmentModule
from lightning_modules.batches import DenoiserQuery
from lightning_modules.errors import ConfigError
from lightning_modules.objectives import DPO
from lightning_modules.optimizers import lay_out_moments
from lightning_modules.policies import FullFineTuning, LoRA, StableDiffusion
from lightning_modules.randomness import generator
from lightning_modules.references import FrozenCopy
from lightning_modules.weights.sharding import shard


def make(pipelines, adaptation=None, **options):
    torch.manual_seed(3)
    return StableDiffusion(str(pipelines / "tiny-sd15"), adaptation or FullFineTuning(), **options)


def query(policy):
    latents = torch.randn(2, 4, 8, 8, generator=generator("query"))
    return DenoiserQuery(latents, torch.tensor([951, 3]), policy.encode_prompts(["a cat", "two dogs"]), 3.0)


def is_channels_last(weight):
    return weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("adaptation", [FullFineTuning(), LoRA(targets=("to_q", "conv1"))], ids=["full", "lora"])
def test_predictions_pictures_and_gradients_are_equal_within_rounding(pipelines, adaptation):
    found = []
    for channels_last in (False, True):
        policy = make(pipelines, adaptation, channels_last=channels_last)
        filters = [weight for net in (policy.unet, policy.vae) for weight in net.parameters() if weight.ndim == 4]
        assert all(is_channels_last(weight) for weight in filters) == channels_last
        noise = policy.predict_noise(query(policy))
        noise.square().mean().backward()
        latents = query(policy).latents
        pictures = policy.decode(latents), policy.encode_images(policy.decode(latents) * 2 - 1)
        found.append([noise.detach(), pictures, [parameter.grad for parameter in trained_parameters(policy)]])
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=3e-5)


def test_exported_weights_and_names_are_those_of_the_plain_policy(pipelines, tmp_path):
    for channels_last in (False, True):
        make(pipelines, channels_last=channels_last).save_pretrained(tmp_path / str(channels_last))
    plain, other = (load_file(next((tmp_path / name / "unet").glob("*.safetensors"))) for name in ("False", "True"))
    assert list(plain) == list(other)
    assert all(torch.equal(plain[name], other[name]) for name in plain)


def test_pools_of_such_policies_are_others(pipelines):
    plain, again, other = (make(pipelines, channels_last=value) for value in (False, False, True))
    assert fingerprint(plain) == fingerprint(again) != fingerprint(other)


def test_a_frozen_copy_lies_as_what_it_copies(pipelines):
    reference = FrozenCopy()
    reference.attach(make(pipelines, channels_last=True))
    assert all(is_channels_last(weight) for weight in reference.own_networks()[0].parameters() if weight.ndim == 4)


@pytest.mark.parametrize("resumed", [False, True], ids=["plain", "channels_last"])
def test_a_run_goes_on_from_a_checkpoint_of_either_layout(pipelines, tmp_path, resumed):
    """With a fused optimizer, which takes moments to lie as their weights do."""

    def run(folder, steps, channels_last):
        policy = make(pipelines, channels_last=channels_last)
        module = AlignmentModule(policy, DPO(beta=100.0), FrozenCopy(), fused_adamw)
        options = {"callbacks": [RunCheckpoint(every_n_steps=2), ExactResume()], "plugins": [AtomicCheckpointIO()],
                   "enable_checkpointing": True, "max_steps": steps, "max_epochs": -1}  # fmt: skip
        checkpoint = newest_checkpoint(tmp_path / folder / "checkpoints")
        fit(tmp_path / folder, module, loader(2, pairs=4), checkpoint, **options)
        return weights(module, True)

    run("stopped", 2, channels_last=not resumed)
    found, plain = run("stopped", 4, channels_last=resumed), run("plain", 4, channels_last=False)
    torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-4)


def fused_adamw(parameters):
    # An epsilon of the gradients' size: rounding is not to decide on directions.
    return torch.optim.AdamW(parameters, lr=1e-2, eps=1e-3, fused=True)


def test_moments_are_laid_out_as_their_weights_and_keep_their_numbers():
    weight = nn.Parameter(torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last))
    optimizer = torch.optim.AdamW([weight])
    moment, step = torch.randn(2, 3, 4, 5), torch.tensor(1.0)
    optimizer.state[weight] = {"exp_avg": moment, "step": step}
    lay_out_moments(optimizer)
    state = optimizer.state[weight]
    assert state["exp_avg"].stride() == weight.stride() != moment.stride()
    assert torch.equal(state["exp_avg"], moment)
    assert state["step"] is step


def test_weights_that_are_shared_out_are_refused(pipelines):
    policy = make(pipelines, channels_last=True)
    with pytest.raises(ConfigError, match="row by row, .* set model.policy.channels_last to false, or use ddp"):
        shard(policy.unet, policy.blocks, Mock(spec=DeviceMesh))
