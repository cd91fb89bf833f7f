"""The embedded flow world: a Stable Diffusion 3 of shapes, built, shipped, and with a LoRA trained on it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from safetensors.torch import load_file

import experiments
from datamodules.shapes.drawing import prompt_splits
from experiments import prepare_feedback, prepare_pickapic, run
from experiments.shapes import build_flow_pipeline
from experiments.shapes.build_pipeline import TOKENS, words
from lightning_modules.batches import DenoiserQuery
from lightning_modules.policies import Frozen, LoRA, StableDiffusion, StableDiffusion3
from lightning_modules.sampling.pictures import Sampler
from lightning_modules.shapes.reward import ShapesReward
from lightning_modules.shapes.world import SCENES

SHIPPED = Path(experiments.__file__).parent / "embedded" / "shapes_flow"
PROMPTS = list(prompt_splits()["test"][:12])


def plain(folder: Path) -> StableDiffusion3Pipeline:
    pipeline = StableDiffusion3Pipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def velocities(pipeline: StableDiffusion3Pipeline, latents: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
    """The transformer's answer to prompts as plain diffusers encodes them, at the tokenizer's own length."""
    prompts, pooled = (
        part
        for part in pipeline.encode_prompt(
            PROMPTS[: len(latents)], None, None, do_classifier_free_guidance=False, max_sequence_length=TOKENS
        )
        if part is not None
    )
    return pipeline.transformer(
        latents, encoder_hidden_states=prompts, pooled_projections=pooled, timestep=timesteps
    ).sample


def query(policy: StableDiffusion3) -> DenoiserQuery:
    latents = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    return DenoiserQuery(latents, torch.tensor([1000.0, 400.5, 30.0]), policy.encode_prompts(PROMPTS[:3]))


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pipelines") / "shapes_flow"
    build_flow_pipeline.main(["--output", str(folder)])
    return folder


@torch.no_grad()
def test_a_built_pipeline_gives_plain_diffusers_velocities(built: Path):
    policy = StableDiffusion3(str(built), Frozen()).eval()
    asked = query(policy)
    ours = policy.predict_noise(asked)
    torch.testing.assert_close(ours, velocities(plain(built), asked.latents, asked.timesteps), rtol=0, atol=1e-5)
    assert ours.std() > 0.1


@torch.no_grad()
def test_a_built_pipeline_draws_as_plain_diffusers(built: Path):
    policy, noise = StableDiffusion3(str(built), Frozen()).eval(), torch.randn(2, 4, 8, 8)
    ours = Sampler(3, 2.0).generate(policy, policy.predict_noise, PROMPTS[:2], noise, [])
    asked = {"num_inference_steps": 3, "guidance_scale": 2.0, "max_sequence_length": TOKENS, "output_type": "pt"}
    torch.testing.assert_close(ours, plain(built)(PROMPTS[:2], latents=noise, **asked).images, rtol=0, atol=1e-4)
    assert ours.shape[-2:] == (policy.image_size, policy.image_size) == (32, 32)


@torch.no_grad()
def test_its_first_text_encoder_is_the_embedded_worlds(built: Path):
    trained = StableDiffusion("embedded/shapes", Frozen()).eval()
    ours = StableDiffusion3(str(built), Frozen()).eval().text_encoder
    ids = trained.tokenizer(PROMPTS, padding="max_length", return_tensors="pt").input_ids
    expected, found = trained.text_encoder(ids), ours(ids)
    torch.testing.assert_close(found.last_hidden_state, expected.last_hidden_state, rtol=0, atol=1e-6)
    torch.testing.assert_close(found.text_embeds, expected.pooler_output, rtol=0, atol=1e-6)


def test_t5_has_a_token_of_every_word_and_no_caption_is_cut(built: Path):
    policy = StableDiffusion3(str(built), Frozen())
    ids = {word: policy.tokenizer_3(word).input_ids for word in words()}
    assert all(len(tokens) == 2 for tokens in ids.values())  # the word and the end
    assert len({tokens[0] for tokens in ids.values()}) == len(ids)
    assert max(len(policy.tokenizer_3(caption).input_ids) for caption in SCENES) <= policy.t5_tokens == TOKENS
    assert policy.tokenizer_3.unk_token_id not in policy.tokenizer_3("a purple hexagon").input_ids  # it is spelled


def test_trained_parts_are_assembled_and_text_encoders_are_those_that_were_trained_beside(built: Path, tmp_path: Path):
    other = tmp_path / "other"
    build_flow_pipeline.main(["--output", str(other), "--seed", "1"])
    export = tmp_path / "export"
    shutil.copytree(other / "transformer", export / "transformer")
    build_flow_pipeline.main(["--output", str(tmp_path / "new"), "--trained", str(built), str(export)])
    for name, source in (("transformer", export), ("vae", built), ("text_encoder_2", built), ("text_encoder_3", built)):
        (file,) = (tmp_path / "new" / name).glob("*.safetensors")
        (given,) = (source / name).glob("*.safetensors")
        stored, expected = load_file(file), load_file(given)
        dtype = torch.float32 if name.startswith("text") else torch.float16
        assert {value.dtype for value in stored.values()} == {dtype}
        assert all(torch.equal(stored[key], value.to(dtype)) for key, value in expected.items())


def test_the_shipped_pipeline_is_small_and_knows_no_path():
    files = [file for file in SHIPPED.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 8_000_000
    assert [file for file in files if file.suffix == ".json" and "_name_or_path" in file.read_text()] == []


def test_the_shipped_pipeline_draws_held_out_prompts_in_plain_diffusers():
    images = plain(SHIPPED)(
        PROMPTS,
        num_inference_steps=20,
        guidance_scale=2.0,
        max_sequence_length=TOKENS,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
    ).images
    assert images.shape == (12, 3, 32, 32)
    reward = ShapesReward().score(images, PROMPTS).mean()
    shuffled = ShapesReward().score(images, PROMPTS[1:] + PROMPTS[:1]).mean()
    assert reward > 0.2  # imperfect on purpose
    assert shuffled < reward / 2  # it draws what it is asked for


@pytest.mark.filterwarnings("ignore:.*dataloader is not resumable:UserWarning")
def test_the_commands_of_dpo_sd3_tiny_make_a_lora_that_plain_diffusers_loads_whole(tmp_path, monkeypatch):
    """On a handful of pairs."""
    monkeypatch.chdir(tmp_path)
    prepare_feedback.main(
        ["--config", "dpo_sd3_tiny", "--reward", "ShapesReward", "--sampler.guidance_scale=2", "--sampler.steps=2",
         "--pairs=4", "--candidates=2", "--prompts", "embedded/prompts/shapes_train.txt",
         "--output=data/shapes_flow/feedback"]
    )  # fmt: skip
    prepare_pickapic.main(
        ["--input", "data/shapes_flow/feedback", "--output", "data/shapes_flow/feedback-pairs", "--keep-ties"]
    )
    run.main(
        ["--config", "dpo_sd3_tiny", "--data.batch_size=2", "--trainer.max_steps=2",
         "--model.optimizer.lr=0.01", "--model.lr_scheduler.warmup_steps=1", "--trainer.enable_progress_bar=false",
         "--trainer.callbacks.SampleGrid=null", "--trainer.callbacks.WinRate=null"]
    )  # fmt: skip
    export = tmp_path / "runs" / "dpo_sd3_tiny" / "export" / "step=0000002"
    keys = load_file(export / "pytorch_lora_weights.safetensors")
    assert len(keys) == 2 * (3 * 8 + 7)  # the last block has no text output
    pipeline, policy = plain(SHIPPED), StableDiffusion3("embedded/shapes_flow", Frozen()).eval()
    asked = query(policy)
    with torch.no_grad():
        base = policy.predict_noise(asked)
        pipeline.load_lora_weights(export)
        aligned = policy.predict_noise(asked, pipeline.transformer)
        ours = StableDiffusion3("embedded/shapes_flow", LoRA(rank=16, weights=str(export))).eval().predict_noise(asked)
    loaded = {name for name, _ in pipeline.transformer.named_parameters() if ".lora_" in name}
    assert len(loaded) == len(keys)
    torch.testing.assert_close(ours, aligned, rtol=0, atol=2e-5)
    assert (aligned - base).abs().max() > 1e-3
