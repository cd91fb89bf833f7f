"""LPO's latent reward model on the official code's weights and numbers: features, scores, files."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lightning_modules.errors import ConfigError
from lightning_modules.rewards import LatentRewardModel, latent_files
from lightning_modules.rewards.down_part import stage_means

KINDS = ("sd15", "sdxl")


def load(pipelines, kind, **options):
    return LatentRewardModel(str(pipelines / f"tiny-lrm-{kind}"), str(pipelines / f"tiny-{kind}"), **options)


@pytest.fixture(scope="module")
def models(pipelines):
    return {kind: load(pipelines, kind) for kind in KINDS}


def notes(request, kind):
    with safe_open(request.path.parent / "golden" / f"lrm_forward_{kind}.safetensors", "pt") as file:
        return {name: json.loads(value) if value.startswith("[") else value for name, value in file.metadata().items()}


def close(found, expected, relative):
    """Within so much of the largest."""
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= relative * expected.abs().max()


# The official numbers


@pytest.mark.parametrize("kind", KINDS)
def test_stages_features_and_scores_equal_the_official_ones(golden, models, request, kind):
    known, model, prompts = golden(f"lrm_forward_{kind}"), models[kind], notes(request, kind)["prompts"]
    read, n = model.read_prompts(prompts), len(prompts)
    close(read.context.embeds, known["unet.encoder_hidden_states"][:n], 1e-5)
    close(read.negative.embeds, known["unet.encoder_hidden_states"][n : n + 1], 1e-5)
    if kind == "sdxl":
        close(read.context.pooled, known["unet.text_embeds"][:n], 1e-5)
        close(read.negative.pooled, known["unet.text_embeds"][n : n + 1], 1e-5)  # of "", not zeros
        assert torch.equal(read.context.time_ids, known["unet.time_ids"][:n])
    latents, steps = known["latents"], known["timesteps"]
    stages = [known[name] for name in sorted(known) if name.startswith("unet.stage")]
    means = stage_means(model.unet, latents, steps, read.context)
    for found, expected in zip(means, [*stages, known["unet.mid"]]):
        close(found, expected[:n].mean(dim=(2, 3)), 5e-5)
    close(model.pooled(latents, steps, read), known["pooled_features"], 5e-5)
    expected = torch.nn.functional.normalize(known["image_features"], dim=-1)
    close(model.encode_seen(latents, steps, read), expected, 5e-5)
    close(read.text, torch.nn.functional.normalize(known["text_features"], dim=-1), 1e-5)
    torch.testing.assert_close(model.logit_scale, known["logit_scale_exp"])
    scores = model.score(latents, prompts, steps)
    close(scores, known["scores"], 5e-5)
    close(scores.double(), known["scores_fp64"], 5e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_scores_at_all_timesteps_of_other_prompts_and_of_other_sizes_equal_the_official_ones(
    golden, models, request, kind
):
    known, model, said = golden(f"lrm_forward_{kind}"), models[kind], notes(request, kind)
    steps = known["sweep.timesteps"]
    swept = model.score(known["latents"][:1].expand(len(steps), -1, -1, -1), said["prompts"][:1] * len(steps), steps)
    close(swept, known["sweep.scores"], 5e-5)
    for form in ("16x16", "8x16"):
        latents = known[f"size{form}.latents"]
        scores = model.score(latents, said["prompts"][:1] * 2, torch.tensor([301, 301]))
        close(scores, known[f"size{form}.scores"], 5e-5)
    crossed = model.score(known["latents"][:1].expand(3, -1, -1, -1), said["cross_prompts"], torch.tensor([501] * 3))
    close(crossed, known["cross.scores"], 5e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_without_guidance_there_is_one_pass_and_the_official_scores(golden, pipelines, request, kind):
    known, prompts = golden(f"lrm_forward_{kind}"), notes(request, kind)["prompts"]
    model, rows = load(pipelines, kind, guidance_scale=1.0), []
    model.unet.conv_in.register_forward_pre_hook(lambda conv, inputs: rows.append(len(inputs[0])))
    close(model.score(known["latents"], prompts, known["timesteps"]), known["cfg1.scores"], 5e-5)
    close(
        model.pooled(known["latents"], known["timesteps"], model.read_prompts(prompts)),
        known["cfg1.pooled_features"],
        5e-5,
    )
    assert rows == [6, 6]


@pytest.mark.parametrize("kind", KINDS)
def test_all_stages_guided_give_the_official_features_and_scores(golden, pipelines, request, kind):
    known, prompts = golden(f"lrm_forward_{kind}"), notes(request, kind)["prompts"]
    model = load(pipelines, kind, guided="all")
    pooled = model.pooled(known["latents"], known["timesteps"], model.read_prompts(prompts))
    close(pooled, known["allcfg.pooled_features"], 5e-5)
    close(model.score(known["latents"], prompts, known["timesteps"]), known["allcfg.scores"], 5e-5)


# Files


def weights_of(folder):
    return load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")


def write_weights(folder, weights):
    save_file(weights, folder / "unet" / "diffusion_pytorch_model.safetensors")


@pytest.fixture
def copied(pipelines, tmp_path):
    """A copy of the tiny SD 1.5 model whose files a test may change."""
    return shutil.copytree(pipelines / "tiny-lrm-sd15", tmp_path / "model")


def reload(folder, pipelines, **options):
    return LatentRewardModel(str(folder), str(pipelines / "tiny-sd15"), **options)


def some_scores(model):
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    return model.score(latents, ["a cat", "two dogs"], torch.tensor([951, 1]))


def test_the_up_part_is_never_read_and_may_be_missing_as_a_whole(models, copied, pipelines, monkeypatch):
    weights = weights_of(copied)
    up = {name for name in weights if name.startswith(("up_blocks.", "conv_norm_out.", "conv_out."))}
    assert up
    assert not any(
        name.startswith(("up_blocks.", "conv_norm_out", "conv_out")) for name in models["sd15"].unet.state_dict()
    )
    read, original = [], latent_files._read
    monkeypatch.setattr(latent_files, "_read", lambda files, names: read.extend(names) or original(files, names))
    reload(copied, pipelines)
    assert set(read) == weights.keys() - up
    write_weights(copied, {name: value for name, value in weights.items() if name not in up})
    assert torch.equal(some_scores(reload(copied, pipelines)), some_scores(models["sd15"]))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda w: w.pop("conv_in.bias"), r"1 \(conv_in.bias, ...\) missing"),
        (lambda w: w.pop("conv_out.bias"), r"1 \(conv_out.bias, ...\) missing"),  # a part of the up part is none
        (lambda w: w.update(extra=torch.zeros(1)), r"1 \(extra, ...\) unknown"),
        (lambda w: w.update({"conv_in.bias": torch.zeros(3)}), r"1 \(conv_in.bias, ...\) of another shape"),
    ],
    ids=["missing", "part of the up part", "unknown", "size"],
)
def test_a_unet_that_does_not_fit_is_one_clear_message(copied, pipelines, change, said):
    weights = weights_of(copied)
    change(weights)
    write_weights(copied, weights)
    with pytest.raises(ConfigError, match=said) as caught:
        reload(copied, pipelines)
    assert "\n" not in str(caught.value)


class Dangerous:
    """Something whose unpickling would run code."""

    def __reduce__(self):
        return (print, ("unpickled",))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        ("missing", "no state_dict.pt in"),
        ("code", "cannot be read"),
        ("truncated", "cannot be read"),
        ("list", "cannot be read"),
        ("no projection", r"1 \(text_projection, ...\) missing"),
        ("unknown", r"1 \(extra, ...\) unknown"),
        ("size", r"1 \(visual_projection, ...\) of another shape"),
    ],
)
def test_heads_that_do_not_fit_are_one_clear_message(copied, pipelines, damage, said):
    file = copied / "state_dict.pt"
    heads = torch.load(file, weights_only=True)
    if damage == "no projection":
        heads.pop("text_projection")
    elif damage == "unknown":
        heads["extra"] = {"weight": torch.zeros(2, 2)}
    elif damage == "size":
        heads["visual_projection"] = {"weight": torch.zeros(24, 5)}
    elif damage == "list":
        heads = [1.0]
    elif damage == "code":
        heads["logit_scale"] = Dangerous()
    torch.save(heads, file)
    if damage == "truncated":
        file.write_bytes(file.read_bytes()[:500])
    elif damage == "missing":
        file.unlink()
    with pytest.raises(ConfigError, match=said) as caught:
        reload(copied, pipelines)
    assert "\n" not in str(caught.value)


def test_what_does_not_belong_together_is_refused(copied, pipelines):
    config, weights = (copied / "text_encoder" / name for name in ("config.json", "model.safetensors"))
    config.write_text(json.dumps(json.loads(config.read_text()) | {"vocab_size": 500}))
    encoder, name = load_file(weights), "text_model.embeddings.token_embedding.weight"
    save_file(encoder | {name: encoder[name][:500].clone()}, weights, metadata={"format": "pt"})
    with pytest.raises(ConfigError, match="tokenizer of .* knows 578 tokens and its text encoder 500"):
        reload(copied, pipelines)
    with pytest.raises(ConfigError, match="tokenizer_2"):
        LatentRewardModel(str(pipelines / "tiny-lrm-sdxl"), str(pipelines / "tiny-sd15"))
    with pytest.raises(ConfigError, match="guidance_scale must be at least 1"):
        load(pipelines, "sd15", guidance_scale=0.5)
    with pytest.raises(ConfigError, match="is trained: leave it out"):
        load(pipelines, "sd15", text_projection="x.safetensors")


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_saved_is_in_the_published_form_and_scores_the_same(models, pipelines, tmp_path, kind):
    published, folder = pipelines / f"tiny-lrm-{kind}", tmp_path / "saved"
    models[kind].save_pretrained(folder)
    models[kind].save_pretrained(folder)  # in the place of an older one
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]
    files = sorted(str(path.relative_to(published)) for path in published.rglob("*") if path.is_file())
    assert sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()) == files
    for name in files:
        if name.endswith(".safetensors"):
            here, there = load_file(folder / name), load_file(published / name)
            assert here.keys() == there.keys()
            assert all(torch.equal(here[key], there[key]) for key in there)
    here, there = (torch.load(place / "state_dict.pt", weights_only=True) for place in (folder, published))
    assert here.keys() == there.keys()
    assert float(here["logit_scale"]) == pytest.approx(float(there["logit_scale"]))
    again = LatentRewardModel(str(folder), str(pipelines / f"tiny-{kind}"))
    assert torch.equal(some_scores(again), some_scores(models[kind]))


def test_an_export_without_the_up_part_is_smaller_and_scores_the_same(models, pipelines, tmp_path):
    load(pipelines, "sd15", export_up_part=False).save_pretrained(tmp_path / "small", "fp16")
    small, whole = weights_of(tmp_path / "small"), weights_of(pipelines / "tiny-lrm-sd15")
    assert not any(name.startswith("up_blocks.") for name in small)
    assert sum(value.numel() for value in small.values()) < 0.6 * sum(value.numel() for value in whole.values())
    found, known = (some_scores(model) for model in (reload(tmp_path / "small", pipelines), models["sd15"]))
    torch.testing.assert_close(found, known, rtol=0, atol=0.3)  # of up to 100: weights rounded to fp16


def test_weights_in_several_files_are_read_together(models, copied, pipelines):
    weights, folder = weights_of(copied), copied / "unet"
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    for number, names in enumerate((sorted(weights)[::2], sorted(weights)[1::2]), start=1):
        part = {name: weights[name] for name in names}
        save_file(part, folder / f"diffusion_pytorch_model-{number:05d}-of-00002.safetensors")
    assert torch.equal(some_scores(reload(copied, pipelines)), some_scores(models["sd15"]))
    for file in folder.glob("*.safetensors"):
        file.unlink()
    with pytest.raises(ConfigError, match="not found in|no diffusion_pytorch_model"):
        reload(copied, pipelines)


# A new one


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_model_starts_as_the_base_with_small_projections(pipelines, tmp_path, kind):
    torch.manual_seed(3)
    base = str(pipelines / f"tiny-{kind}")
    model = LatentRewardModel(base, base, untrained=True)
    known = weights_of(pipelines / f"tiny-{kind}")
    assert all(torch.equal(value, known[name]) for name, value in model.unet.state_dict().items())
    assert model.logit_scale.item() == pytest.approx(1 / 0.07)
    assert model.visual_projection.weight.std() == pytest.approx(0.02, rel=0.1)
    assert (
        model.visual_projection.weight.shape[1]
        == sum(model.unet.config.block_out_channels) + model.unet.config.block_out_channels[-1]
    )
    assert some_scores(model).isfinite().all()


def test_a_new_models_text_projection_starts_as_clips(pipelines, tmp_path):
    base, file = str(pipelines / "tiny-sd15"), tmp_path / "clip.safetensors"
    save_file({"text_projection.weight": torch.arange(320.0).reshape(10, 32), "other": torch.zeros(1)}, file)
    model = LatentRewardModel(base, base, untrained=True, text_projection=str(file))
    assert torch.equal(model.text_projection.weight, torch.arange(320.0).reshape(10, 32))
    assert model.visual_projection.weight.shape == (10, 80)
    save_file({"text_projection.weight": torch.zeros(10, 33)}, file)
    with pytest.raises(
        ConfigError, match=r"one of shape \(10, 33\) where a text_projection.weight for texts of width 32"
    ):
        LatentRewardModel(base, base, untrained=True, text_projection=str(file))


# As a scorer


def test_prompts_are_read_once_until_a_weight_changes(pipelines):
    model, calls = load(pipelines, "sd15"), []
    model.text_encoder.register_forward_hook(lambda *_: calls.append(1))
    first = some_scores(model)
    assert torch.equal(some_scores(model), first)
    assert len(calls) == 1
    with torch.no_grad():
        model.text_projection.weight.neg_()
    torch.testing.assert_close(some_scores(model), -first)
    assert len(calls) == 2


def test_it_scores_in_its_own_number_type_without_gradient_and_means_are_fp32(models, pipelines):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = some_scores(models["sd15"])
    assert torch.equal(scores, some_scores(models["sd15"]))
    assert not scores.requires_grad
    assert not any(parameter.requires_grad for parameter in models["sd15"].parameters())
    half = load(pipelines, "sd15", dtype="bf16")
    assert half.unet.conv_in.weight.dtype == half.text_encoder.dtype == torch.bfloat16
    assert half.visual_projection.weight.dtype == torch.float32
    assert some_scores(half).dtype == torch.float32
    assert not torch.equal(some_scores(half), some_scores(half).bfloat16().float())
