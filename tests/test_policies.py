"""Stable Diffusion and SDXL as policies: equal to plain diffusers, trainable in part, exportable."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from tiny_world import trained_parameters
from transformers import CLIPTextModel

from lightning_modules import policies
from lightning_modules.batches import Conditioning, DenoiserQuery
from lightning_modules.errors import ConfigError
from lightning_modules.policies import FullFineTuning, LoRA, StableDiffusion, StableDiffusionXL
from lightning_modules.randomness import generator
from lightning_modules.weights.pretrained import Pretrained

PIPELINES = Path(__file__).parent / "pipelines"
SD, SDXL = str(PIPELINES / "tiny-sd15"), str(PIPELINES / "tiny-sdxl")
PROMPTS = ["a cat", "", "two dogs on the moon " * 30]
KINDS = {
    "sd": (StableDiffusion, SD, StableDiffusionPipeline),
    "sdxl": (StableDiffusionXL, SDXL, StableDiffusionXLPipeline),
}
TEXT_ENCODERS = {"sd": {"text_encoder"}, "sdxl": {"text_encoder", "text_encoder_2"}}
UPPER_BOUND_OF_BF16 = 0.02  # of the largest value: 8 bits of precision through a few layers


@pytest.fixture(params=["sd", "sdxl"])
def kind(request):
    return request.param


def make_policy(kind="sd", adaptation=None, **options):
    policy_class, folder, _ = KINDS[kind]
    return policy_class(folder, adaptation or LoRA(), **options)


def make_pipeline(kind):
    _, folder, pipeline_class = KINDS[kind]
    pipeline = pipeline_class.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def make_query(policy, guidance_scale=1.0, prompts=("a cat", "two dogs"), time_ids=None):
    noise = torch.randn(len(prompts), 4, 8, 8, generator=generator("query"))
    timesteps = torch.tensor([951, 3, 500][: len(prompts)])
    cond = policy.encode_prompts(prompts).with_time_ids(time_ids)
    return DenoiserQuery(noise, timesteps, cond, guidance_scale)


def perturb(policy):
    """Move the trained weights away from where they started, as training would."""
    for index, parameter in enumerate(trained_parameters(policy)):
        noise = torch.randn(parameter.shape, generator=generator("perturb", index))
        parameter.data.add_(0.1 * noise)
    return policy


def added_conditions(cond, time_ids):
    return None if cond.pooled is None else {"text_embeds": cond.pooled, "time_ids": time_ids}


def test_a_name_of_the_package_imports_what_it_needs_alone():
    code = """
import sys
from lightning_modules.policies import DiffusionPolicy, FullFineTuning
print({"diffusers", "peft", "transformers"} & set(sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_help_lists_classes_that_nothing_else_imports():
    words = ["experiments.run", "--config=dpo_tiny", "--model.policy.help"]
    done = subprocess.run([sys.executable, "-m", *words], capture_output=True, text=True, check=True)
    assert "lightning_modules.policies.LoRA" in "".join(done.stdout.split())


def test_every_name_of_the_package_is_there():
    assert set(policies.__all__) == set(policies._MODULES)
    assert all(getattr(policies, name).__name__ == name for name in policies.__all__)
    with pytest.raises(AttributeError, match="'Stable'"):
        _ = policies.Stable


class TestText:
    def test_embeddings_are_those_of_the_diffusers_pipeline(self, kind):
        cond = make_policy(kind).encode_prompts(PROMPTS)
        expected = make_pipeline(kind).encode_prompt(
            PROMPTS, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        assert torch.equal(cond.embeds, expected[0])
        if kind == "sdxl":
            assert torch.equal(cond.pooled, expected[2])
        else:
            assert cond.pooled is None

    def test_without_a_negative_prompt_sdxl_contrasts_with_zeros_as_diffusers_does(self):
        policy = make_policy("sdxl", negative_prompt=None)
        _, embeds, _, pooled = make_pipeline("sdxl").encode_prompt(["a cat"], device="cpu")
        assert torch.equal(policy._negative(1).embeds, embeds)
        assert torch.equal(policy._negative(1).pooled, pooled)

    def test_embeddings_carry_gradient_only_if_the_text_encoder_trains(self, kind):
        assert not make_policy(kind).encode_prompts(["a cat"]).embeds.requires_grad
        trained = make_policy(kind, FullFineTuning(text_encoder=True))
        assert trained.encode_prompts(["a cat"]).embeds.requires_grad

    def test_a_negative_prompt_first_met_in_inference_mode_can_be_trained_with_later(self):
        policy = make_policy()
        query = make_query(policy, guidance_scale=5.0)
        with torch.inference_mode():
            policy.predict_noise(query)
        policy.predict_noise(query).sum().backward()

    def test_guidance_follows_a_text_encoder_that_trains(self):
        policy = make_policy("sd", FullFineTuning(text_encoder=True))
        query = make_query(policy, guidance_scale=5.0)
        before = policy.predict_noise(query)
        perturb(policy)
        policy.unet.load_state_dict(make_policy("sd", FullFineTuning()).unet.state_dict())
        assert not torch.allclose(policy.predict_noise(query), before)


class TestPredictNoise:
    @pytest.mark.parametrize("negative_prompt", ["", "blurry"])
    def test_guidance_equals_the_unet_called_by_hand(self, kind, negative_prompt):
        policy = make_policy(kind, negative_prompt=negative_prompt)
        query = make_query(policy, guidance_scale=5.0)
        plain = make_pipeline(kind).unet
        negative = policy.encode_prompts([negative_prompt, negative_prompt])
        time_ids = torch.tensor([[64.0, 64.0, 0.0, 0.0, 64.0, 64.0]] * 2)

        def call(cond: Conditioning) -> torch.Tensor:
            added = added_conditions(cond, time_ids)
            return plain(query.latents, query.timesteps, cond.embeds, added_cond_kwargs=added).sample

        expected = call(negative) + 5.0 * (call(query.cond) - call(negative))
        torch.testing.assert_close(policy.predict_noise(query), expected, rtol=1e-5, atol=1e-5)

    def test_guidance_of_one_is_the_conditional_prediction(self, kind):
        policy = make_policy(kind)
        guided = policy.predict_noise(make_query(policy, guidance_scale=1 + 1e-7))
        torch.testing.assert_close(policy.predict_noise(make_query(policy)), guided, rtol=1e-4, atol=1e-5)

    def test_gradient_flows_through_both_branches(self):
        """Of eps_n + w (eps_c - eps_n) the gradient is (1 - w) that of eps_n plus w that of eps_c."""
        policy = perturb(make_policy())
        query = make_query(policy)
        empty = DenoiserQuery(query.latents, query.timesteps, policy.encode_prompts([""] * len(query.latents)))
        guided = DenoiserQuery(query.latents, query.timesteps, query.cond, 3.0)

        def gradient(asked):
            for parameter in trained_parameters(policy):
                parameter.grad = None
            policy.predict_noise(asked).mean().backward()
            return [parameter.grad.clone() for parameter in trained_parameters(policy)]

        negative, conditional, found = gradient(empty), gradient(query), gradient(guided)
        for of_n, of_c, of_both in zip(negative, conditional, found):
            torch.testing.assert_close(of_both, -2 * of_n + 3 * of_c, rtol=1e-3, atol=1e-6)
        assert any(gradient.abs().max() > 1e-4 for gradient in negative)

    def test_missing_time_ids_mean_an_uncropped_picture_of_the_latents_size(self):
        policy = make_policy("sdxl")
        query = make_query(policy)
        wide = DenoiserQuery(torch.cat([query.latents, query.latents], dim=-1), query.timesteps, query.cond)
        told = torch.tensor([[64.0, 128.0, 0.0, 0.0, 64.0, 128.0]] * 2)
        explicit = DenoiserQuery(wide.latents, wide.timesteps, query.cond.with_time_ids(told))
        assert torch.equal(policy.predict_noise(wide), policy.predict_noise(explicit))

    def test_time_ids_reach_sdxl_and_not_sd(self, kind):
        policy = make_policy(kind)
        cropped = torch.tensor([[512.0, 300.0, 7.0, 9.0, 64.0, 64.0]] * 2)
        same = torch.equal(
            policy.predict_noise(make_query(policy)), policy.predict_noise(make_query(policy, time_ids=cropped))
        )
        assert same == (kind == "sd")

    def test_timesteps_that_bf16_cannot_tell_apart_stay_apart(self):
        assert torch.tensor(951).bfloat16() == torch.tensor(952).bfloat16()
        policy = make_policy(frozen_dtype="bf16")
        query = make_query(policy)
        later = DenoiserQuery(query.latents, query.timesteps + 1, query.cond)
        assert not torch.equal(policy.predict_noise(query)[0], policy.predict_noise(later)[0])

    def test_output_is_fp32_under_autocast_and_with_a_bf16_base(self, kind):
        exact = make_policy(kind)
        expected = exact.predict_noise(make_query(exact, guidance_scale=3.0))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            autocast = exact.predict_noise(make_query(exact, guidance_scale=3.0))
        reduced = make_policy(kind, frozen_dtype="bf16")
        stored = reduced.predict_noise(make_query(reduced, guidance_scale=3.0))
        for output in (autocast, stored):
            assert output.dtype == torch.float32
            assert (output - expected).abs().max() < 3 * UPPER_BOUND_OF_BF16 * expected.abs().max()

    def test_a_copy_of_the_denoiser_can_take_its_place(self):
        policy = make_policy("sd", FullFineTuning())
        query = make_query(policy, guidance_scale=5.0)
        before, frozen = policy.predict_noise(query), copy.deepcopy(policy.denoiser)
        perturb(policy)
        assert torch.equal(policy.predict_noise(query, denoiser=frozen), before)
        assert not torch.equal(policy.predict_noise(query), before)

    def test_eager_attention_equals_sdpa(self):
        sdpa, eager = make_policy(), make_policy(attention="eager")
        query = make_query(sdpa)
        torch.testing.assert_close(sdpa.predict_noise(query), eager.predict_noise(query), rtol=1e-4, atol=1e-5)


class TestTraining:
    @pytest.mark.parametrize("frozen_dtype", ["fp32", "bf16"])
    def test_lora_alone_trains_and_is_fp32(self, kind, frozen_dtype):
        policy = perturb(make_policy(kind, frozen_dtype=frozen_dtype))
        policy.predict_noise(make_query(policy, guidance_scale=5.0)).square().mean().backward()
        base = {"fp32": torch.float32, "bf16": torch.bfloat16}[frozen_dtype]
        for name, parameter in policy.named_parameters():
            is_lora = ".lora_A." in name or ".lora_B." in name
            assert parameter.requires_grad == is_lora
            assert (parameter.grad is not None) == is_lora
            assert parameter.dtype == (torch.float32 if is_lora else base)
        assert all(parameter.grad.abs().sum() > 0 for parameter in trained_parameters(policy))

    @pytest.mark.parametrize("text_encoder", [False, True])
    def test_full_fine_tuning_trains_the_unet_in_fp32(self, kind, text_encoder):
        policy = make_policy(kind, FullFineTuning(text_encoder=text_encoder), frozen_dtype="bf16")
        for name, parameter in policy.named_parameters():
            trains = name.startswith("unet.") or (text_encoder and name.startswith("text_encoder"))
            assert parameter.requires_grad == trains
            assert parameter.dtype == (torch.float32 if trains else torch.bfloat16)

    def test_lora_starts_as_the_base_model(self, kind):
        policy = make_policy(kind)
        query = make_query(policy)
        plain = make_pipeline(kind).unet
        assert torch.equal(policy.predict_noise(query), policy.predict_noise(query, denoiser=plain))

    def test_frozen_networks_stay_in_eval_mode(self, kind):
        policy = make_policy(kind).train()
        assert policy.unet.training
        assert not any(network.training for network in policy.encoders().values())
        trained = make_policy(kind, FullFineTuning(text_encoder=True)).train()
        assert {n for n, encoder in trained.encoders().items() if encoder.training} == TEXT_ENCODERS[kind]
        assert not any(encoder.training for encoder in trained.eval().encoders().values())

    @pytest.mark.parametrize("adaptation", [LoRA(), FullFineTuning()])
    def test_gradient_checkpointing_leaves_the_gradient_as_it_is(self, kind, adaptation):
        gradients = []
        for checkpointing in (False, True):
            torch.manual_seed(0)
            policy = perturb(make_policy(kind, adaptation, gradient_checkpointing=checkpointing))
            assert policy.unet.is_gradient_checkpointing == checkpointing
            policy.predict_noise(make_query(policy)).square().mean().backward()
            gradients.append([parameter.grad for parameter in trained_parameters(policy)])
        torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-5, atol=1e-7)

    def test_targets_that_no_layer_has_are_refused(self):
        with pytest.raises(ConfigError, match="name the ends of its layers"):
            make_policy("sd", LoRA(targets=("to_query",)))


class TestAdaptersDisabled:
    def test_equals_the_base_bit_for_bit(self, kind):
        policy = perturb(make_policy(kind))
        query = make_query(policy, guidance_scale=5.0)
        plain = make_pipeline(kind).unet
        with policy.adapters_disabled():
            off = policy.predict_noise(query)
        assert torch.equal(off, policy.predict_noise(query, denoiser=plain))
        assert not torch.equal(off, policy.predict_noise(query))

    def test_leaves_requires_grad_as_it_was_even_after_an_error(self):
        policy = make_policy()
        some = list(trained_parameters(policy))[3]
        some.requires_grad_(False)
        before = [parameter.requires_grad for parameter in policy.parameters()]
        with pytest.raises(RuntimeError, match="stop"), policy.adapters_disabled():
            raise RuntimeError("stop")
        assert [parameter.requires_grad for parameter in policy.parameters()] == before

    def test_between_forward_and_backward_it_changes_no_gradient(self):
        policy = perturb(make_policy())
        query = make_query(policy)
        policy.predict_noise(query).square().mean().backward()
        expected = [parameter.grad.clone() for parameter in trained_parameters(policy)]
        policy.zero_grad()
        loss = policy.predict_noise(query).square().mean()
        with policy.adapters_disabled(), torch.no_grad():
            policy.predict_noise(query)
        loss.backward()
        for parameter, gradient in zip(trained_parameters(policy), expected, strict=True):
            assert torch.equal(parameter.grad, gradient)

    def test_full_fine_tuning_has_none(self):
        with pytest.raises(ConfigError, match="FrozenCopy"):
            make_policy("sd", FullFineTuning()).adapters_disabled()


class TestExport:
    def test_lora_gives_the_same_prediction_in_plain_diffusers(self, kind, tmp_path):
        policy = perturb(make_policy(kind, LoRA(rank=4, alpha=8.0)))
        policy.save_pretrained(tmp_path / "lora")
        files = {str(path.relative_to(tmp_path / "lora")) for path in (tmp_path / "lora").rglob("*.*")}
        assert files == {"pytorch_lora_weights.safetensors", "kohya/lora.safetensors"}
        pipeline = make_pipeline(kind)
        pipeline.load_lora_weights(tmp_path / "lora")
        query = make_query(policy)
        assert torch.equal(policy.predict_noise(query), policy.predict_noise(query, denoiser=pipeline.unet))

    def test_full_weights_give_the_same_prediction_in_plain_diffusers(self, kind, tmp_path):
        policy = perturb(make_policy(kind, FullFineTuning()))
        policy.save_pretrained(tmp_path / "full")
        assert [path.name for path in (tmp_path / "full").iterdir()] == ["unet"]
        plain = UNet2DConditionModel.from_pretrained(tmp_path / "full", subfolder="unet")
        query = make_query(policy)
        assert torch.equal(policy.predict_noise(query), policy.predict_noise(query, denoiser=plain))

    def test_a_trained_text_encoder_is_exported_too(self, tmp_path):
        policy = perturb(make_policy("sd", FullFineTuning(text_encoder=True)))
        policy.save_pretrained(tmp_path / "full")
        plain = CLIPTextModel.from_pretrained(tmp_path / "full", subfolder="text_encoder")
        expected = policy.encode_prompts(["a cat"]).embeds
        policy.text_encoder = plain
        assert torch.equal(policy.encode_prompts(["a cat"]).embeds, expected)

    @pytest.mark.parametrize("adaptation", [LoRA(), FullFineTuning()])
    def test_saving_again_replaces_the_first_and_leaves_nothing_else(self, adaptation, tmp_path):
        policy = make_policy("sd", adaptation)
        policy.save_pretrained(tmp_path / "export")
        first = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*"))
        content = {path: path.read_bytes() for path in tmp_path.rglob("*.safetensors")}
        perturb(policy).save_pretrained(tmp_path / "export")
        assert sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*")) == first
        assert all(path.read_bytes() != old for path, old in content.items())

    def test_an_exported_unet_is_taken_in_place_of_the_pipelines(self, tmp_path):
        policy = perturb(make_policy("sd", FullFineTuning()))
        policy.save_pretrained(tmp_path)
        other = make_policy("sd", LoRA(), unet=str(tmp_path / "unet"))
        query = make_query(policy)
        assert torch.equal(policy.predict_noise(query), other.predict_noise(query))


class TestPictures:
    images = torch.rand(3, 3, 64, 64, generator=generator("images")) * 2 - 1

    def test_latents_are_the_posterior_mean_times_the_scaling_factor(self, kind):
        latents = make_policy(kind).encode_images(self.images)
        vae = make_pipeline(kind).vae
        expected = vae.encode(self.images).latent_dist.mean * vae.config.scaling_factor
        torch.testing.assert_close(latents, expected, rtol=1e-6, atol=1e-7)
        assert not latents.requires_grad

    def test_draws_are_keyed_by_picture_and_not_by_batch(self):
        policy = make_policy()
        together = policy.encode_images(self.images, [generator("draw", index) for index in range(3)])
        again = policy.encode_images(self.images, [generator("draw", index) for index in range(3)])
        alone = policy.encode_images(self.images[2:], [generator("draw", 2)])
        assert torch.equal(together, again)
        torch.testing.assert_close(together[2:], alone, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(together, policy.encode_images(self.images))

    def test_pictures_are_those_of_the_diffusers_pipeline(self, kind):
        policy, pipeline = make_policy(kind), make_pipeline(kind)
        latents = torch.randn(2, 4, 8, 8, generator=generator("latents"))
        decoded = pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor).sample
        expected = pipeline.image_processor.postprocess(decoded.detach(), output_type="pt")
        torch.testing.assert_close(policy.decode(latents), expected, rtol=1e-6, atol=1e-6)

    def test_a_cpu_takes_few_large_pictures_at_once(self, kind, monkeypatch):
        """In parts of two: the same pictures and latents, to rounding."""
        policy, latents = make_policy(kind), torch.randn(3, 4, 8, 8, generator=generator("decode"))
        draws = [[generator("draw", index) for index in range(3)] for _ in range(2)]
        whole = policy.decode(latents), policy.encode_images(self.images, draws[0])
        sizes = []
        policy.vae.decoder.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
        policy.vae.encoder.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
        side = policy.downscale * 8
        monkeypatch.setattr("lightning_modules.policies.latent_diffusion.CPU_PIXELS", 2 * side**2)
        torch.testing.assert_close(policy.decode(latents), whole[0], rtol=1e-5, atol=1e-5)
        monkeypatch.setattr("lightning_modules.policies.latent_diffusion.CPU_PIXELS", 2 * self.images[0, 0].numel())
        torch.testing.assert_close(policy.encode_images(self.images, draws[1]), whole[1], rtol=1e-5, atol=1e-5)
        assert sizes == [2, 1, 2, 1]
        monkeypatch.setattr("lightning_modules.policies.latent_diffusion.CPU_PIXELS", 1)
        policy.decode(latents)
        assert sizes[4:] == [1, 1, 1]

    def test_the_vae_computes_in_its_own_type_whatever_autocast_says(self):
        policy = make_policy()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            inside = policy.encode_images(self.images)
        assert torch.equal(inside, policy.encode_images(self.images))

    def test_sizes_come_from_the_networks(self, kind):
        policy = make_policy(kind)
        assert (policy.image_size, policy.downscale, policy.latent_channels) == (64, 8, 4)
        assert policy.schedule.num_timesteps == 1000

    @pytest.mark.parametrize(("force_upcast", "expected"), [(True, torch.float32), (False, torch.bfloat16)])
    def test_a_vae_of_sdxl_that_overflows_stays_in_fp32(self, force_upcast, expected, tmp_path):
        vae = shutil.copytree(f"{SDXL}/vae", tmp_path / "vae")
        config = json.loads((vae / "config.json").read_text())
        (vae / "config.json").write_text(json.dumps(config | {"force_upcast": force_upcast}))
        policy = make_policy("sdxl", vae=str(vae), frozen_dtype="bf16")
        assert {parameter.dtype for parameter in policy.vae.parameters()} == {expected}
        assert policy.decode(policy.encode_images(self.images)).dtype == torch.float32


class TestPretrained:
    def test_a_name_that_is_neither_folder_nor_hub_id(self):
        with pytest.raises(ConfigError, match="no folder '/nowhere/model'"):
            StableDiffusion("/nowhere/model", LoRA())

    @pytest.mark.parametrize(
        "missing",
        ["unet", "vae/config.json", "text_encoder/model.safetensors", "scheduler/scheduler_config.json", "tokenizer"],
    )
    def test_a_missing_component_is_named_with_the_folder_looked_in(self, missing, tmp_path):
        folder = shutil.copytree(SD, tmp_path / "model")
        target = folder / missing
        shutil.rmtree(target) if target.is_dir() else target.unlink()
        with pytest.raises(ConfigError) as caught:
            StableDiffusion(str(folder), LoRA())
        message = str(caught.value)
        assert str(folder / missing.split("/")[0]) in message
        assert "\n" not in message

    def test_truncated_weights_are_named(self, tmp_path):
        folder = shutil.copytree(SD, tmp_path / "model")
        weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
        weights.write_bytes(weights.read_bytes()[:1000])
        with pytest.raises(ConfigError, match="component 'unet', is damaged") as caught:
            StableDiffusion(str(folder), LoRA())
        assert "\n" not in str(caught.value)

    def test_a_folder_goes_before_the_hub_and_is_never_asked_of_it(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "organisation" / "name").mkdir(parents=True)
        assert Pretrained.find("organisation/name").local
        assert not Pretrained.find("organisation/other").local

    def test_folders_of_the_package_are_found_from_anywhere(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        assert Path(Pretrained.find("configs").location).parent.name == "experiments"

    def test_a_hub_id_may_name_a_subfolder_and_its_failure_says_so(self):
        seen = []

        def unreachable(location: str, **options: object) -> None:
            seen.append((location, options))
            raise OSError("no\nconnection")

        with pytest.raises(ConfigError, match=r"'mhdang/dpo/unet'.*cannot be fetched.*\(no connection\)"):
            Pretrained.find("mhdang/dpo/unet", revision="v1").load(unreachable)
        assert seen == [("mhdang/dpo", {"subfolder": "unet", "revision": "v1", "local_files_only": False})]
