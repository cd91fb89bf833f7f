"""Base models as people publish them: every weight is read, another kind is refused in one line, nothing is guessed."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file

from lightning_modules import prompt_lengths
from lightning_modules.errors import ConfigError
from lightning_modules.policies import LoRA, StableDiffusion, StableDiffusionXL, TinyDecoder
from lightning_modules.policies import stable_diffusion as module
from lightning_modules.rewards import PickScore
from lightning_modules.rewards import clip as judge
from lightning_modules.rewards.step_aware import StepAwarePreferenceModel
from lightning_modules.weights import pretrained

WEIGHTS = {
    "unet": "unet/diffusion_pytorch_model.safetensors",
    "vae": "vae/diffusion_pytorch_model.safetensors",
    "text_encoder": "text_encoder/model.safetensors",
}


@pytest.fixture
def folder(tmp_path, pipelines):
    return Path(shutil.copytree(pipelines / "tiny-sd15", tmp_path / "model"))


@pytest.fixture
def told(monkeypatch):
    lines = []
    for place in (module, pretrained, prompt_lengths):
        monkeypatch.setattr(place, "rank_zero_info", lines.append)
    return lines


def edit(path, **changes):
    config = json.loads(path.read_text())
    path.write_text(json.dumps({key: value for key, value in (config | changes).items() if value != "gone"}))


def renamed(file, rename):
    content = {new: value for name, value in load_file(file).items() if (new := rename(name)) is not None}
    save_file(content, file, metadata={"format": "pt"})


def refused(build, match):
    with pytest.raises(ConfigError, match=match) as caught:
        build()
    assert "\n" not in str(caught.value)


class TestKeys:
    @pytest.mark.parametrize("component", WEIGHTS)
    @pytest.mark.parametrize("fault", ["other prefix", "missing", "unknown", "shape"])
    def test_a_network_whose_weights_are_not_all_there_is_refused(self, folder, component, fault):
        file = folder / WEIGHTS[component]
        first = min(load_file(file))
        if fault == "other prefix":
            renamed(file, lambda name: f"module.{name}")
        elif fault == "missing":
            renamed(file, lambda name: None if name == first else name)
        elif fault == "unknown":
            save_file(load_file(file) | {"another.weight": torch.zeros(1)}, file, metadata={"format": "pt"})
        else:
            save_file(load_file(file) | {first: torch.zeros(7)}, file, metadata={"format": "pt"})
        found = {"missing": "1 .* missing", "unknown": "1 .* unknown", "shape": "1 .* of another shape"}
        match = f"component '{component}', does not hold the weights.*{found.get(fault, 'missing')}"
        refused(lambda: StableDiffusion(str(folder), LoRA()), match)

    def test_buffers_of_older_transformers_are_no_fault(self, folder):
        file = folder / WEIGHTS["text_encoder"]
        old = {"text_model.embeddings.position_ids": torch.arange(77)[None]}
        save_file(load_file(file) | old, file, metadata={"format": "pt"})
        StableDiffusion(str(folder), LoRA())

    @pytest.mark.parametrize("reward", [PickScore, StepAwarePreferenceModel])
    def test_rewards_are_audited_too(self, tmp_path, pipelines, reward):
        place = shutil.copytree(pipelines / "tiny-pickscore", tmp_path / "reward")
        renamed(Path(place) / "model.safetensors", lambda name: None if name == "visual_projection.weight" else name)
        refused(lambda: reward(str(place), processor=None), "1 .visual_projection.weight, .*missing")

    def test_a_tiny_decoder_is_audited_too(self, tmp_path):
        from diffusers import AutoencoderTiny

        AutoencoderTiny(encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8),
                        num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1)).save_pretrained(tmp_path)  # fmt: skip
        TinyDecoder(str(tmp_path))
        renamed(tmp_path / "diffusion_pytorch_model.safetensors", lambda name: f"x.{name}")
        refused(lambda: TinyDecoder(str(tmp_path)), "does not hold the weights of the AutoencoderTiny")


class TestKind:
    def test_sdxl_in_the_class_of_sd_and_the_reverse(self, pipelines):
        refused(lambda: StableDiffusion(str(pipelines / "tiny-sdxl"), LoRA()), "set model.policy to StableDiffusionXL")
        refused(lambda: StableDiffusionXL(str(pipelines / "tiny-sd15"), LoRA()), "set model.policy to StableDiffusion,")

    def test_a_model_for_inpainting(self, folder):
        file = folder / WEIGHTS["unet"]
        weights = load_file(file)
        first = weights["conv_in.weight"]
        save_file(weights | {"conv_in.weight": first.repeat(1, 3, 1, 1)[:, :9].contiguous()}, file)
        edit(folder / "unet" / "config.json", in_channels=9)
        refused(lambda: StableDiffusion(str(folder), LoRA()), "reads 9 channels .* have 4; models for inpainting")

    def test_another_class(self, folder):
        edit(folder / "unet" / "config.json", _class_name="FluxTransformer2DModel")
        refused(lambda: StableDiffusion(str(folder), LoRA()), "of the class FluxTransformer2DModel, and a UNet2DCond")

    def test_a_unet_of_another_text_encoder(self, folder, tmp_path):
        edit(folder / "unet" / "config.json", cross_attention_dim=24)
        file = folder / WEIGHTS["unet"]
        narrow = {n: v[:, :24].contiguous() if ".attn2.to_k" in n or ".attn2.to_v" in n else v
                  for n, v in load_file(file).items()}  # fmt: skip
        save_file(narrow, file, metadata={"format": "pt"})
        refused(lambda: StableDiffusion(str(folder), LoRA()), "reads text of width 24")

    def test_a_scheduler_of_rectified_flows(self, folder):
        path = folder / "scheduler" / "scheduler_config.json"
        path.write_text(json.dumps({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}))
        refused(lambda: StableDiffusion(str(folder), LoRA()), "FlowMatchEulerDiscreteScheduler is no discrete diff")

    @pytest.mark.parametrize("length", ["gone", 10**30])
    def test_a_tokenizer_that_does_not_say_where_to_cut(self, folder, pipelines, length):
        edit(folder / "tokenizer" / "tokenizer_config.json", model_max_length=length)
        cond = StableDiffusion(str(folder), LoRA()).encode_prompts(["a cat " * 90])
        expected = StableDiffusion(str(pipelines / "tiny-sd15"), LoRA()).encode_prompts(["a cat " * 90])
        assert torch.equal(cond.embeds, expected.embeds)

    def test_a_tokenizer_with_more_tokens_than_the_text_encoder(self, folder):
        file = folder / WEIGHTS["text_encoder"]
        name = next(name for name in load_file(file) if name.endswith("token_embedding.weight"))
        save_file(load_file(file) | {name: load_file(file)[name][:-1]}, file, metadata={"format": "pt"})
        vocabulary = len(load_file(file)[name])
        edit(folder / "text_encoder" / "config.json", vocab_size=vocabulary)
        refused(lambda: StableDiffusion(str(folder), LoRA()), f"tokens and its text encoder {vocabulary}")


class TestFiles:
    def half(self, folder, *components):
        for component in components:
            file = folder / WEIGHTS[component]
            weights = {name: value.half() for name, value in load_file(file).items()}
            save_file(weights, file.with_suffix(".fp16.safetensors"), metadata={"format": "pt"})
            file.unlink()

    def test_weights_that_are_there_as_a_variant_alone(self, folder):
        self.half(folder, *WEIGHTS)
        refused(lambda: StableDiffusion(str(folder), LoRA()), "has the variant fp16 alone; set the policy's `variant`")
        StableDiffusion(str(folder), LoRA(), variant="fp16")

    def test_components_without_the_variant_give_their_plain_files_and_that_is_told(self, folder, told):
        self.half(folder, "unet")
        StableDiffusion(str(folder), LoRA(), variant="fp16")
        assert [line for line in told if "has no variant 'fp16'" in line and "'vae'" in line]
        assert len(told) == 2

    def test_what_may_not_be_read_is_not_called_damaged(self):
        def read(location, **options):
            raise OSError("cannot load") from PermissionError(13, "Permission denied")

        place = pretrained.Pretrained("x", "x", local=False)
        with pytest.raises(ConfigError, match="'x' cannot be read; allow this user"):
            place.load(read)

    def test_a_lora_folder_and_a_single_file_in_place_of_a_model(self, folder, tmp_path):
        StableDiffusion(str(folder), LoRA()).save_pretrained(tmp_path / "lora")
        refused(lambda: StableDiffusion(str(folder), LoRA(), unet=str(tmp_path / "lora")), "adaptation.weights")
        file = tmp_path / "model.safetensors"
        save_file({"x": torch.zeros(1)}, file)
        refused(lambda: StableDiffusion(str(file), LoRA()), "is a single file")
        refused(lambda: StableDiffusion("models/none.safetensors", LoRA()), "no file 'models/none.safetensors'")


class TestScheduler:
    @pytest.mark.parametrize("offset", [0, "gone"])
    def test_an_offset_of_0_is_taken_as_1_as_diffusers_does_and_told(self, folder, told, offset):
        edit(folder / "scheduler" / "scheduler_config.json", steps_offset=offset)
        policy = StableDiffusion(str(folder), LoRA())
        assert [step.timestep for step in policy.schedule.trajectory(20)][:2] == [951, 901]
        assert told == ["the scheduler's steps_offset 0 is taken as 1, as diffusers' pipeline does"]

    def test_sdxl_keeps_its_own(self, tmp_path, pipelines, told):
        folder = Path(shutil.copytree(pipelines / "tiny-sdxl", tmp_path / "model"))
        edit(folder / "scheduler" / "scheduler_config.json", steps_offset=0)
        assert StableDiffusionXL(str(folder), LoRA()).schedule.trajectory(20)[0].timestep == 950
        assert told == []

    def test_trained_betas_are_the_schedule_as_in_diffusers(self, folder):
        edit(folder / "scheduler" / "scheduler_config.json", trained_betas=torch.linspace(0.001, 0.015, 1000).tolist())
        ours = StableDiffusion(str(folder), LoRA()).schedule
        theirs = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None).scheduler
        assert torch.equal(ours.alphas_cumprod, theirs.alphas_cumprod)

    def test_thresholding_is_refused(self, folder):
        edit(folder / "scheduler" / "scheduler_config.json", thresholding=True)
        refused(lambda: StableDiffusion(str(folder), LoRA()), "thresholding is for models of pixels")


class TestPictures:
    def test_a_shift_of_the_latents_is_taken_off_and_put_on(self, folder, pipelines):
        edit(folder / "vae" / "config.json", shift_factor=0.25)
        shifted, plain = (StableDiffusion(str(place), LoRA()) for place in (folder, pipelines / "tiny-sd15"))
        images = torch.rand(1, 3, 64, 64) * 2 - 1
        factor = plain.vae.config.scaling_factor
        latents = plain.encode_images(images)
        torch.testing.assert_close(shifted.encode_images(images), latents - 0.25 * factor)
        torch.testing.assert_close(shifted.decode(latents - 0.25 * factor), plain.decode(latents))

    def test_draws_have_the_posteriors_standard_deviation(self, pipelines):
        policy = StableDiffusion(str(pipelines / "tiny-sd15"), LoRA())
        images = torch.rand(1, 3, 64, 64) * 2 - 1
        posterior = policy.vae.encode(images).latent_dist
        drawn = policy.encode_images(images, [torch.Generator().manual_seed(3)])
        noise = torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(3))
        expected = (posterior.mean + posterior.logvar.exp().sqrt() * noise) * policy.vae.config.scaling_factor
        torch.testing.assert_close(drawn, expected)


class TestLongPrompts:
    long = "two large green triangles on a white background " * 40

    def test_the_policy_counts_different_ones_and_tells_of_the_first_and_the_tenth(self, pipelines, told, monkeypatch):
        monkeypatch.setattr(module, "CUT_PROMPTS", prompt_lengths.CutPrompts("the policy's text encoder"))
        policy = StableDiffusion(str(pipelines / "tiny-sd15"), LoRA())
        policy.encode_prompts(["a cat", "", "a " * 75])
        assert told == []
        policy.encode_prompts([self.long, "a cat", self.long])
        policy.encode_prompts([self.long])
        assert len(told) == 1
        assert "1 prompt so far is longer than the 77 tokens that the policy's text encoder reads" in told[0]
        policy.encode_prompts([f"{n} {self.long}" for n in range(11)])
        assert [line.split()[0] for line in told] == ["1", "10"]
        assert module.CUT_PROMPTS.count == 12

    def test_a_reward_tells_too(self, pipelines, told, monkeypatch):
        monkeypatch.setattr(judge, "CUT_PROMPTS", prompt_lengths.CutPrompts("CLIP as a judge"))
        reward = PickScore(str(pipelines / "tiny-pickscore"), processor=None)
        reward.score(torch.rand(2, 3, 32, 32), ["a cat", self.long])
        assert len(told) == 1
        assert "CLIP as a judge reads" in told[0]
