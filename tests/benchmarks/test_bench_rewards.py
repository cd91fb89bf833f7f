"""Scoring pictures, against the same network's own forwards on inputs that are ready.

From ``--size mid`` on the networks have the layers of CLIP ViT-L/14 and of BLIP-L (ViT-L/16), with random weights. The
forwards are one of the picture network per picture, and one of the text network per different prompt; ImageReward's
text network looks at the picture, so that it has one per picture. Everything else is the reward's: 8-bit rounding,
resizing, cropping, tokenising, looking up texts.
"""

import json

import open_clip
import pytest
import torch
from alternating import Clock, alternate
from reward_pictures import FOLDER
from test_image_reward import FILES
from test_open_clip_rewards import TINY
from torch.nn.functional import normalize
from transformers import BlipTextConfig, BlipVisionConfig, CLIPConfig, CLIPModel

from lightning_modules.rewards import PickScore
from lightning_modules.rewards.clip import image_embeds, text_embeds, tokenize
from lightning_modules.rewards.image_reward import ImageReward
from lightning_modules.rewards.image_reward_files import Network
from lightning_modules.rewards.open_clip_models import HPSv2

PICTURES = 8
PROMPT = "a watercolour of a fox, number {} of many, in the snow behind a small wooden house at night"
LARGE_VISION = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
                "image_size": 224}  # fmt: skip


def pickscore(images, prompts, large, folder):
    reward = PickScore(str(FOLDER / "tiny-pickscore"), None)
    if large:
        text = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
        vision = {**LARGE_VISION, "patch_size": 14}
        reward.model = CLIPModel(CLIPConfig(vision_config=vision, text_config=text, projection_dim=768))
    pixels = reward.preprocess(images)
    texts = [tokenize(reward.tokenizer, [prompt]) for prompt in dict.fromkeys(prompts)]
    return reward, lambda: (image_embeds(reward.model, pixels), [text_embeds(reward.model, *both) for both in texts])


def hps(images, prompts, large, folder):
    (folder / "ViT-tiny-hps.json").write_text(json.dumps(TINY))
    open_clip.add_model_config(folder)
    reward = HPSv2("2.1", str(FOLDER / "HPS_v2.1_compressed.pt"), "ViT-tiny-hps")
    if large:
        reward.model = open_clip.create_model("ViT-L-14", pretrained=None, precision="fp32")
    pixels = reward.preprocess(images)
    texts = [reward.tokenizer([prompt]) for prompt in dict.fromkeys(prompts)]

    def forwards():
        embeds = normalize(reward.model.encode_image(pixels), dim=-1)
        return embeds, [normalize(reward.model.encode_text(ids), dim=-1) for ids in texts]

    return reward, forwards


def image_reward(images, prompts, large, folder):
    reward = ImageReward(**FILES)
    if large:
        vision = BlipVisionConfig(**LARGE_VISION, patch_size=16)
        reward.model = Network(vision, BlipTextConfig(num_attention_heads=12, encoder_hidden_size=1024))
    pixels, text = reward.preprocess(images), reward.tokenize(prompts)
    return reward, lambda: reward.model(pixels, *text)


@pytest.mark.parametrize("make", [pickscore, hps, image_reward])
def test_scoring(make, size, tmp_path, rounds, rows):
    images = torch.rand(PICTURES, 3, size.side, size.side, generator=torch.Generator().manual_seed(0))
    prompts = [PROMPT.format(n // 4) for n in range(PICTURES)]  # four pictures of each
    reward, forwards = make(images, prompts, size.unet is not None, tmp_path)

    def score():
        reward._texts.clear()  # every round encodes its prompts
        return reward.score(images, prompts)

    with torch.no_grad():
        timings = alternate({"its networks' forwards": forwards, "scoring": score}, rounds, Clock("cpu"))
    rows.ratio(f"Scoring with {reward.name}", timings, "its networks' forwards", "scoring", pictures=PICTURES)
