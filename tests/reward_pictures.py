"""The pictures and prompts on which the published scorers were run; picture i goes with prompt i."""

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image

FOLDER = Path(__file__).parent / "rewards"
PROMPTS = json.loads((FOLDER / "prompts.json").read_text())


def pictures():
    """Six of different sizes, in [0, 1], as files of 8 bits give them; a grey one and one with alpha as RGB."""
    files = sorted((FOLDER / "images").iterdir())
    arrays = [np.array(Image.open(file).convert("RGB")) for file in files]
    return [torch.from_numpy(array).permute(2, 0, 1)[None].float() / 255 for array in arrays]


def scored(reward, prompts=PROMPTS):
    return torch.cat([reward.score(picture, [prompt]) for picture, prompt in zip(pictures(), prompts)])
