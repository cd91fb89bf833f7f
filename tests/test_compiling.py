"""``policy.compile``: the same networks, names and runs as without it, within rounding.

Parts are compiled by a stand-in for inductor that runs what torch traced as it is: tracing a block takes seconds, its
kernels would take minutes. One test has inductor make real ones of one small part. All demand whole graphs.
"""

import shutil
from functools import partialmethod
from unittest.mock import Mock

import pytest
import torch
from diffusers.models.activations import GEGLU
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from test_alignment import batch, fit, loader, weights
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
from lightning_modules.policies import FullFineTuning, LoRA, StableDiffusion
from lightning_modules.policies.compiling import MOST_VARIANTS, compile_parts, deep_copy, is_compiled
from lightning_modules.randomness import generator
from lightning_modules.references import AdapterOff, FrozenCopy
from lightning_modules.weights.sharding import shard


class SmallParts(StableDiffusion):
    """In place of whole blocks one part of each, for time: a layer with an adapter, and an activation."""

    blocks = (GEGLU,)


def make(pipelines, adaptation=None, kind=SmallParts, **options):
    torch.manual_seed(3)
    return kind(str(pipelines / "tiny-sd15"), adaptation or LoRA(targets=("ff.net.0.proj", "to_q")), **options)


def perturbed(policy):
    for index, parameter in enumerate(trained_parameters(policy)):
        parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator("perturb", index)))
    return policy


def query(policy, n=2):
    latents = torch.randn(n, 4, 8, 8, generator=generator("query"))
    return DenoiserQuery(latents, torch.tensor([951, 3][:n]), policy.encode_prompts(["a cat", "two dogs"][:n]))


@pytest.fixture
def traced(monkeypatch):
    """The shapes that each traced part reads, in order; nothing of it and no limit outlives the test."""
    import torch._dynamo.config as limits

    graphs = []

    def run_as_it_is(graph, inputs):
        graphs.append([tuple(value.shape) for value in inputs])
        return graph.forward

    before = limits.recompile_limit, limits.accumulated_recompile_limit
    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend=run_as_it_is, fullgraph=True))
    yield graphs
    torch.compiler.reset()
    limits.recompile_limit, limits.accumulated_recompile_limit = before


def test_blocks_and_decoder_are_compiled_where_it_is_asked_for(pipelines, traced):
    def compiled(policy):
        return [name for name, part in policy.named_modules() if is_compiled(part)]

    assert compiled(make(pipelines, kind=StableDiffusion)) == []
    found = make(pipelines, kind=StableDiffusion, compile=True)
    kinds = BasicTransformerBlock, ResnetBlock2D
    blocks = [f"unet.{name}" for name, part in found.unet.named_modules() if isinstance(part, kinds)]
    assert len(blocks) == 12
    assert compiled(found) == sorted([*blocks, "vae.decoder"], key=[name for name, _ in found.named_modules()].index)


@pytest.mark.parametrize("adaptation", [LoRA(), FullFineTuning()], ids=["lora", "full"])
def test_names_and_exported_files_are_those_of_the_plain_policy(pipelines, traced, tmp_path, adaptation):
    files = []
    for compile in (False, True):
        policy = make(pipelines, adaptation, compile=compile)
        policy.save_pretrained(tmp_path / str(compile))
        found = sorted(path for path in (tmp_path / str(compile)).rglob("*") if path.is_file())
        files.append([list(policy.state_dict()), [path.name for path in found], [path.read_bytes() for path in found]])
    assert files[0] == files[1]


def test_predictions_and_gradients_are_equal_with_adapters_on_and_off(pipelines, traced):
    found = {}
    for compile in (False, True):
        policy = perturbed(make(pipelines, compile=compile))
        on = policy.predict_noise(query(policy))
        on.square().mean().backward()
        with policy.adapters_disabled(), torch.no_grad():
            off = policy.predict_noise(query(policy))
        found[compile] = on.detach(), off, [parameter.grad for parameter in trained_parameters(policy)]
    torch.testing.assert_close(found[True], found[False], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(found[True][0], found[True][1])
    assert len(traced) >= 4  # two widths, with adapters and without


def test_every_shape_is_compiled_once_and_on_its_own_whatever_was_met_before(traced):
    """What varies would be compiled for sizes that vary, in a process that had met two of them, and not in another."""
    layer = nn.Linear(2, 3).requires_grad_(False)
    compile_parts([layer])
    for n in (4, 5, 6, 4, 5):
        layer(torch.ones(n, 2))
    assert [(n, 2) in read for n, read in zip((4, 5, 6), traced, strict=True)] == [True] * 3
    layer.weight.data.fill_(7)
    layer.bias.data.fill_(1)
    assert torch.equal(layer(torch.ones(4, 2)), torch.full((4, 3), 15.0))
    assert len(traced) == 3


def test_a_whole_block_of_a_unet_is_one_graph(pipelines, traced):
    plain = perturbed(make(pipelines, LoRA(), StableDiffusion)).unet.mid_block.attentions[0].transformer_blocks[0]
    compiled = deep_copy(plain)
    compile_parts([compiled])
    hidden, text = torch.randn(2, 16, 32), torch.randn(2, 77, 32)
    torch.testing.assert_close(compiled(hidden, None, text), plain(hidden, None, text), rtol=1e-5, atol=1e-6)
    assert len(traced) == 1


def test_pictures_are_equal(pipelines, traced):
    latents = torch.randn(2, 4, 8, 8, generator=generator("latents"))
    pictures = [make(pipelines, compile=compile).decode(latents) for compile in (False, True)]
    torch.testing.assert_close(pictures[0], pictures[1], rtol=0, atol=1e-6)
    assert len(traced) == 1


def test_a_frozen_copy_is_compiled_as_what_it_copies(pipelines, traced):
    """So that policy and reference, equal before the first step, compute the same: its loss is ln 2."""
    policy = make(pipelines, FullFineTuning(), compile=True)
    module = AlignmentModule(policy, DPO(), FrozenCopy())
    module.setup("fit")
    copied = module.reference.own_networks()[0]
    names = [[name for name, part in network.named_modules() if is_compiled(part)] for network in (policy.unet, copied)]
    assert names[0] == names[1] != []
    torch.testing.assert_close(module.compute_loss(batch(0, 2), "train").loss, torch.tensor(2.0).log())
    perturbed(policy)
    assert not torch.equal(module.reference.predict_noise(query(policy)), policy.predict_noise(query(policy)))


def test_a_copy_of_what_is_not_compiled_is_not():
    assert not is_compiled(deep_copy(nn.Linear(2, 2)))


def test_pools_of_compiled_policies_are_others(pipelines, traced):
    plain, again, compiled = (make(pipelines, compile=compile) for compile in (False, False, True))
    assert fingerprint(plain) == fingerprint(again) != fingerprint(compiled)


def test_a_run_goes_on_as_one_that_was_never_stopped(pipelines, traced, tmp_path):
    def run(folder, steps, compile=True):
        module = AlignmentModule(make(pipelines, compile=compile), DPO(), AdapterOff(), sgd)
        options = {"callbacks": [RunCheckpoint(every_n_steps=2), ExactResume()], "plugins": [AtomicCheckpointIO()],
                   "enable_checkpointing": True, "max_steps": steps, "max_epochs": -1}  # fmt: skip
        fit(
            tmp_path / folder,
            module,
            loader(2, pairs=4),
            newest_checkpoint(tmp_path / folder / "checkpoints"),
            **options,
        )
        return weights(module, True)

    run("stopped", 2)
    torch.compiler.reset()  # another process
    stopped, whole, plain = run("stopped", 4), run("whole", 4), run("plain", 4, compile=False)
    assert traced
    assert all(torch.equal(value, whole[name]) for name, value in stopped.items())
    torch.testing.assert_close(whole, plain, rtol=1e-4, atol=1e-6)
    saved = [newest_checkpoint(tmp_path / name / "checkpoints") for name in ("whole", "plain")]
    assert len({tuple(torch.load(file)["state_dict"]) for file in saved}) == 1


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1)


def test_weights_that_are_shared_out_are_refused(pipelines, traced):
    policy = make(pipelines, compile=True)
    with pytest.raises(ConfigError, match="fsdp2: it gathers .* set model.policy.compile to false, or use ddp"):
        shard(policy.unet, policy.blocks, Mock(spec=DeviceMesh))


def test_torchs_limits_leave_room_for_a_unet():
    import torch._dynamo.config as limits

    compile_parts([])
    assert min(limits.recompile_limit, limits.accumulated_recompile_limit) >= MOST_VARIANTS


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler on a CPU")
def test_inductor_computes_the_same_within_rounding(monkeypatch, tmp_path):
    from torch._inductor import config

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(config, "compile_threads", 1)
    torch.manual_seed(0)
    part = nn.Sequential(nn.GroupNorm(2, 8), nn.SiLU()).requires_grad_(False)
    hidden = torch.randn(2, 8, 4, 4)
    expected = part(hidden)
    compile_parts([part])
    found = part(hidden)
    torch.compiler.reset()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
