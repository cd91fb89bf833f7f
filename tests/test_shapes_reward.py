"""The embedded world's grammar and its exact reward."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from torch import Tensor

from datamodules.shapes.drawing import draw, random_numbers
from lightning_modules.errors import DataError
from lightning_modules.shapes.reward import ShapesReward
from lightning_modules.shapes.world import COLOURS, SCENES, Scene

CAPTIONS = list(SCENES)
REWARD = ShapesReward()


def clean(caption: str, layout: int = 0) -> Image.Image:
    return draw(Scene.parse(caption), random_numbers("test", caption, layout))


def pixels(*pictures: Image.Image) -> Tensor:
    return torch.stack([torch.from_numpy(np.asarray(p) / np.float32(255)).permute(2, 0, 1) for p in pictures])


@pytest.fixture(scope="module")
def drawings() -> Tensor:
    return pixels(*(clean(caption) for caption in CAPTIONS))


def test_the_grammar_has_216_captions_and_each_says_its_scene():
    assert len(CAPTIONS) == 3 * 2 * 4 * 3 * 3
    assert all(Scene.parse(caption).caption == caption for caption in CAPTIONS)
    expected = Scene(count=2, size="large", colour="green", shape="triangle", background="white")
    assert Scene.parse("two large green triangles on a white background") == expected
    assert Scene.parse(" One small red circle on a black background ").count == 1


@pytest.mark.parametrize("prompt", ["", "a cat", "two large green triangle on a white background"])
def test_an_unknown_prompt_is_refused_by_name(prompt: str):
    with pytest.raises(DataError, match="cannot judge the prompt " + repr(prompt)):
        REWARD.score(torch.zeros(1, 3, 32, 32), [prompt])


def test_pictures_of_another_size_are_refused():
    with pytest.raises(DataError, match="measures 3 x 32 x 32"):
        REWARD.score(torch.zeros(1, 3, 64, 64), CAPTIONS[:1])


def test_every_clean_drawing_scores_above_0_9(drawings: Tensor):
    scores = REWARD.score(drawings, CAPTIONS)
    assert scores.min() > 0.9
    assert scores.max() <= 1


@pytest.mark.parametrize("gray", [0.0, 0.04, 0.5, 0.97, 1.0])
def test_a_blank_picture_scores_nothing(gray: float):
    assert REWARD.score(torch.full((216, 3, 32, 32), gray), CAPTIONS).max() < 0.05


def test_noise_scores_nothing():
    noise = torch.rand(216, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert REWARD.score(noise, CAPTIONS).max() < 0.05


@pytest.mark.parametrize("word", ["count", "size", "colour", "shape", "background"])
def test_one_wrong_word_makes_correctness_nearly_zero(drawings: Tensor, word: str):
    words = {
        "count": (1, 2, 3),
        "size": ("small", "large"),
        "colour": tuple(COLOURS),
        "shape": ("circle", "square", "triangle"),
        "background": ("white", "gray", "black"),
    }[word]
    asked = []
    for scene in SCENES.values():
        fields = vars(scene) | {word: words[(words.index(getattr(scene, word)) + 1) % len(words)]}
        asked.append(Scene(**fields).caption)
    parts = REWARD.parts(drawings, asked)
    assert parts["correctness"].max() < 0.15
    assert parts["correctness"].mean() < 0.05


def test_the_score_is_correctness_times_look(drawings: Tensor):
    parts = REWARD.parts(drawings, CAPTIONS)
    assert set(parts) == {"correctness", "look"}
    torch.testing.assert_close(REWARD.score(drawings, CAPTIONS), parts["correctness"] * parts["look"])


def degraded(kind: str, strength: float) -> Tensor:
    """Every drawing, spoiled in one way; strength 0 leaves it alone."""
    if kind == "blur":
        return pixels(*(clean(c).filter(ImageFilter.GaussianBlur(1.5 * strength)) for c in CAPTIONS))
    images = pixels(*(clean(c) for c in CAPTIONS))
    if kind == "wash":
        return images + 0.6 * strength * (0.5 - images)
    if kind == "tint":
        return images + strength * torch.tensor([0.2, -0.1, 0.15])[:, None, None]
    return images + 0.15 * strength * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", ["blur", "wash", "tint", "grain"])
def test_the_reward_and_the_look_fall_with_every_degradation(kind: str):
    strengths = (0.0, 0.4, 0.6, 0.8, 1.0)
    seen = [degraded(kind, strength) for strength in strengths]
    looks = torch.stack([REWARD.parts(images, CAPTIONS)["look"].mean() for images in seen])
    scores = torch.stack([REWARD.score(images, CAPTIONS).mean() for images in seen])
    assert (looks.diff() < -0.01).all(), looks
    assert (scores.diff() < -0.01).all(), scores


def test_a_little_washing_out_leaves_the_content_correct():
    assert REWARD.parts(degraded("wash", 0.4), CAPTIONS)["correctness"].min() > 0.7


def test_where_the_objects_lie_does_not_matter():
    caption = "one large blue triangle on a white background"
    layouts = pixels(*(clean(caption, layout) for layout in range(64)))
    scores = REWARD.score(layouts, [caption] * 64)
    assert scores.max() - scores.min() < 0.1


def test_mirrored_pictures_score_the_same(drawings: Tensor):
    torch.testing.assert_close(
        REWARD.score(drawings.flip(3), CAPTIONS), REWARD.score(drawings, CAPTIONS), atol=2e-3, rtol=0
    )


def test_a_picture_is_scored_alone_as_in_company(drawings: Tensor):
    together = REWARD.score(drawings[:20], CAPTIONS[:20])
    alone = torch.cat([REWARD.score(drawings[i : i + 1], CAPTIONS[i : i + 1]) for i in range(20)])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)
