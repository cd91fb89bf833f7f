"""Makes the embedded world's preference model as it is before training: a tiny CLIP that shares the pipeline's words.

    python -m experiments.build_shapes_preference --output runs/shapes_preference
    python -m experiments.run --config spm_tiny

The text tower starts as the pipeline's trained text encoder, the vision tower from random weights.
"""

from __future__ import annotations

import argparse
import os
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTextModel, CLIPTokenizer

from experiments.command import run_command
from lightning_modules.errors import ConfigError
from lightning_modules.pretrained import Pretrained
from lightning_modules.rewards.shapes import SIDE

# 64 patches of 4 x 4 pixels. With its time conditioning the model has 1.2 M parameters, 2.3 MB in fp16.
VISION = {
    "image_size": SIDE,
    "patch_size": 4,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
}
PROJECTION = 64


def build(folder: Path, pipeline: str, seed: int) -> None:
    """Writes a plain CLIP model with tokenizer and image processor, in fp32."""
    source = Pretrained.find(pipeline)
    tokenizer: Any = source.component("tokenizer").load(CLIPTokenizer.from_pretrained, kind="tokenizer")
    text: Any = source.component("text_encoder").load(partial(CLIPTextModel.from_pretrained, dtype=torch.float32))
    torch.manual_seed(seed)
    clip: Any = CLIPModel(
        CLIPConfig(text_config=text.config.to_dict(), vision_config=VISION, projection_dim=PROJECTION)
    )
    clip.text_model.load_state_dict(text.state_dict())
    clip.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    CLIPImageProcessor(
        size={"shortest_edge": SIDE},
        crop_size={"height": SIDE, "width": SIDE},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    ).save_pretrained(folder)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder to make; must not exist")
    parser.add_argument("--pipeline", default="embedded/shapes", help="whose tokenizer and text encoder to take")
    parser.add_argument("--seed", type=int, default=0, help="of the random weights")
    options = parser.parse_args(arguments)
    if options.output.exists():
        raise ConfigError(f"{options.output} exists already: name a new folder, or delete it first")
    options.output.parent.mkdir(parents=True, exist_ok=True)
    unfinished = options.output.with_name(f".{options.output.name}.{os.getpid()}.new")
    try:
        build(unfinished, options.pipeline, options.seed)
        unfinished.replace(options.output)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


if __name__ == "__main__":
    run_command(main)
