"""HPS v2 and CLIPScore give the published code's scores, from the published files' layout."""

import json

import open_clip
import pytest
import torch
from reward_pictures import FOLDER, PROMPTS, pictures, scored

from lightning_modules.errors import ConfigError
from lightning_modules.rewards.open_clip_models import CLIPScore, HPSv2

WEIGHTS = str(FOLDER / "HPS_v2.1_compressed.pt")
TINY = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 224, "layers": 2, "width": 32, "head_width": 16, "patch_size": 14},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 8, "heads": 2, "layers": 2},
}
FAMILIES = {"letterbox": "letterbox_antialias", "letterbox_without_antialias": "letterbox_no_antialias",
            "short_side": "short_side_pil"}  # fmt: skip

ALL, WITHOUT_ALPHA = [0, 1, 2, 3, 4, 5], [0, 1, 2, 4, 5]
# Pillow resizes a picture with alpha by its alpha, and drops it then; the letterbox code was given it as RGB.
COMPARED = {"letterbox": ALL, "letterbox_without_antialias": ALL, "short_side": WITHOUT_ALPHA}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """ViT-H-14 of reduced sizes, as open_clip knows architectures."""
    folder = tmp_path_factory.mktemp("architectures")
    (folder / "ViT-tiny-hps.json").write_text(json.dumps(TINY))
    open_clip.add_model_config(folder)
    return {"pretrained": WEIGHTS, "architecture": "ViT-tiny-hps"}


@pytest.mark.parametrize("preprocessing", FAMILIES)
def test_hps_is_the_published_one(tiny, golden, preprocessing):
    known, family = golden("reward_hpsv2"), FAMILIES[preprocessing]
    reward = HPSv2(**tiny, preprocessing=preprocessing)
    pixels = torch.cat([reward.preprocess(picture) for picture in pictures()])
    rows = COMPARED[preprocessing]
    torch.testing.assert_close(pixels[rows][..., ::7, ::7], known[f"pixels.{family}"][rows], rtol=0, atol=2e-6)
    torch.testing.assert_close(scored(reward)[rows], known[f"scores.{family}"][rows], rtol=0, atol=1e-5)
    assert torch.equal(reward.tokenizer(PROMPTS), known["token_ids"])
    matrix = torch.stack([reward.score(picture.expand(6, -1, -1, -1), PROMPTS) for picture in pictures()])
    torch.testing.assert_close(matrix[rows], known[f"score_matrix.{family}"][rows], rtol=0, atol=1e-5)
    assert reward.name == "hpsv2.1"


@pytest.mark.parametrize(("preprocessing", "paper"), [("letterbox", "diffusion_dpo"), ("short_side", "sdpo")])
def test_clip_score_is_the_published_one(tiny, golden, preprocessing, paper):
    known = golden("reward_clip_score")
    reward = CLIPScore(**tiny, preprocessing=preprocessing)
    rows = COMPARED[preprocessing]
    torch.testing.assert_close(scored(reward)[rows], known[f"scores.{paper}"][rows], rtol=0, atol=1e-5)
    assert torch.equal(reward.tokenizer(PROMPTS), known["token_ids"])


def test_the_defaults_are_the_current_packages(tiny):
    assert HPSv2(**tiny).preprocessing == "letterbox"
    assert CLIPScore(**tiny).preprocessing == "short_side"


def test_each_text_goes_through_the_text_tower_once(tiny):
    reward, calls = HPSv2(**tiny), []
    reward.model.transformer.register_forward_hook(lambda *_: calls.append(1))
    picture = pictures()[0].expand(4, -1, -1, -1)
    for _ in range(2):
        reward.score(picture, ["a", "b", "a", "b"])
    assert len(calls) == 2


def test_in_half_the_bits_the_score_is_close_and_fp32(tiny):
    score = scored(HPSv2(**tiny, dtype="bf16"))
    assert score.dtype == torch.float32
    assert (score - scored(HPSv2(**tiny))).abs().max() < 0.05


def test_making_one_leaves_the_global_generator_alone(tiny):
    state = torch.get_rng_state()
    HPSv2(**tiny)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"pretrained": "nowhere.pt"}, "HPSv2: no checkpoint 'nowhere.pt'"),
        ({"architecture": "ViT-Z"}, "HPSv2: open_clip has no architecture 'ViT-Z'"),
        ({"pretrained": str(FOLDER / "sac+logos+ava1-l14-linearMSE.pth")}, "is no ViT-tiny-hps: .* missing"),
    ],
)
def test_weights_that_do_not_fit_are_one_clear_line(tiny, change, told):
    with pytest.raises(ConfigError, match=told) as error:
        HPSv2(**(tiny | change))
    assert "\n" not in str(error.value)
