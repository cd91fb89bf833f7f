"""The aesthetic predictor gives the published code's scores, from the published files' layout."""

import pytest
import torch
from reward_pictures import FOLDER, PROMPTS, pictures, scored

from lightning_modules.errors import ConfigError
from lightning_modules.rewards.aesthetic import AestheticPredictor
from lightning_modules.rewards.linear_head import LinearHead

HEAD = str(FOLDER / "sac+logos+ava1-l14-linearMSE.pth")
CLIP = str(FOLDER / "tiny-clip")


@pytest.fixture(scope="module")
def known(golden):
    return golden("reward_aesthetic")


@pytest.fixture(scope="module")
def reward():
    return AestheticPredictor(HEAD, CLIP)


def test_pixels_and_scores_are_the_published_ones(reward, known):
    pixels = torch.cat([reward.preprocess(picture)[..., ::7, ::7] for picture in pictures()])
    torch.testing.assert_close(pixels, known["pixels"], rtol=0, atol=1e-6)
    torch.testing.assert_close(scored(reward), known["scores.transformers"], rtol=0, atol=1e-5)


def test_no_prompt_changes_a_score(reward):
    assert torch.equal(scored(reward), scored(reward, [*reversed(PROMPTS)]))


def test_the_published_head_is_one_linear_map_of_unit_vectors(known):
    """Its weights collapsed to one vector and a number, and back into layers of which all but one do nothing."""
    head = LinearHead(768).requires_grad_(False).eval()
    for layer in head.layers:
        if hasattr(layer, "weight"):
            torch.nn.init.zeros_(layer.weight)
            torch.nn.init.zeros_(layer.bias)
            layer.weight[0, 0] = 1.0
    head.layers[0].weight[0] = known["published_head.collapsed_weight"]
    head.layers[7].bias.copy_(known["published_head.collapsed_bias"])
    torch.testing.assert_close(head(known["published_head.inputs"]), known["published_head.scores"], rtol=0, atol=1e-5)


def test_a_score_can_be_repeated_from_the_saved_picture(reward):
    drawn = torch.rand(2, 3, 300, 260, generator=torch.Generator().manual_seed(0))
    saved = (drawn * 255).round() / 255
    assert torch.equal(reward.score(drawn, ["", ""]), reward.score(saved, ["", ""]))


def test_a_head_of_another_form_is_one_clear_line(tmp_path):
    weights = torch.load(HEAD, weights_only=True)
    weights["layers.9.weight"] = weights.pop("layers.7.weight")
    torch.save(weights, tmp_path / "relu.pth")
    with pytest.raises(
        ConfigError, match=r"relu.pth is no linear head on .*1 \(layers.7.weight, ...\) missing"
    ) as error:
        AestheticPredictor(str(tmp_path / "relu.pth"), CLIP)
    assert "\n" not in str(error.value)
    with pytest.raises(ConfigError, match="AestheticPredictor: no checkpoint 'nowhere.pth'"):
        AestheticPredictor("nowhere.pth", CLIP)
