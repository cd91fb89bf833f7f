"""Makes the embedded world's PickScore: a tiny CLIP, trained on preferences between freshly drawn, clean pictures.

    python -m experiments.shapes.build_preference --output runs/shapes_preference
    python -m experiments.run --config spm_tiny

It is to the step-aware preference model what PickScore is to the published ones: where its training starts. The text
tower starts as the pipeline's trained text encoder, the vision tower from random weights. Each step sees new pairs of
imperfect drawings, judged by the exact reward, and PickScore's loss with in-batch negatives (arXiv 2305.01569).
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTextModel, CLIPTokenizer

from datamodules.shapes.drawing import as_unit, draw_imperfect, prompt_splits, random_numbers
from experiments.cli.command import run_command
from experiments.shapes.prepare import MISREAD, TIE
from lightning_modules.errors import ConfigError
from lightning_modules.files import atomic_folder
from lightning_modules.learning_rates import CosineWithWarmup
from lightning_modules.preference_loss import agreement, preference_loss
from lightning_modules.progress import tracked
from lightning_modules.randomness import derive_seed
from lightning_modules.rewards.clip import image_embeds, text_embeds, tokenize
from lightning_modules.shapes.reward import ShapesReward
from lightning_modules.shapes.world import SIDE, Scene
from lightning_modules.weights.pretrained import Pretrained

# 16 patches of 8 x 8 pixels. With its time conditioning the model has 1.1 M parameters, 2.3 MB in fp16. 64 patches of
# 4 x 4 learned no faster a step and cost three times as much.
VISION = {
    "image_size": SIDE,
    "patch_size": 8,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
}
PROJECTION = 64
BATCH = 64  # pairs per step
RATE = 1e-3  # the learning rate's peak: a tenth of the steps up, then down to 0


def untrained(pipeline: str, seed: int) -> tuple[Any, Any]:
    """A CLIP model in fp32 that shares the pipeline's words, and its tokenizer."""
    source = Pretrained.find(pipeline)
    tokenizer: Any = source.component("tokenizer").load(CLIPTokenizer.from_pretrained, kind="tokenizer")
    text: Any = source.component("text_encoder").load_model(CLIPTextModel, torch.float32)
    torch.manual_seed(seed)
    words = text.config.to_dict()
    words.pop("_name_or_path", None)  # a path of this machine, which the exported model would carry on
    clip: Any = CLIPModel(CLIPConfig(text_config=words, vision_config=VISION, projection_dim=PROJECTION))
    clip.text_model.load_state_dict(text.state_dict())
    return clip, tokenizer


def drawn_pairs(step: int, seed: int) -> tuple[Float[Tensor, "n 3 h w"], list[str], Float[Tensor, " b"]]:
    """Pictures in [0, 1], all pairs' first ones, then the second; prompts; probability that the first is preferred."""
    known = prompt_splits()["train"]
    numbers = range(step * BATCH, (step + 1) * BATCH)
    prompts = [known[derive_seed(seed, "preference model's prompt", j) % len(known)] for j in numbers]
    pictures = [
        draw_imperfect(Scene.parse(prompt), random_numbers(seed, "preference model's picture", j, k), MISREAD)
        for k in (0, 1)
        for j, prompt in zip(numbers, prompts, strict=True)
    ]
    images = as_unit(torch.stack(pictures))
    first, second = ShapesReward().score(images, prompts * 2).chunk(2)
    gap = first - second
    return images, prompts, torch.where(gap.abs() > TIE, (gap > 0).float(), torch.full_like(gap, 0.5))


def train(clip: Any, tokenizer: Any, steps: int, seed: int, preferences: bool = True) -> float:
    """Train in place; the accuracy over the last tenth of the steps, each judged before it was learned from.

    Args:
        preferences: False calls every pair a tie, so that only pictures and their prompts are learned.
    """
    optimizer = torch.optim.AdamW(clip.parameters(), lr=RATE, weight_decay=0.05)
    rate = CosineWithWarmup(optimizer, total_steps=steps, warmup_steps=steps // 10)
    right = []
    for step in tracked(range(steps), "learning, step"):
        images, prompts, labels = drawn_pairs(step, seed)
        first, second = image_embeds(clip, images * 2 - 1).chunk(2)
        text = text_embeds(clip, *tokenize(tokenizer, prompts))
        scale, weights = clip.logit_scale.exp(), torch.ones_like(labels)
        told = labels if preferences else torch.full_like(labels, 0.5)
        loss = preference_loss(first, second, text, scale, told, weights, in_batch_negatives=True)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(clip.parameters(), 1.0)
        optimizer.step()
        rate.step()
        right.append(agreement(((first - second) * text).sum(-1).detach(), labels))
    return torch.stack(right[-max(1, steps // 10) :]).mean().item()


def build(folder: Path, pipeline: str, steps: int, seed: int, preferences: bool) -> None:
    """Writes the trained CLIP model with tokenizer and image processor, in fp32."""
    clip, tokenizer = untrained(pipeline, seed)
    accuracy = train(clip, tokenizer, steps, seed, preferences)
    print(f"after {steps} steps it sides with the exact reward on {accuracy:.1%} of new pairs that are no ties")
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
    parser.add_argument("--steps", type=int, default=2000, help=f"of {BATCH} new pairs each")
    parser.add_argument("--seed", type=int, default=0, help="of the random weights and of all pictures")
    parser.add_argument(
        "--matching",
        action="store_true",
        help="learn which prompt a picture belongs to, as CLIP does, and no preference",
    )
    options = parser.parse_args(arguments)
    if options.steps < 1:
        raise ConfigError(f"--steps must be at least 1, got {options.steps}")
    if options.output.exists():
        raise ConfigError(f"{options.output} exists already: name a new folder, or delete it first")
    with atomic_folder(options.output) as unfinished:
        build(unfinished, options.pipeline, options.steps, options.seed, not options.matching)


if __name__ == "__main__":
    run_command(main)
