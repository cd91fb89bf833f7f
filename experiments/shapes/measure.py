"""How good the embedded world is: the exact reward of its drawings, of its autoencoder, and of its base model.

    python -m experiments.shapes.measure

The guidance scale is chosen on the validation prompts; only the chosen one is measured on the test prompts.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from rich.console import Console
from rich.table import Table
from torch import Tensor

from callbacks.evaluation.statistics import Mean, by_prompt
from datamodules.shapes.drawing import as_unit, draw, draw_imperfect, prompt_splits, random_numbers
from experiments.cli.command import run_command
from lightning_modules.policies import FullFineTuning, StableDiffusion
from lightning_modules.sampling.pictures import Sampler, initial_noise
from lightning_modules.shapes.reward import ShapesReward
from lightning_modules.shapes.world import SCENES, Scene

GUIDANCE = (1.0, 1.5, 2.0, 2.5, 3.0, 5.0)
PICTURES = 4  # a prompt


def clean_drawings() -> tuple[Float[Tensor, "n 3 h w"], list[str]]:
    """One clean drawing of every prompt of the world, in [0, 1]."""
    drawn = [np.array(draw(scene, random_numbers("clean", i))) for i, scene in enumerate(SCENES.values())]
    return torch.from_numpy(np.stack(drawn)).permute(0, 3, 1, 2).float() / 255, list(SCENES)


def imperfect_drawings(prompts: Sequence[str]) -> Float[Tensor, "n 3 h w"]:
    """Pictures as the base model was trained on, one per prompt, in [0, 1]."""
    drawn = [draw_imperfect(Scene.parse(prompt), random_numbers("data", i)) for i, prompt in enumerate(prompts)]
    return as_unit(torch.stack(drawn))


@torch.no_grad()
def reconstructed(policy: StableDiffusion, images: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n 3 h w"]:
    return torch.cat([policy.decode(policy.encode_images(part * 2 - 1)) for part in images.split(64)])


def generated(policy: StableDiffusion, prompts: Sequence[str], guidance_scale: float) -> Float[Tensor, "n 3 h w"]:
    """One picture per prompt by 20 DDIM steps, the same noise at every guidance scale."""
    sampler, images = Sampler(guidance_scale=guidance_scale), []
    for start in range(0, len(prompts), 64):
        texts = prompts[start : start + 64]
        noise, generators = initial_noise(policy, [("measure", start + i) for i in range(len(texts))])
        images.append(sampler.generate(policy, policy.predict_noise, texts, noise, generators))
    return torch.cat(images)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m experiments.shapes.measure", description=__doc__.splitlines()[0])
    parser.add_argument("--pretrained", default="embedded/shapes", help="the pipeline to measure (%(default)s)")
    policy = StableDiffusion(parser.parse_args(argv).pretrained, FullFineTuning()).eval()
    splits = {name: [p for p in prompt_splits()[name] for _ in range(PICTURES)] for name in ("validation", "test")}
    table = Table("pictures", "reward", "correctness", "look", "n", title="mean ± standard error over prompts")

    def measure(what: str, images: Float[Tensor, "n 3 h w"], prompts: Sequence[str]) -> float:
        scores = {"reward": ShapesReward().score(images, prompts), **ShapesReward().parts(images, prompts)}
        means = {
            name: Mean.of(list(by_prompt(zip(prompts, values.tolist())).values())) for name, values in scores.items()
        }
        table.add_row(what, *(mean.shown() for mean in means.values()), str(len(images)))
        return means["reward"].mean

    clean, captions = clean_drawings()
    measure("clean drawings", clean, captions)
    measure("  through the autoencoder", reconstructed(policy, clean), captions)
    imperfect = imperfect_drawings(splits["validation"])
    measure("imperfect drawings (the training data's kind)", imperfect, splits["validation"])
    measure("  through the autoencoder", reconstructed(policy, imperfect), splits["validation"])
    rewards = {
        w: measure(f"base, validation, guidance {w}", generated(policy, splits["validation"], w), splits["validation"])
        for w in GUIDANCE
    }
    best = max(rewards, key=lambda w: rewards[w])
    measure(f"base, test, guidance {best}", generated(policy, splits["test"], best), splits["test"])
    Console().print(table)


if __name__ == "__main__":
    run_command(main)
