"""The step-aware preference model equals the official code on its own weights, and plain CLIP before training."""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from lightning_modules.errors import ConfigError
from lightning_modules.rewards import PickScore, StepAwarePreferenceModel
from lightning_modules.rewards.clip import text_embeds
from lightning_modules.rewards.time_conditioning import modulated_layer

TIGHT = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(scope="module")
def known(golden):
    return golden("spm_forward")


@pytest.fixture(scope="module")
def model(pipelines):
    """The published checkpoint's form on a CLIP folder of the same size."""
    folder = pipelines / "tiny-spm"
    return StepAwarePreferenceModel(str(folder), None, checkpoint=str(folder / "official_style_ckpt.bin"))


@pytest.fixture(scope="module")
def prompts(known, pipelines):
    tokenizer = AutoTokenizer.from_pretrained(pipelines / "tiny-spm")
    return [tokenizer.decode(ids, skip_special_tokens=True) for ids in known["input_ids"]]


def unit(images):
    return images / 2 + 0.5


def text_vectors(model, ids):
    return text_embeds(model.model, ids, torch.ones_like(ids))


def normalised(features):
    return torch.nn.functional.normalize(features, dim=-1)


def test_time_embedding_every_layer_and_the_pooled_features_equal_the_official_ones(model, known):
    vision, time = model.model.vision_model, model.model.t_embedder(known["timesteps"])
    torch.testing.assert_close(time, known["t_emb"], **TIGHT)
    hidden = vision.pre_layrnorm(vision.embeddings(known["pixel_values"]))
    for number, layer in enumerate(vision.encoder.layers):
        hidden = modulated_layer(layer, hidden, time)
        torch.testing.assert_close(hidden, known[f"vision_layer_{number}"], **TIGHT)
    torch.testing.assert_close(hidden, known["vision_last_hidden_state"], **TIGHT)
    features = model.encode_pixels(known["pixel_values"], known["timesteps"])
    torch.testing.assert_close(features, normalised(known["image_features"]), **TIGHT)


def test_text_features_equal_the_official_ones_and_ignore_the_padding(model, known, prompts):
    expected = normalised(known["text_features"])
    torch.testing.assert_close(text_vectors(model, known["input_ids"]), expected, **TIGHT)
    torch.testing.assert_close(model.encode_text(prompts), expected, **TIGHT)


def test_preprocessing_is_both_official_ones(model, known):
    """Clamping first or last is the only difference between them, and decoded pictures come clamped."""
    images = unit(known["images"])
    torch.testing.assert_close(model.preprocess(images), known["pixel_values"], **TIGHT)
    torch.testing.assert_close(model.preprocess(images.clamp(0, 1)), known["pixel_values_train_preproc"], **TIGHT)
    for form in ("rect", "rect2"):
        pixels = model.preprocess(unit(known[f"images_{form}"]))
        torch.testing.assert_close(pixels, known[f"pixel_values_{form}"], **TIGHT)


@pytest.mark.parametrize("form", ["", "_rect", "_rect2", "_train_preproc"])
def test_scores_equal_the_official_ones(model, known, prompts, form):
    images = unit(known["images"]).clamp(0, 1) if form == "_train_preproc" else unit(known[f"images{form}"])
    scores = model.score(images, prompts, known["timesteps"])
    torch.testing.assert_close(scores, known[f"scores{form}"], rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(model.logit_scale, known["logit_scale"])


def test_scores_of_one_picture_at_every_inference_timestep_equal_the_official_ones(model, known, prompts):
    steps = known["sweep_timesteps"]
    images = unit(known["images"][:1]).expand(len(steps), -1, -1, -1)
    scores = model.score(images, prompts[:1] * len(steps), steps)
    torch.testing.assert_close(scores, known["sweep_scores_image0"], rtol=1e-5, atol=1e-4)
    assert scores.std() > 0.01  # it does look at the time


def test_a_finished_picture_is_judged_at_t_0(model, known, prompts):
    images, n = unit(known["images"]), len(prompts)
    assert torch.equal(model.score(images, prompts), model.score(images, prompts, torch.zeros(n, dtype=torch.int64)))
    assert not torch.equal(model.score(images, prompts), model.score(images, prompts, torch.ones(n, dtype=torch.int64)))


def test_a_plain_clip_folder_becomes_a_model_that_scores_exactly_as_it_at_any_time(pipelines):
    folder = str(pipelines / "tiny-pickscore")
    plain, aware = PickScore(folder, None), StepAwarePreferenceModel(folder, None)
    # Of the model's size and of 8 bits: nothing is resized or rounded.
    images = torch.randint(256, (3, 3, 28, 28), generator=torch.Generator().manual_seed(0)) / 255
    prompts = ["a cat", "two dogs", ""]
    expected = torch.cat([plain.score(images[i : i + 1], prompts[i : i + 1]) for i in range(3)])
    for timesteps in (None, torch.tensor([0, 500, 999])):
        torch.testing.assert_close(aware.score(images, prompts, timesteps), expected, rtol=1e-6, atol=1e-6)
    pixels = plain.preprocess(images)
    official = plain.model.visual_projection(plain.model.vision_model(pixel_values=pixels).pooler_output)
    assert torch.equal(aware.encode_pixels(pixels, torch.tensor([0, 500, 999])), normalised(official))


def test_training_moves_the_time_conditioning_from_its_start(pipelines):
    aware = StepAwarePreferenceModel(str(pipelines / "tiny-pickscore"), None).requires_grad_(True)
    images = torch.rand(2, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    aware.encode_images(images, torch.tensor([10, 900])).sum().backward()
    layers = aware.model.vision_model.encoder.layers
    assert all(layer.adaLN_modulation[1].weight.grad.abs().max() > 0 for layer in layers)


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_what_is_saved_scores_the_same_when_it_is_loaded(model, known, prompts, tmp_path, dtype):
    model.save_pretrained(tmp_path / "saved", dtype)
    model.save_pretrained(tmp_path / "saved", dtype)  # in the place of an older one
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]
    loaded = StepAwarePreferenceModel(str(tmp_path / "saved"), None)
    arguments = (unit(known["images"]), prompts, known["timesteps"])
    tolerance = {"rtol": 0, "atol": 0} if dtype == "fp32" else {"rtol": 0, "atol": 0.05}  # of a scale of 39
    torch.testing.assert_close(loaded.score(*arguments), model.score(*arguments), **tolerance)
    weights = load_file(tmp_path / "saved" / "model.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.float32 if dtype == "fp32" else torch.float16}


def test_weights_named_as_published_load_from_safetensors_too(model, known, prompts, pipelines):
    folder = pipelines / "tiny-spm"
    arguments = (unit(known["images"]), prompts, known["timesteps"])
    for options in ({}, {"checkpoint": str(folder / "model.safetensors")}):
        loaded = StepAwarePreferenceModel(str(folder), None, **options)
        assert torch.equal(loaded.score(*arguments), model.score(*arguments))


class Dangerous:
    """Something whose unpickling would run code."""

    def __reduce__(self):
        return (print, ("unpickled",))


@pytest.mark.parametrize("damage", ["missing", "unknown", "size", "list", "truncated", "code"])
def test_a_checkpoint_that_does_not_fit_is_one_clear_message(pipelines, tmp_path, damage):
    folder, bad = pipelines / "tiny-spm", tmp_path / "bad.bin"
    weights = torch.load(folder / "official_style_ckpt.bin", weights_only=True)
    name = "model.vision_model.adaLN_modulation.1.bias"
    if damage == "missing":
        weights.pop(name)
    elif damage == "unknown":
        weights["model.extra"] = torch.zeros(1)
    elif damage == "size":
        weights[name] = torch.zeros(3)
    elif damage == "list":
        weights = list(weights.values())
    elif damage == "code":
        weights = {name: Dangerous()}
    torch.save(weights, bad)
    if damage == "truncated":
        bad.write_bytes(bad.read_bytes()[:5000])
    expected = {
        "missing": r"1 \(vision_model.adaLN_modulation.1.bias, ...\) missing",
        "unknown": r"1 \(extra, ...\) unknown",
        "size": r"1 \(vision_model.adaLN_modulation.1.bias, ...\) of another shape",
        "list": "no state dict",
        "truncated": "cannot be read",
        "code": "cannot be read",
    }
    with pytest.raises(ConfigError, match=expected[damage]) as caught:
        StepAwarePreferenceModel(str(folder), None, checkpoint=str(bad))
    assert "\n" not in str(caught.value)
    assert str(bad) in str(caught.value)


def test_a_checkpoint_of_another_size_than_the_clip_model_is_refused(pipelines, tmp_path):
    weights = load_file(pipelines / "tiny-spm" / "model.safetensors")
    weights["visual_projection.weight"] = torch.zeros(8, 32)
    folder = tmp_path / "spm"
    shutil.copytree(pipelines / "tiny-spm", folder)
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(ConfigError, match=r"1 \(visual_projection.weight, ...\) of another shape"):
        StepAwarePreferenceModel(str(folder), None)


def test_a_missing_checkpoint_is_one_clear_message(pipelines):
    with pytest.raises(ConfigError, match=r"no checkpoint 'nowhere/spm\.bin'"):
        StepAwarePreferenceModel(str(pipelines / "tiny-spm"), None, checkpoint="nowhere/spm.bin")


def test_each_text_is_encoded_once_while_the_model_is_frozen(model, known, prompts):
    calls = []
    handle = model.model.text_model.register_forward_hook(lambda *_: calls.append(1))
    model.to(torch.float32)  # forgets
    arguments = (unit(known["images"]), [prompts[0], prompts[1], prompts[0], prompts[1], prompts[0]])
    first = model.score(*arguments)
    assert len(calls) == 2
    assert torch.equal(model.score(*arguments), first)
    assert len(calls) == 2
    handle.remove()


def test_texts_are_encoded_again_after_a_step_of_training_also_once_the_model_is_frozen(pipelines):
    aware = StepAwarePreferenceModel(str(pipelines / "tiny-spm"), None)
    images, prompts = torch.rand(2, 3, 28, 28), ["a cat", "two dogs"]
    before = aware.requires_grad_(True).score(images, prompts)
    with torch.no_grad():
        aware.model.text_projection.weight.neg_()
    torch.testing.assert_close(aware.requires_grad_(False).score(images, prompts), -before)


def test_a_frozen_model_under_autocast_scores_in_fp32_without_gradient(model, known, prompts):
    arguments = (unit(known["images"]), prompts, known["timesteps"])
    expected = model.score(*arguments)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = model.score(*arguments)
    assert torch.equal(scores, expected)
    assert not scores.requires_grad
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not any(module.training for module in model.train().modules())
