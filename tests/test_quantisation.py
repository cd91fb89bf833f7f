"""Quantised bases: what is rounded and how far, that a LoRA trains beside it, and what is refused."""

import importlib.util
import json
from unittest.mock import Mock

import pytest
import torch
from peft import get_peft_model_state_dict
from safetensors.torch import load_file
from tiny_world import pairs, trained_parameters, trainer
from torch import nn
from torch.distributed import destroy_process_group, init_process_group
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel

from datamodules.pools.fingerprint import fingerprint
from experiments.evaluation.policies import PolicySource
from lightning_modules.alignment import AlignmentModule
from lightning_modules.batches import DenoiserQuery
from lightning_modules.errors import ConfigError
from lightning_modules.objectives import DPO
from lightning_modules.policies import (
    NF4,
    Flux,
    Fp8Casting,
    FullFineTuning,
    LoRA,
    StableDiffusion,
    StableDiffusion3,
    TorchAo,
)
from lightning_modules.policies.quantisation import linear_layers
from lightning_modules.randomness import generator
from lightning_modules.references import AdapterOff, FrozenCopy

FLOW = {"t5_tokens": 16, "image_size": 64}
KINDS = {
    "sd3": (StableDiffusion3, "tiny-sd3", FLOW),
    "flux": (Flux, "tiny-flux", FLOW),
    "sd15": (StableDiffusion, "tiny-sd15", {}),
}
ALL = {"fp8 casting": Fp8Casting(), "torchao int8": TorchAo(), "torchao fp8": TorchAo("fp8"), "nf4": NF4()}


@pytest.fixture(params=KINDS)
def make(request, pipelines):
    kind, folder, settings = KINDS[request.param]

    def made(quantisation=None, adaptation=None, seed=0, **options):
        torch.manual_seed(seed)
        return kind(
            str(pipelines / folder), adaptation or LoRA(), quantisation=quantisation, **(settings | options)
        ).eval()

    return made


@pytest.fixture(params=ALL)
def quantisation(request):
    package = ALL[request.param].package
    if package is not None:
        pytest.importorskip(package)
    return ALL[request.param]


def perturbed(policy):
    for index, parameter in enumerate(trained_parameters(policy)):
        parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator("perturb", index)))
    return policy


def asked(policy):
    latents = torch.randn(2, policy.latent_channels, 8, 8, generator=generator("query"))
    return DenoiserQuery(latents, torch.tensor([750, 250]), policy.encode_prompts(["a red cat", "two squares"]))


def layers(policy):
    """The layers in question by their names before any adapter."""
    return {name.removesuffix(".base_layer"): layer for name, layer in linear_layers(policy.denoiser, policy.blocks)
            if ".lora_" not in name}  # fmt: skip


def expanded(layer):
    """The weights that a layer computes with."""
    weight = layer.weight.detach()
    if hasattr(weight, "dequantize") and type(weight) is not torch.Tensor and weight.dtype != torch.uint8:
        return weight.dequantize()
    if weight.dtype == torch.uint8:
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(weight, layer.weight.quant_state)
    return weight.to(torch.float32)


def rounded(policy, plain):
    """``plain`` with the weights that the quantised policy computes with."""
    held = layers(policy)
    for name, layer in layers(plain).items():
        layer.weight.data.copy_(expanded(held[name]))
    return plain


def squared(policy):
    output = policy.predict_noise(asked(policy))
    return output, torch.autograd.grad(output.square().sum(), trained_parameters(policy))


class TestWeights:
    def test_the_linear_layers_of_the_blocks_take_a_byte_or_half_of_one_and_nothing_else_changes(
        self, make, quantisation
    ):
        plain, policy = make(), make(quantisation)
        held, kept = layers(policy), layers(plain)
        assert held.keys() == kept.keys()
        assert len(held) > 10
        for name, layer in held.items():
            stored = getattr(layer.weight, "qdata", layer.weight)
            numbers = kept[name].weight.numel()
            assert stored.numel() * stored.element_size() == numbers // (2 if quantisation == NF4() else 1)
            assert not layer.weight.requires_grad
        others = dict(policy.named_parameters())
        quantised = {id(layer.weight) for layer in kept.values()}
        for name, parameter in plain.named_parameters():
            if id(parameter) not in quantised:
                assert torch.equal(others[name], parameter)

    def test_how_far_weights_are_rounded(self, make, quantisation):
        """Half a unit of the last place that there is: of 8 bits by the row's largest, of fp8's three binary places."""
        held = layers(make(quantisation))
        for name, layer in layers(make()).items():
            weight, error = layer.weight, (expanded(held[name]) - layer.weight).abs()
            row = weight.abs().amax(dim=1, keepdim=True)
            if quantisation == TorchAo():
                assert (error <= 0.501 * row / 127).all()
            elif quantisation == Fp8Casting():
                assert torch.equal(expanded(held[name]), weight.to(torch.float8_e4m3fn).to(torch.float32))
            elif quantisation == TorchAo("fp8"):
                assert (error <= torch.maximum(weight.abs() / 16, row / 448 * 2**-10) * 1.001).all()
            else:
                assert (error <= 0.16 * weight.abs().max()).all()  # the widest of its 16 steps, from -1 to -0.696
            assert error.max() > 0

    def test_it_computes_what_the_rounded_weights_compute_and_so_do_its_gradients(self, make, quantisation):
        policy = perturbed(make(quantisation))
        plain = perturbed(rounded(policy, make()))
        ours, theirs = squared(policy), squared(plain)
        exact = quantisation == Fp8Casting()
        torch.testing.assert_close(ours[0], theirs[0], rtol=0, atol=0 if exact else 1e-4)
        for one, other in zip(ours[1], theirs[1]):
            assert (one - other).abs().max() <= (0 if exact else 1e-3) * other.abs().max()

    def test_a_base_in_bf16_trains_with_and_without_autocast(self, make, quantisation):
        policy = perturbed(make(quantisation, frozen_dtype="bf16", gradient_checkpointing=True)).train()
        for autocast in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                _, gradients = squared(policy)
            assert all(gradient.dtype == torch.float32 and gradient.isfinite().all() for gradient in gradients)
            assert sum(bool(gradient.any()) for gradient in gradients) > 0.9 * len(gradients)

    def test_adapters_start_as_without_quantisation_and_switched_off_they_leave_the_rounded_base(
        self, make, quantisation
    ):
        policy, plain = make(quantisation), make()
        for one, other in zip(trained_parameters(policy), trained_parameters(plain), strict=True):
            assert torch.equal(one, other)
        with torch.no_grad():
            before = policy.predict_noise(asked(policy))
            perturbed(policy)
            with policy.adapters_disabled():
                assert torch.equal(policy.predict_noise(asked(policy)), before)
            assert (policy.predict_noise(asked(policy)) - before).abs().max() > 0.01

    def test_an_export_holds_the_adapters_as_without_quantisation(self, pipelines, quantisation, tmp_path):
        for name, held in (("quantised", quantisation), ("plain", None)):
            torch.manual_seed(0)
            policy = Flux(str(pipelines / "tiny-flux"), LoRA(), quantisation=held, **FLOW)
            perturbed(policy).save_pretrained(tmp_path / name)
        files = [tmp_path / name / "pytorch_lora_weights.safetensors" for name in ("quantised", "plain")]
        ours, theirs = map(load_file, files)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
        assert len(ours) == len(get_peft_model_state_dict(policy.denoiser)) > 0


def trained(pipelines, folder, quantisation, steps, ckpt_path=None):
    """A run of DPO; the weights at its end."""
    torch.manual_seed(5)
    policy = StableDiffusion(str(pipelines / "tiny-sd15"), LoRA(), quantisation=quantisation)
    optimizer = lambda parameters: torch.optim.AdamW(parameters, lr=0.01)  # noqa: E731
    module = AlignmentModule(policy, DPO(beta=100.0), AdapterOff(), optimizer, caption_dropout=0.3)
    fit = trainer(folder, max_steps=steps)
    fit.fit(module, pairs(1), ckpt_path=ckpt_path)
    fit.save_checkpoint(folder / f"{steps}.ckpt")
    return {name: value.detach().clone() for name, value in policy.named_parameters() if value.requires_grad}


class TestRuns:
    def test_a_resumed_run_ends_where_an_uninterrupted_one_does(self, pipelines, quantisation, tmp_path):
        whole = trained(pipelines, tmp_path, quantisation, 4)
        trained(pipelines, tmp_path, quantisation, 2)
        kept = torch.load(tmp_path / "2.ckpt", weights_only=True)["state_dict"]
        assert all(".lora_" in name for name in kept)
        resumed = trained(pipelines, tmp_path, quantisation, 4, tmp_path / "2.ckpt")
        assert whole.keys() == resumed.keys()
        assert all(torch.equal(whole[name], resumed[name]) for name in whole)
        assert any(value.any() for name, value in whole.items() if "lora_B" in name)

    def test_a_pool_of_every_setting_has_a_name_of_its_own(self, pipelines):
        settings = [None, *(q for q in ALL.values() if q.package is None or importlib.util.find_spec(q.package))]
        names = []
        for quantisation in [*settings, *settings]:
            torch.manual_seed(0)
            policy = StableDiffusion(str(pipelines / "tiny-sd15"), LoRA(), quantisation=quantisation)
            names.append(fingerprint(policy))
        assert names[: len(settings)] == names[len(settings) :]
        assert len(set(names)) == len(settings) >= 2

    def test_ddp_takes_it(self, pipelines, quantisation, tmp_path):
        """It sends all weights at its start, which it cannot of these."""
        policy = StableDiffusion(str(pipelines / "tiny-sd15"), LoRA(), quantisation=quantisation)
        module = AlignmentModule(policy, DPO(), AdapterOff())
        module.setup("fit")
        init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
        try:
            DistributedDataParallel(module)
        finally:
            destroy_process_group()

    def test_evaluate_judges_on_the_base_as_it_is_published(self, pipelines):
        settings = {
            "class_path": "lightning_modules.policies.StableDiffusion",
            "init_args": {
                "pretrained": str(pipelines / "tiny-sd15"),
                "adaptation": {"class_path": "lightning_modules.policies.Frozen"},
                "quantisation": {"class_path": "lightning_modules.policies.Fp8Casting"},
            },
        }
        source = PolicySource("run", json.dumps(settings))
        told = "policy run: trained beside a base quantised by Fp8Casting, and drawn on the base as it is published"
        assert source.notes() == [told]
        del settings["init_args"]["quantisation"]
        assert PolicySource("run", json.dumps(settings)).notes() == []
        policy = source.load("fp32")
        assert {parameter.dtype for parameter in policy.denoiser.parameters()} == {torch.float32}
        plain = StableDiffusion(str(pipelines / "tiny-sd15"), LoRA())
        with torch.no_grad():
            assert torch.equal(policy.predict_noise(asked(policy)), plain.predict_noise(asked(plain)))


class TestRefusals:
    """Before anything is loaded: the base model does not exist."""

    def test_weights_that_train(self):
        with pytest.raises(ConfigError, match="Fp8Casting rounds the denoiser's weights, and FullFineTuning trains"):
            StableDiffusion("no/where", FullFineTuning(), quantisation=Fp8Casting())

    @pytest.mark.parametrize(("quantisation", "package"), [(NF4(), "bitsandbytes"), (TorchAo(), "torchao")])
    def test_a_missing_package(self, monkeypatch, quantisation, package):
        found = importlib.util.find_spec
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else found(name))
        with pytest.raises(ConfigError, match=f"needs the package {package}, which is not installed: pip install"):
            Flux("no/where", LoRA(), quantisation=quantisation)

    def test_a_copy_for_the_reference_and_weights_shared_out(self, pipelines):
        policy = StableDiffusion(str(pipelines / "tiny-sd15"), LoRA(), quantisation=Fp8Casting())
        with pytest.raises(ConfigError, match="FrozenCopy reference: the policy's base is quantised .Fp8Casting."):
            FrozenCopy().attach(policy)
        with pytest.raises(ConfigError, match="fsdp2: the policy's base is quantised"):
            AlignmentModule(policy, DPO(), AdapterOff()).shard(Mock(spec=DeviceMesh))


def test_layers_around_the_blocks_are_left_alone(pipelines):
    """The policies read the number type of the denoiser's inputs off them."""
    policy = Flux(str(pipelines / "tiny-flux"), LoRA(), quantisation=Fp8Casting(), **FLOW)
    around = {name for name, module in policy.transformer.named_modules() if isinstance(module, nn.Linear)}
    assert {"x_embedder", "context_embedder", "proj_out"} <= around - layers(policy).keys()
    assert policy.transformer.x_embedder.weight.dtype == torch.float32
