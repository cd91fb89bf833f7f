"""ImageReward gives the published code's scores, from the published files' layout."""

import json

import pytest
import torch
from PIL import Image
from reward_pictures import FOLDER, PROMPTS, pictures, scored
from torchvision.transforms.functional import pil_to_tensor

from lightning_modules.errors import ConfigError
from lightning_modules.rewards.image_reward import ImageReward
from lightning_modules.rewards.image_reward_files import renamed

FILES = {
    "pretrained": str(FOLDER / "ImageReward.pt"),
    "med_config": str(FOLDER / "med_config.json"),
    "tokenizer": str(FOLDER / "bert-base-uncased"),
    "vision_heads": 4,
}


@pytest.fixture(scope="module")
def known(golden):
    return golden("reward_image_reward")


@pytest.fixture(scope="module")
def reward():
    return ImageReward(**FILES)


@pytest.fixture(scope="module")
def as_published():
    """The pictures as the official code meets them: the one with alpha is resized with it, and loses it then."""
    found = pictures()
    with Image.open(FOLDER / "images" / "3_rgba_300x240.png") as picture:
        resized = picture.resize((280, 224), Image.Resampling.BICUBIC).convert("RGB")
    found[3] = pil_to_tensor(resized)[None] / 255
    return found


def test_ids_and_pixels_are_the_published_ones(reward, known, as_published):
    ids, mask = reward.tokenize(PROMPTS)
    assert torch.equal(ids, known["token_ids"])
    assert torch.equal(mask, known["attention_mask"])
    pixels = torch.cat([reward.preprocess(picture)[..., ::7, ::7] for picture in as_published])
    torch.testing.assert_close(pixels, known["pixels"], rtol=0, atol=1e-6)


def test_features_and_scores_are_the_published_ones(reward, known, as_published):
    pixels = torch.cat([reward.preprocess(picture) for picture in as_published])
    ids, mask = reward.tokenize(PROMPTS)
    with torch.no_grad():
        seen = reward.model.image_tokens(pixels)
        first = reward.model.first_token(seen, ids, mask)
        raw = reward.model(pixels, ids, mask)
    torch.testing.assert_close(seen[:, :5], known["image_embeds"], rtol=0, atol=1e-5)
    torch.testing.assert_close(seen.double().norm(dim=(1, 2)), known["image_embeds_norm"], rtol=0, atol=1e-4)
    torch.testing.assert_close(first, known["text_cls"], rtol=0, atol=1e-5)
    torch.testing.assert_close(raw, known["mlp_output"], rtol=0, atol=1e-5)
    scores = torch.cat([reward.score(picture, [prompt]) for picture, prompt in zip(as_published, PROMPTS)])
    torch.testing.assert_close(scores, known["scores"], rtol=0, atol=1e-5)


def test_every_picture_against_every_prompt(reward, known, as_published):
    matrix = torch.stack([reward.score(picture.expand(6, -1, -1, -1), PROMPTS) for picture in as_published])
    torch.testing.assert_close(matrix, known["score_matrix"], rtol=0, atol=1e-5)
    ranks = matrix[:, 0].argsort(descending=True).argsort() + 1
    assert torch.equal(ranks, known["ranks_of_prompt0"])


def test_padding_is_not_read(reward):
    """The known answers alone would not tell: a prompt without its padding has the same score."""
    pixels = reward.preprocess(pictures()[0])
    ids, mask = reward.tokenize(PROMPTS[:1])
    length = int(mask.sum())
    with torch.no_grad():
        whole, short = reward.model(pixels, ids, mask), reward.model(pixels, ids[:, :length], mask[:, :length])
        read = reward.model(pixels, ids, torch.ones_like(mask))
    torch.testing.assert_close(whole, short, rtol=0, atol=1e-5)
    assert (whole - read).abs() > 1e-3


def test_a_score_can_be_repeated_from_the_saved_picture(reward):
    drawn = torch.rand(2, 3, 300, 260, generator=torch.Generator().manual_seed(0))
    saved = (drawn * 255).round() / 255
    assert torch.equal(reward.score(drawn, ["a", "b"]), reward.score(saved, ["a", "b"]))


def test_norms_have_the_published_epsilon(reward):
    """Which the known answers do not tell either."""
    vision, text = reward.model.vision.config, reward.model.text.config
    assert (vision.layer_norm_eps, text.layer_norm_eps) == (1e-6, 1e-12)


def test_in_half_the_bits_the_score_is_close_and_fp32(reward):
    half = ImageReward(**FILES, dtype="bf16")
    assert half.described()["dtype"] == "bf16"
    scores = scored(half)
    assert scores.dtype == torch.float32
    assert (scores - scored(reward)).abs().max() < 0.1


def test_it_says_what_its_scores_depend_on(reward):
    assert reward.described() == {
        "name": "image_reward",
        "class": "lightning_modules.rewards.image_reward.ImageReward",
        "weights": FILES["pretrained"],
        "tokenizer": FILES["tokenizer"],
        "scale": "standardised",
        "preprocessing": {
            "family": "short_side",
            "side": 224,
            "crop_offset": "half to even",
            "antialias": True,
            "rounded_to_8_bit": "first and after each pass",
        },
        "dtype": "fp32",
    }


@pytest.mark.parametrize(
    ("published", "here"),
    [
        ("blip.visual_encoder.blocks.11.norm2.bias", "vision.encoder.layers.11.layer_norm2.bias"),
        ("blip.visual_encoder.norm.bias", "vision.post_layernorm.bias"),
        ("blip.visual_encoder.blocks.0.mlp.fc1.weight", "vision.encoder.layers.0.mlp.fc1.weight"),
        ("blip.text_encoder.encoder.layer.1.crossattention.self.key.weight",
         "text.encoder.layer.1.crossattention.self.key.weight"),
        ("mlp.layers.7.bias", "head.layers.7.bias"),
    ],
)  # fmt: skip
def test_names_of_weights(published, here):
    assert renamed(published) == here


def _saved(folder, change):
    weights = torch.load(FILES["pretrained"], weights_only=True)
    change(weights)
    torch.save(weights, folder / "changed.pt")
    return {"pretrained": str(folder / "changed.pt")}


def _sizes(folder, change):
    sizes = json.loads((FOLDER / "med_config.json").read_text())
    (folder / "changed.json").write_text(json.dumps(change(sizes)))
    return {"med_config": str(folder / "changed.json")}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda folder: {"pretrained": "nowhere.pt"}, "ImageReward: no checkpoint 'nowhere.pt'"),
        (lambda folder: {"med_config": "nowhere.json"}, "ImageReward: no checkpoint 'nowhere.json'; give a .json file"),
        (lambda folder: {"tokenizer": "./nowhere"}, r"no folder '\./nowhere'"),
        (lambda folder: {"vision_heads": 5}, "vision_heads must divide the vision network's width 32, got 5"),
        (lambda folder: {"vision_heads": 0}, "vision_heads must divide"),
        (lambda folder: {"pretrained": str(FOLDER / "sac+logos+ava1-l14-linearMSE.pth")}, "missing"),
        (lambda folder: _saved(folder, lambda weights: weights.pop("mlp.layers.7.bias")),
         r"1 \(head.layers.7.bias, ...\) missing, 0 unknown, 0 of another shape"),
        (lambda folder: _saved(folder, lambda weights: weights.update(extra=torch.zeros(1))),
         r"0 missing, 1 \(extra, ...\) unknown"),
        (lambda folder: _sizes(folder, lambda sizes: sizes | {"hidden_size": 16}), "of another shape"),
        (lambda folder: _sizes(folder, lambda sizes: sizes | {"hidden_size": "8"}), "does not hold the sizes"),
        (lambda folder: _sizes(folder, lambda sizes: {}), "does not hold the sizes"),
        (lambda folder: _sizes(folder, lambda sizes: []), "does not hold the sizes"),
    ],
)  # fmt: skip
def test_files_that_do_not_fit_are_one_clear_line(tmp_path, change, told):
    with pytest.raises(ConfigError, match=told) as error:
        ImageReward(**(FILES | change(tmp_path)))
    assert "\n" not in str(error.value)
