"""Work by count: what the authors' recipes multiply and add, the tables of docs/results.md.

    python tests/cost_by_count.py

The networks are those of memory_by_count on torch's meta device; torch counts their multiply-accumulates (MAC) as they
run, those of matrix products, convolutions and attention. TMAC are 10^12 MAC, EMAC 10^18. The recipes are the packaged
configs' (their headers name the sources), one A100 hour at half of its peak is 0.28 EMAC.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any
from unittest.mock import Mock

import torch
from memory_by_count import NETWORKS, table
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lightning_modules.policies.base import DiffusionPolicy
from lightning_modules.policies.lora import LoRA

VALID = 0.5  # assumed share of the compared pairs that are above the threshold

# ------------------------------------------------------------------------------------------- networks


def counted(network: nn.Module, run: Callable[[], Any], without: Sequence[str] = ()) -> float:
    """TMAC of a call, without those of some of the network's modules."""
    counter = FlopCounterMode(display=False)
    with counter:
        run()
    counts = counter.get_flop_counts()
    left_out = sum(sum(counts[f"{type(network).__name__}.{name}"].values()) for name in without)
    return (counter.get_total_flops() - left_out) / 2e12


def meta(*shape: int) -> Tensor:
    return torch.empty(*shape, device="meta")


def unet_inputs(size: str) -> dict[str, Any]:
    """One picture of the size that the model was trained at, one branch of guidance."""
    if size == "SD 1.5":
        return {"sample": meta(1, 4, 64, 64), "timestep": 1, "encoder_hidden_states": meta(1, 77, 768)}
    added = {"text_embeds": meta(1, 1280), "time_ids": meta(1, 6)}
    states = meta(1, 77, 2048)
    return {"sample": meta(1, 4, 128, 128), "timestep": 1, "encoder_hidden_states": states, "added_cond_kwargs": added}


@cache
def unet(size: str, training: str | None = None) -> float:
    """Forward; with ``training`` "full", or the rank of a LoRA, forward and backward."""
    with torch.device("meta"):
        network = NETWORKS[f"{size} UNet"]()
        if training not in (None, "full"):
            policy = Mock(spec=DiffusionPolicy, denoiser=network, lora_targets=DiffusionPolicy.lora_targets)
            LoRA(rank=int(training)).apply(policy)

    def run() -> None:
        with torch.set_grad_enabled(training is not None):
            output = network(**unet_inputs(size)).sample
            if training is not None:
                output.sum().backward()

    return counted(network, run)


@cache
def latent_judge(size: str) -> float:
    """Forward of the latent reward model's network: the UNet without its up part."""
    with torch.device("meta"):
        network = NETWORKS[f"{size} UNet"]()
    with torch.no_grad():
        up = [f"up_blocks.{number}" for number in range(len(network.up_blocks))]
        return counted(network, lambda: network(**unet_inputs(size)), [*up, "conv_out"])


@cache
def vae(size: str, way: str) -> float:
    side = {"SD 1.5": 512, "SDXL": 1024}[size]
    with torch.device("meta"), torch.no_grad():
        network = NETWORKS["VAE"]()
        image, latent = meta(1, 3, side, side), meta(1, 4, side // 8, side // 8)
        return counted(network, lambda: network.encode(image) if way == "encode" else network.decode(latent))


@cache
def clip(tower: str) -> float:
    """A tower of PickScore, whose conditioning on time adds nothing that counts."""
    with torch.device("meta"), torch.no_grad():
        network = NETWORKS["PickScore (CLIP ViT-H)"]()
        pictures, words = meta(1, 3, 224, 224), torch.zeros(1, 77, dtype=torch.long, device="meta")
        calls = {"vision": lambda: network.vision_model(pictures), "text": lambda: network.text_model(words)}
        return counted(network, calls[tower])


# ------------------------------------------------------------------------------------------- recipes


@dataclass(frozen=True)
class Recipe:
    """A method with its authors' settings on a base model; EMAC by purpose.

    Attributes:
        judge: training the preference model that the method asks.
        pools: sampling, decoding and judging its pictures.
        training: of the policy.
        a100_hours: as the authors report them, judge included.
    """

    method: str
    size: str
    judge: float
    pools: float
    training: float
    a100_hours: int

    @property
    def total(self) -> float:
        return self.judge + self.pools + self.training


def dpo(size: str, a100_hours: int) -> Recipe:
    """2,000 steps of 2,048 pairs: both pictures encoded, policy forward and backward, reference forward."""
    pair = 2 * (vae(size, "encode") + unet(size, "full") + unet(size))
    return Recipe("Diffusion-DPO", size, 0.0, 0.0, 2000 * 2048 * pair / 1e6, a100_hours)


def guided_training(size: str, rank: int, shared: float) -> float:
    """A pair of transitions: policy forward and backward and reference forward, guided, once where x_t is shared."""
    return (2 - shared) * 2 * (unet(size, str(rank)) + unet(size))


def spo(size: str, *, k: int, groups: int, rank: int, judge_steps: int, shared: float, a100_hours: int) -> Recipe:
    """10 passes over 4,000 prompts, 16 of 20 steps compared: in 4 or 16 ``groups``, each judged once."""
    seen = 2 * (vae(size, "encode") + 2 * unet(size) + vae(size, "decode") + 3 * clip("vision")) + 3 * clip("text")
    judge = judge_steps * 64 * seen
    rows = 2 * (5 + 15 * k)  # the first five networks' calls are of one latent, the others of k
    prompt = rows * unet(size) + groups * k * (vae(size, "decode") + clip("vision")) + clip("text")
    pairs = 16 * VALID * guided_training(size, rank, shared)
    return Recipe("SPO", size, judge / 1e6, 40_000 * prompt / 1e6, 40_000 * pairs / 1e6, a100_hours)


def lpo(size: str, *, rank: int, judge_pairs: int, a100_hours: int) -> Recipe:
    """5 passes over 4,000 prompts, 20 steps of four candidates, judged guided and without decoding."""
    judge = judge_pairs * 2 * (vae(size, "encode") + 3 * 2 * latent_judge(size))
    prompt = 20 * 2 * unet(size) + 20 * 4 * 2 * latent_judge(size)
    pairs = 20 * VALID * guided_training(size, rank, shared=1.0)
    return Recipe("LPO", size, judge / 1e6, 20_000 * prompt / 1e6, 20_000 * pairs / 1e6, a100_hours)


RANKS = {"SD 1.5": 4, "SDXL": 64}  # of SPO's and LPO's LoRA


def recipes(size: str) -> list[Recipe]:
    rank = RANKS[size]
    if size == "SD 1.5":
        return [
            dpo(size, 384),
            spo(size, k=4, groups=16, rank=rank, judge_steps=8000, shared=1.0, a100_hours=80),
            lpo(size, rank=rank, judge_pairs=4000 * 128, a100_hours=23),
        ]
    return [
        dpo(size, 4800),
        spo(size, k=2, groups=4, rank=rank, judge_steps=7000, shared=0.0, a100_hours=234),
        lpo(size, rank=rank, judge_pairs=8000 * 32, a100_hours=92),
    ]


# ------------------------------------------------------------------------------------------- tables


def network_table(sizes: Sequence[str] = tuple(RANKS)) -> str:
    rows = []
    for size in sizes:
        forward, trained = unet(size), (unet(size, "full"), unet(size, str(RANKS[size])))
        numbers = [forward, *(count - forward for count in trained), latent_judge(size)]
        rows.append([size, *(f"{number:.2f}" for number in (*numbers, vae(size, "encode"), vae(size, "decode")))])
    head = ["TMAC per picture", "UNet", "its backward, full", "its backward, LoRA", "latent judge"]
    return table([*head, "VAE encode", "VAE decode"], rows)


def recipe_table(sizes: Sequence[str] = tuple(RANKS)) -> str:
    rows = []
    for size in sizes:
        found = recipes(size)
        for recipe in found:
            parts = [f"{part:.1f}" if part else "" for part in (recipe.judge, recipe.pools, recipe.training)]
            less = [found[0].total / recipe.total, found[0].a100_hours / recipe.a100_hours]
            sums = [f"**{recipe.total:.1f}**", str(recipe.a100_hours), f"{recipe.total / recipe.a100_hours:.3f}"]
            rows.append([f"{recipe.method}, {size}", *parts, *sums, f"**{less[0]:.1f}**", f"{less[1]:.1f}"])
    head = ["EMAC", "judge's training", "pools", "policy's training", "sum", "A100 hours, the authors'"]
    return table([*head, "EMAC per hour", "less than DPO by count", "by the authors' hours"], rows)


def main() -> None:
    print(network_table(), recipe_table(), sep="\n\n")


if __name__ == "__main__":
    main()
