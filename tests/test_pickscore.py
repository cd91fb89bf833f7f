"""PickScore equals what the published recipe computes with transformers' own processor."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import reward_pictures
import torch
from PIL import Image
from transformers import AutoProcessor, CLIPModel

from lightning_modules.errors import ConfigError
from lightning_modules.rewards import PickScore

FOLDER = str(Path(__file__).parent / "pipelines" / "tiny-pickscore")
PROMPTS = ["a cat", "two dogs on the moon " * 30, ""]
ONE_LEVEL = 1 / 255 / 0.26  # one 8-bit level after normalisation


def pictures(height=64, width=64, n=3):
    return np.random.default_rng(0).integers(0, 256, (n, height, width, 3), dtype=np.uint8)


def as_tensor(arrays):
    return torch.from_numpy(arrays).permute(0, 3, 1, 2) / 255


def published_scores(arrays, prompts):
    """The model card's recipe: features through CLIPModel's own forward, which normalises them."""
    processor, model = AutoProcessor.from_pretrained(FOLDER), CLIPModel.from_pretrained(FOLDER).eval()
    inputs = processor(
        images=[Image.fromarray(array) for array in arrays],
        text=prompts,
        padding=True,
        truncation=True,
        max_length=77,
        return_tensors="pt",
    )
    with torch.no_grad():
        return model(**inputs).logits_per_image.diagonal()


@pytest.mark.parametrize("size", [(64, 64), (50, 91), (97, 40), (28, 28), (20, 33)])
def test_preprocessing_agrees_with_the_image_processor_within_one_8_bit_level(size):
    arrays = pictures(*size, n=1)
    expected = AutoProcessor.from_pretrained(FOLDER).image_processor(
        images=Image.fromarray(arrays[0]), return_tensors="pt"
    )
    got = PickScore(FOLDER, None).preprocess(as_tensor(arrays))
    assert got.shape == expected.pixel_values.shape
    assert (got - expected.pixel_values).abs().max() < ONE_LEVEL


def test_scores_are_the_published_recipes():
    # Pictures of the model's own size are not resized, so nothing is rounded.
    arrays = pictures(28, 28)
    scores = PickScore(FOLDER, None).score(as_tensor(arrays), PROMPTS)
    torch.testing.assert_close(scores, published_scores(arrays, PROMPTS), rtol=1e-5, atol=1e-4)


def test_resized_pictures_score_as_published_up_to_the_rounding():
    arrays = pictures(64, 64)
    scores = PickScore(FOLDER, None).score(as_tensor(arrays), PROMPTS)
    # 20 = exp(logit_scale): 0.1 is half a hundredth of cosine.
    torch.testing.assert_close(scores, published_scores(arrays, PROMPTS), rtol=0, atol=0.1)


def test_the_two_scales_differ_by_the_exponent_of_the_logit_scale():
    logit, cosine = PickScore(FOLDER, None), PickScore(FOLDER, None, scale="cosine")
    images = as_tensor(pictures())
    ratio = logit.score(images, PROMPTS) / cosine.score(images, PROMPTS)
    torch.testing.assert_close(ratio, logit.model.logit_scale.exp().expand(3))
    assert cosine.score(images, PROMPTS).abs().max() <= 1


def test_a_picture_scores_the_same_alone_and_in_a_batch():
    reward, images = PickScore(FOLDER, None), as_tensor(pictures())
    together = reward.score(images, PROMPTS)
    alone = torch.cat([reward.score(images[i : i + 1], PROMPTS[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)


def test_scores_are_fp32_without_gradient_in_any_precision_and_under_autocast():
    images = as_tensor(pictures())
    exact = PickScore(FOLDER, None)
    expected = exact.score(images, PROMPTS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(exact.score(images, PROMPTS), expected)
    reduced = PickScore(FOLDER, None, dtype="bf16").score(images, PROMPTS)
    assert reduced.dtype == expected.dtype == torch.float32
    assert not expected.requires_grad
    assert (reduced - expected).abs().max() < 0.05 * 20  # bf16 has 8 bits; the scale is 20


def test_it_is_frozen_and_stays_in_eval_mode():
    reward = PickScore(FOLDER, None).train()
    assert not any(module.training for module in reward.modules())
    assert not any(parameter.requires_grad for parameter in reward.parameters())


def test_unequal_numbers_of_pictures_and_prompts_are_refused():
    with pytest.raises(ValueError, match="3 pictures and 1 prompts"):
        PickScore(FOLDER, None).score(as_tensor(pictures()), ["a cat"])


def test_a_missing_folder_is_one_clear_message():
    with pytest.raises(ConfigError, match=r"no folder '\./nowhere'"):
        PickScore("./nowhere", None)


def test_pixels_and_scores_are_the_published_ones(golden):
    """Pictures of other sizes than the model's, as the published code prepares and scores them."""
    reward, known = PickScore(str(reward_pictures.FOLDER / "tiny-pickscore"), None), golden("reward_pickscore")
    pixels = torch.cat([reward.preprocess(picture)[..., ::7, ::7] for picture in reward_pictures.pictures()])
    torch.testing.assert_close(pixels, known["pixels"], rtol=0, atol=1e-6)
    scores = reward_pictures.scored(reward)
    torch.testing.assert_close(scores, known["scores.logit"], rtol=0, atol=1e-4)
    cosines = scores / known["logit_scale"].exp()
    torch.testing.assert_close(cosines, known["scores.cosine"], rtol=0, atol=1e-5)
