"""Our pictures are plain diffusers' pictures: of the base, and of what training exports."""

import copy

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from tiny_world import trained_parameters

from lightning_modules.errors import ConfigError
from lightning_modules.policies.adaptation import FullFineTuning
from lightning_modules.policies.lora import LoRA
from lightning_modules.policies.sdxl import StableDiffusionXL
from lightning_modules.policies.stable_diffusion import StableDiffusion
from lightning_modules.references import AdapterOff
from lightning_modules.sampling.pictures import Sampler, initial_noise
from lightning_modules.sampling.schedulers import KNOWN, SchedulerSampler

PROMPTS = ["a red cube", "two green triangles on a white background"]


def trained(policy):
    """The policy with its trainable weights moved visibly."""
    g = torch.Generator().manual_seed(5)
    for parameter in trained_parameters(policy):
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=g)
    return policy.eval()


def ours(policy, sampler, predict_noise=None):
    noise, generators = initial_noise(policy, [("test", i) for i in range(len(PROMPTS))])
    return noise, sampler.generate(policy, predict_noise or policy.predict_noise, PROMPTS, noise, generators)


def theirs(pipe, sampler, noise):
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    return pipe(
        PROMPTS, negative_prompt=[""] * len(PROMPTS), latents=noise, num_inference_steps=sampler.steps,
        guidance_scale=sampler.guidance_scale, output_type="pt",
    ).images  # fmt: skip


@pytest.mark.parametrize("sampler", [Sampler(), Sampler(steps=7, guidance_scale=1.0), Sampler(steps=4)], ids=str)
def test_base_pictures_are_diffusers_pictures(pipelines, sampler):
    policy = StableDiffusion(str(pipelines / "tiny-sd15"), LoRA()).eval()
    noise, images = ours(policy, sampler)
    pipe = StableDiffusionPipeline.from_pretrained(pipelines / "tiny-sd15")
    torch.testing.assert_close(images, theirs(pipe, sampler, noise), rtol=0, atol=5e-5)


@pytest.mark.parametrize("lora", [LoRA(rank=4), LoRA(rank=2, alpha=8.0)], ids=["alpha=rank", "alpha=4*rank"])
def test_exported_lora_makes_the_same_pictures_in_plain_diffusers(tmp_path, pipelines, lora):
    policy = trained(StableDiffusion(str(pipelines / "tiny-sd15"), lora))
    noise, images = ours(policy, Sampler(steps=5))
    policy.save_pretrained(tmp_path / "export")
    pipe = StableDiffusionPipeline.from_pretrained(pipelines / "tiny-sd15")
    base = theirs(pipe, Sampler(steps=5), noise)
    pipe.load_lora_weights(tmp_path / "export")
    torch.testing.assert_close(images, theirs(pipe, Sampler(steps=5), noise), rtol=0, atol=5e-5)
    assert (images - base).abs().max() > 0.01


def test_exported_unet_makes_the_same_pictures_in_plain_diffusers(tmp_path, pipelines):
    policy = trained(StableDiffusion(str(pipelines / "tiny-sd15"), FullFineTuning()))
    noise, images = ours(policy, Sampler(steps=5))
    policy.save_pretrained(tmp_path / "export")
    unet = UNet2DConditionModel.from_pretrained(tmp_path / "export", subfolder="unet")
    pipe = StableDiffusionPipeline.from_pretrained(pipelines / "tiny-sd15", unet=unet)
    torch.testing.assert_close(images, theirs(pipe, Sampler(steps=5), noise), rtol=0, atol=5e-5)


def test_exported_sdxl_lora_makes_the_same_pictures_in_plain_diffusers(tmp_path, pipelines):
    policy = trained(StableDiffusionXL(str(pipelines / "tiny-sdxl"), LoRA(rank=2)))
    noise, images = ours(policy, Sampler(steps=4))
    policy.save_pretrained(tmp_path / "export")
    pipe = StableDiffusionXLPipeline.from_pretrained(pipelines / "tiny-sdxl", add_watermarker=False)
    pipe.load_lora_weights(tmp_path / "export")
    torch.testing.assert_close(images, theirs(pipe, Sampler(steps=4), noise), rtol=0, atol=5e-5)


def test_the_reference_samples_the_base(pipelines):
    base = StableDiffusion(str(pipelines / "tiny-sd15"), LoRA()).eval()
    policy, reference = trained(StableDiffusion(str(pipelines / "tiny-sd15"), LoRA())), AdapterOff()
    reference.attach(policy)
    _, expected = ours(base, Sampler(steps=3))
    _, actual = ours(policy, Sampler(steps=3), reference.predict_noise)
    assert torch.equal(actual, expected)
    assert not torch.equal(ours(policy, Sampler(steps=3))[1], expected)


def test_eta_draws_are_a_pictures_own(pipelines):
    """With eta 1 a picture is the same alone and in company."""
    policy = StableDiffusion(str(pipelines / "tiny-sd15"), LoRA()).eval()
    sampler = Sampler(steps=3, eta=1.0)
    _, both = ours(policy, sampler)
    noise, generators = initial_noise(policy, [("test", 1)])
    alone = sampler.generate(policy, policy.predict_noise, PROMPTS[1:], noise, generators)
    torch.testing.assert_close(alone[0], both[1], rtol=0, atol=1e-4)


@pytest.mark.parametrize("bad", [{"guidance_scale": 0.5}, {"eta": 1.5}])
def test_a_sampler_without_meaning_is_refused(bad):
    with pytest.raises(ConfigError, match="sampler wants"):
        Sampler(**bad)


# diffusers' samplers


@pytest.fixture(scope="module")
def both(pipelines):
    """The same tiny model as a policy and as a pipeline, whose scheduler's configuration is the file's."""
    pipe = StableDiffusionPipeline.from_pretrained(pipelines / "tiny-sd15")
    pipe.set_progress_bar_config(disable=True)
    return StableDiffusion(str(pipelines / "tiny-sd15"), LoRA()).eval(), pipe, pipe.scheduler.config


# numpy 2 tells diffusers 0.41 of what it does with its tables.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", KNOWN)
def test_a_scheduler_of_diffusers_draws_what_the_plain_pipeline_draws(both, name):
    """Samplers that draw noise draw each picture's own from its generator, here and there."""
    policy, pipe, config = both
    sampler = SchedulerSampler(steps=4, guidance_scale=3.0, eta=0.5 if name == "DDIMScheduler" else 0.0, scheduler=name)
    noise, images = ours(policy, sampler)
    pipe.scheduler = getattr(diffusers, name).from_config(config, clip_sample=False)
    _, generators = initial_noise(policy, [("test", i) for i in range(len(PROMPTS))])
    theirs = pipe(
        PROMPTS, negative_prompt=[""] * len(PROMPTS), latents=noise.clone(), num_inference_steps=4, guidance_scale=3.0,
        eta=sampler.eta, generator=generators, output_type="pt",
    ).images  # fmt: skip
    torch.testing.assert_close(images, theirs, rtol=0, atol=5e-5)


def test_ddim_of_diffusers_is_ours(both):
    policy, *_ = both
    own, named = Sampler(steps=5), SchedulerSampler(steps=5, scheduler="DDIMScheduler")
    torch.testing.assert_close(ours(policy, named)[1], ours(policy, own)[1], rtol=0, atol=5e-5)


def test_a_scheduler_that_is_not_known_has_no_eta_or_no_configuration_is_told(both):
    with pytest.raises(ConfigError, match="scheduler 'FlowMatchEulerDiscreteScheduler' is not known; there are DDIM"):
        SchedulerSampler(scheduler="FlowMatchEulerDiscreteScheduler")
    with pytest.raises(ConfigError, match="EulerDiscreteScheduler has no eta, got 1.0; set it to 0"):
        SchedulerSampler(eta=1.0)
    with pytest.raises(ConfigError, match="PNDMScheduler can't take 3 steps"):
        ours(both[0], SchedulerSampler(steps=3, scheduler="PNDMScheduler"))
    policy = copy.copy(both[0])
    del policy.scheduler_config
    with pytest.raises(ConfigError, match="StableDiffusion has no scheduler configuration of diffusers; use Sampler"):
        ours(policy, SchedulerSampler())
