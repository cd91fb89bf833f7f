"""A frozen copy whose layers are held in bf16 predicts what one in fp32 does, under autocast to bf16."""

import pytest
import torch
from tiny_world import make as make_module
from tiny_world import pairs, trainer

from lightning_modules.batches import DenoiserQuery
from lightning_modules.errors import ConfigError
from lightning_modules.policies import Flux, FullFineTuning, LoRA, StableDiffusion, StableDiffusion3, StableDiffusionXL
from lightning_modules.randomness import generator
from lightning_modules.references import FrozenCopy

KINDS = {"tiny-sd15": StableDiffusion, "tiny-sdxl": StableDiffusionXL, "tiny-sd3": StableDiffusion3, "tiny-flux": Flux}


def query(policy):
    latents = torch.randn(2, policy.latent_channels, 8, 8, generator=generator("query"))
    return DenoiserQuery(latents, torch.tensor([951, 3]), policy.encode_prompts(["a cat", "two dogs"]), 3.0)


def copies(policy):
    """In the policy's own number type, and in bf16."""
    for weight in policy.denoiser.parameters():  # norms' weights are 1 and biases 0, which are bf16 already
        weight.data.add_(0.1 * torch.randn(weight.shape, generator=generator("weights")))
    found = FrozenCopy(), FrozenCopy("bf16")
    for reference in found:
        reference.attach(policy)
    return found


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")  # FLUX's norms on a CPU, in either
@pytest.mark.parametrize("adaptation", [FullFineTuning(), LoRA()], ids=["full", "lora"])
@pytest.mark.parametrize("name", KINDS)
def test_its_predictions_are_equal_bit_for_bit(pipelines, name, adaptation):
    policy = KINDS[name](str(pipelines / name), adaptation)
    own, half = copies(policy)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(half.predict_noise(query(policy)), own.predict_noise(query(policy)))
        assert torch.equal(half.predict_noise(query(policy)), policy.predict_noise(query(policy)))


def test_it_holds_half_of_all_but_the_norms(pipelines):
    _, half = copies(StableDiffusion(str(pipelines / "tiny-sd15"), FullFineTuning()))
    kept = {name for name, weight in half.own_networks()[0].named_parameters() if weight.dtype == torch.float32}
    assert kept
    assert all("norm" in name for name in kept)


def test_a_run_under_bf16_mixed_is_that_with_a_copy_in_fp32(pipelines, tmp_path):
    losses = []
    for dtype in (None, "bf16"):
        module = make_module(pipelines, FullFineTuning(), FrozenCopy(dtype))
        running = trainer(tmp_path, precision="bf16-mixed", max_steps=2)
        running.fit(module, pairs())
        losses.append([running.callback_metrics["train/loss"], *(p.detach() for p in module.policy.unet.parameters())])
    assert all(torch.equal(one, other) for one, other in zip(*losses, strict=True))


@pytest.mark.parametrize("autocast", [None, torch.float16])
def test_another_precision_is_refused(pipelines, autocast):
    policy = StableDiffusion(str(pipelines / "tiny-sd15"), FullFineTuning())
    _, half = copies(policy)
    with (
        torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None),
        pytest.raises(ConfigError, match=r"bf16 equals .* set trainer\.precision to bf16-mixed, or leave"),
    ):
        half.predict_noise(query(policy))
