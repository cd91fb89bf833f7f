"""CPU time of scoring pictures, against the same network's own forwards on inputs that are ready.

    python tests/bench_rewards.py --pictures 8 --side 512 --rounds 3

The networks have random weights and the layers of CLIP ViT-L/14 and of BLIP-L (ViT-L/16). The forwards are one of the
picture network per picture, and one of the text network per different prompt; ImageReward's text network looks at the
picture, so that it has one per picture. Everything else is the reward's: 8-bit rounding, resizing, cropping,
tokenising, looking up texts. Rounds alternate between the two, so that other work on the machine meets both.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import open_clip
import torch
from reward_pictures import FOLDER
from test_image_reward import FILES
from test_open_clip_rewards import TINY
from torch.nn.functional import normalize
from transformers import BlipTextConfig, BlipVisionConfig, CLIPConfig, CLIPModel

from lightning_modules.rewards import PickScore
from lightning_modules.rewards.base import RewardModel
from lightning_modules.rewards.clip import image_embeds, text_embeds, tokenize
from lightning_modules.rewards.image_reward import ImageReward
from lightning_modules.rewards.image_reward_files import Network
from lightning_modules.rewards.open_clip_models import HPSv2

PROMPT = "a watercolour of a fox, number {} of many, in the snow behind a small wooden house at night"


def pickscore(images: torch.Tensor, prompts: list[str]) -> tuple[RewardModel, Callable[[], object]]:
    reward = PickScore(str(FOLDER / "tiny-pickscore"), None)
    vision = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
              "patch_size": 14, "image_size": 224}  # fmt: skip
    text = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    reward.model = CLIPModel(CLIPConfig(vision_config=vision, text_config=text, projection_dim=768))
    pixels = reward.preprocess(images)
    texts = [tokenize(reward.tokenizer, [prompt]) for prompt in dict.fromkeys(prompts)]

    def forwards() -> object:
        return image_embeds(reward.model, pixels), [text_embeds(reward.model, *both) for both in texts]

    return reward, forwards


def hps(images: torch.Tensor, prompts: list[str]) -> tuple[RewardModel, Callable[[], object]]:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "ViT-tiny-hps.json").write_text(json.dumps(TINY))
        open_clip.add_model_config(folder)
        reward = HPSv2("2.1", str(FOLDER / "HPS_v2.1_compressed.pt"), "ViT-tiny-hps")
    reward.model = open_clip.create_model("ViT-L-14", pretrained=None, precision="fp32")
    pixels = reward.preprocess(images)
    texts = [reward.tokenizer([prompt]) for prompt in dict.fromkeys(prompts)]

    def forwards() -> object:
        embeds = normalize(reward.model.encode_image(pixels), dim=-1)
        return embeds, [normalize(reward.model.encode_text(ids), dim=-1) for ids in texts]

    return reward, forwards


def image_reward(images: torch.Tensor, prompts: list[str]) -> tuple[RewardModel, Callable[[], object]]:
    reward = ImageReward(**FILES)
    vision = BlipVisionConfig(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16,
                              image_size=224, patch_size=16)  # fmt: skip
    reward.model = Network(vision, BlipTextConfig(num_attention_heads=12, encoder_hidden_size=1024))
    pixels, text = reward.preprocess(images), reward.tokenize(prompts)
    return reward, lambda: reward.model(pixels, *text)


MAKERS = {"pickscore": pickscore, "hps": hps, "image_reward": image_reward}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=8)
    parser.add_argument("--side", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rewards", nargs="+", choices=MAKERS, default=list(MAKERS))
    args = parser.parse_args()
    images = torch.rand(args.pictures, 3, args.side, args.side, generator=torch.Generator().manual_seed(0))
    prompts = [PROMPT.format(n // 4) for n in range(args.pictures)]  # four pictures of each
    for name in args.rewards:
        reward, forwards = MAKERS[name](images, prompts)

        def score(reward: RewardModel = reward) -> object:
            reward._texts.clear()  # every round encodes its prompts
            return reward.score(images, prompts)

        seconds: dict[str, list[float]] = {"scoring": [], "forwards": []}
        for _ in range(args.rounds + 1):
            for what, way in (("scoring", score), ("forwards", forwards)):
                start = time.process_time()
                with torch.no_grad():
                    way()
                seconds[what].append(time.process_time() - start)
        ratios = [one / other for one, other in zip(seconds["scoring"][1:], seconds["forwards"][1:])]  # warm
        spent = statistics.median(seconds["scoring"][1:]) / args.pictures
        middle, low, high = statistics.median(ratios), min(ratios), max(ratios)
        print(
            f"{reward.name}: {middle:.3f} ({low:.3f} to {high:.3f}) times its forwards, {spent:.2f} s per picture",
            flush=True,
        )


if __name__ == "__main__":
    main()
