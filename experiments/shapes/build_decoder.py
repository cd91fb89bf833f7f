"""Trains the embedded world's tiny decoder: what taesd is to Stable Diffusion's VAE.

    python -m experiments.shapes.build_decoder --output runs/shapes_decoder

Its lessons are the pipeline's own x0-predictions along sampled trajectories, as SPO's pools see them, beside what the
VAE makes of them. What counts in the end is whether a judge chooses alike behind both: a pool's ``decoder_agreement``.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderTiny
from jaxtyping import Float
from torch import Tensor

from datamodules.shapes.drawing import prompt_splits
from experiments.cli.command import run_command
from lightning_modules.batches import DenoiserQuery
from lightning_modules.errors import ConfigError
from lightning_modules.files import atomic_folder
from lightning_modules.learning_rates import CosineWithWarmup
from lightning_modules.policies import Frozen, StableDiffusion
from lightning_modules.progress import tracked
from lightning_modules.randomness import generator, randn
from lightning_modules.sampling.pictures import initial_noise
from lightning_modules.shapes.autoencoder import psnr

WIDTH = 24
BLOCKS = (3, 2, 1)  # at 8, 16 and 32 pixels: the work is where they are few
GUIDANCE, STEPS = 2.5, 20  # as spo_tiny samples
BATCH = 32
RATE = 2e-3  # the learning rate's peak: a twentieth of the steps up, then down to 0


@torch.no_grad()
def predictions(
    policy: StableDiffusion, prompts: Sequence[str], key: tuple[int | str, ...]
) -> Float[Tensor, "n c h w"]:
    """The x0-predictions of one trajectory per prompt (DDIM with eta 1), and where they end."""
    found = []
    cond = policy.encode_prompts(prompts)
    latents, draws = initial_noise(policy, [(*key, n) for n in range(len(prompts))])
    for step in policy.schedule.trajectory(STEPS):
        start = torch.full((len(prompts),), step.timestep)
        output = policy.predict_noise(DenoiserQuery(latents, start, cond, GUIDANCE))
        found.append(policy.schedule.predict_clean(output, latents, start)[0])
        noise = randn(latents.shape[1:], draws)
        latents = policy.schedule.step(output, latents, start, torch.full_like(start, step.next_timestep), 1.0, noise)
    return torch.cat([*found, latents])


@torch.no_grad()
def decoded(policy: StableDiffusion, latents: Float[Tensor, "n c h w"]) -> Float[Tensor, "n 3 H W"]:
    """By the VAE, in [0, 1]."""
    return torch.cat([policy.decode(part) for part in latents.split(256)])


def train(decoder: Any, policy: StableDiffusion, rounds: int, steps: int, seed: int) -> None:
    """Train in place, on ``rounds`` trajectories of every training prompt.

    The loss is mean |error| + mean |difference of the errors of two neighbouring pixels|, as the autoencoder's.
    """
    prompts = prompt_splits()["train"]
    drawn = [predictions(policy, prompts, (seed, "decoder", turn)) for turn in tracked(range(rounds), "sampling round")]
    latents = torch.cat(drawn)
    pictures = decoded(policy, latents)
    decoder.to(memory_format=torch.channels_last)  # half of the CPU time of convolutions this small
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=RATE, weight_decay=0.0)
    rate = CosineWithWarmup(optimizer, total_steps=steps, warmup_steps=steps // 20)
    draw = generator(seed, "decoder's batches")
    for _ in tracked(range(steps), "learning to decode, step"):
        rows = torch.randint(len(latents), (BATCH,), generator=draw)
        error = decoder(latents[rows].contiguous(memory_format=torch.channels_last)) / 2 + 0.5 - pictures[rows]
        edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
        optimizer.zero_grad()
        (error.abs().mean() + edges).backward()
        optimizer.step()
        rate.step()


def save(network: Any, folder: Path) -> None:
    """In fp16, as diffusers' ``AutoencoderTiny`` reads it."""
    network.to(torch.float16).save_pretrained(folder)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder to make; must not exist")
    parser.add_argument("--pretrained", default="embedded/shapes", help="the pipeline (%(default)s)")
    parser.add_argument("--rounds", type=int, default=2, help="trajectories of every training prompt (%(default)s)")
    parser.add_argument("--steps", type=int, default=1500, help="optimizer steps (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    if options.output.exists():
        raise ConfigError(f"{options.output} exists already: name a new folder, or delete it first")
    policy = StableDiffusion(options.pretrained, Frozen()).eval()
    torch.manual_seed(options.seed)
    network: Any = AutoencoderTiny(
        encoder_block_out_channels=(4,) * len(BLOCKS),  # never used
        decoder_block_out_channels=(WIDTH,) * len(BLOCKS),
        num_encoder_blocks=(1,) * len(BLOCKS),
        num_decoder_blocks=BLOCKS,
        latent_channels=policy.latent_channels,
    )
    train(network.decoder, policy, options.rounds, options.steps, options.seed)
    held_out = predictions(policy, prompt_splits()["validation"], (options.seed, "decoder's validation"))
    with torch.no_grad():
        quality = psnr(network.decoder(held_out), decoded(policy, held_out) * 2 - 1).mean().item()
    with atomic_folder(options.output) as unfinished:
        save(network, unfinished)
    print(f"{options.output}: {quality:.1f} dB from the VAE's pictures, on x0-predictions for held-out prompts")


if __name__ == "__main__":
    run_command(main)
