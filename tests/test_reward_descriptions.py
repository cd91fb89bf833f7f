"""Every reward says what its scores depend on, in words that a protocol can keep and compare."""

import json
from pathlib import Path

import open_clip
import pytest
import torch
from reward_pictures import FOLDER
from test_open_clip_rewards import TINY

from lightning_modules.rewards import AestheticPredictor, PickScore, StepAwarePreferenceModel, as_reward_model
from lightning_modules.rewards.open_clip_models import CLIPScore, HPSv2
from lightning_modules.shapes.reward import ShapesReward

PICKSCORE, CLIP = str(FOLDER / "tiny-pickscore"), str(FOLDER / "tiny-clip")
HEAD, HPS = str(FOLDER / "sac+logos+ava1-l14-linearMSE.pth"), str(FOLDER / "HPS_v2.1_compressed.pt")
PROCESSOR = {"family": "short_side", "side": 224, "crop": 224, "crop_offset": "floor", "antialias": True,
             "rounded_to_8_bit": "first and after each pass"}  # fmt: skip


def brightness(images, prompts):
    return images.mean(dim=(1, 2, 3))


@pytest.fixture(scope="module", autouse=True)
def architecture(tmp_path_factory):
    folder = tmp_path_factory.mktemp("architectures")
    (folder / "ViT-tiny-hps.json").write_text(json.dumps(TINY))
    open_clip.add_model_config(folder)


def test_pickscore_names_its_scale_and_number_type():
    logit, cosine = PickScore(PICKSCORE, None), PickScore(PICKSCORE, None, scale="cosine", dtype="bf16")
    assert logit.described() == {
        "name": "pickscore",
        "class": "lightning_modules.rewards.pickscore.PickScore",
        "weights": PICKSCORE,
        "processor": PICKSCORE,
        "scale": "logit",
        "preprocessing": PROCESSOR,
        "dtype": "fp32",
    }
    assert cosine.described() == logit.described() | {"scale": "cosine", "dtype": "bf16"}
    assert logit.to(torch.float16).described()["dtype"] == "fp16"
    assert logit.double().described()["dtype"] == "float64"


@pytest.mark.parametrize(
    ("preprocessing", "said"),
    [
        ("letterbox", {"family": "letterbox", "side": 224, "antialias": True, "rounded_to_8_bit": "first"}),
        ("letterbox_without_antialias",
         {"family": "letterbox", "side": 224, "antialias": False, "rounded_to_8_bit": "first"}),
        ("short_side", {"family": "short_side", "side": 224, "crop_offset": "half to even", "antialias": True,
                        "rounded_to_8_bit": "first and after each pass"}),
    ],
)  # fmt: skip
def test_hps_names_its_version_and_preprocessing(preprocessing, said):
    reward = HPSv2("2.0", HPS, "ViT-tiny-hps", preprocessing)
    assert reward.described() == {
        "name": "hpsv2.0",
        "class": "lightning_modules.rewards.open_clip_models.HPSv2",
        "version": "2.0",
        "weights": HPS,
        "architecture": "ViT-tiny-hps",
        "scale": "cosine",
        "preprocessing": said,
        "dtype": "fp32",
    }


def test_clip_score_has_the_same_words_and_no_version():
    reward, hps = CLIPScore(HPS, "ViT-tiny-hps", "letterbox"), HPSv2("2.1", HPS, "ViT-tiny-hps")
    said = hps.described() | {"name": "clip_score", "class": "lightning_modules.rewards.open_clip_models.CLIPScore"}
    assert reward.described() == {name: value for name, value in said.items() if name != "version"}


def test_the_aesthetic_predictor_names_head_and_clip():
    said = AestheticPredictor(HEAD, CLIP).described()
    assert (said["name"], said["weights"], said["clip"]) == ("aesthetic", HEAD, CLIP)
    assert (said["preprocessing"], said["scale"], said["dtype"]) == (PROCESSOR, "rating of 1 to 10", "fp32")


def test_the_step_aware_model_does_not_antialias():
    folder = str(Path(__file__).parent / "pipelines" / "tiny-spm")
    said = StepAwarePreferenceModel(folder, None).described()
    assert (said["name"], said["weights"], said["processor"], said["scale"]) == ("step_aware", folder, folder, "logit")
    assert said["preprocessing"]["antialias"] is False
    assert said["preprocessing"]["side"] == said["preprocessing"]["crop"] == 28


def test_a_function_is_named_by_its_path():
    said = as_reward_model(brightness).described()
    assert (said["name"], said["function"]) == ("brightness", f"{__name__}.brightness")


@pytest.mark.parametrize(
    "make",
    [
        lambda: as_reward_model(brightness),
        ShapesReward,
        lambda: PickScore(PICKSCORE, None),
        lambda: HPSv2("2.1", HPS, "ViT-tiny-hps"),
        lambda: AestheticPredictor(HEAD, CLIP),
    ],
)
def test_what_is_said_is_the_same_after_json(make):
    said = make().described()
    assert json.loads(json.dumps(said)) == said
    assert {"name", "class"} <= said.keys()
