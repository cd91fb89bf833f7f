"""GPU memory by count: the tables of docs/memory.md.

    python tests/memory_by_count.py

The networks are the real classes with the published configurations, written out below, on torch's meta device: nothing
is downloaded and no weight has memory. Counted are weights, gradients, the optimizer's moments and the reference's
copy. Activations are not. GB are 10^9 bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from math import ceil, prod
from typing import Any
from unittest.mock import Mock

import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel
from torch import nn
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    T5Config,
    T5EncoderModel,
)

from lightning_modules.policies.base import DiffusionPolicy
from lightning_modules.policies.flux import Flux
from lightning_modules.policies.lora import LoRA
from lightning_modules.policies.quantisation import linear_layers
from lightning_modules.policies.sd3 import StableDiffusion3
from lightning_modules.policies.stable_diffusion import StableDiffusion
from lightning_modules.rewards.time_conditioning import add_time_conditioning

DOWN, CROSS_DOWN = "DownBlock2D", "CrossAttnDownBlock2D"
UP, CROSS_UP = "UpBlock2D", "CrossAttnUpBlock2D"

# stable-diffusion-v1-5/stable-diffusion-v1-5, unet/config.json
SD15_UNET: dict[str, Any] = {
    "sample_size": 64,
    "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": (CROSS_DOWN, CROSS_DOWN, CROSS_DOWN, DOWN),
    "up_block_types": (UP, CROSS_UP, CROSS_UP, CROSS_UP),
    "layers_per_block": 2,
    "attention_head_dim": 8,
    "cross_attention_dim": 768,
}
# stabilityai/stable-diffusion-xl-base-1.0, unet/config.json
SDXL_UNET: dict[str, Any] = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": (DOWN, CROSS_DOWN, CROSS_DOWN),
    "up_block_types": (CROSS_UP, CROSS_UP, UP),
    "layers_per_block": 2,
    "attention_head_dim": (5, 10, 20),
    "transformer_layers_per_block": (1, 2, 10),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
# The same network in both pipelines.
VAE: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
}
# stabilityai/stable-diffusion-3.5-medium, transformer/config.json
SD35_MEDIUM: dict[str, Any] = {
    "sample_size": 128,
    "num_layers": 24,
    "num_attention_heads": 24,
    "caption_projection_dim": 1536,
    "pos_embed_max_size": 384,
    "dual_attention_layers": tuple(range(13)),
    "qk_norm": "rms_norm",
}
# black-forest-labs/FLUX.1-dev, transformer/config.json
FLUX_DEV: dict[str, Any] = {"guidance_embeds": True}
# The autoencoders of both, which differ in their factors alone.
VAE_16: dict[str, Any] = {**VAE, "latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False}
# google/t5-v1_1-xxl
T5_XXL: dict[str, Any] = {
    "vocab_size": 32128,
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
}
# openai/clip-vit-large-patch14 and laion/CLIP-ViT-bigG-14-laion2B-39B-b160k, text towers
CLIP_L: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "projection_dim": 768,
}
CLIP_G: dict[str, Any] = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
}
# yuvalkirstain/PickScore_v1, which is laion/CLIP-ViT-H-14-laion2B-s32B-b79K
CLIP_H: dict[str, Any] = {
    "projection_dim": 1024,
    "text_config": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
    },
    "vision_config": {
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_hidden_layers": 32,
        "num_attention_heads": 16,
        "patch_size": 14,
    },
}

Shapes = list[tuple[int, ...]]


def step_aware_model() -> nn.Module:
    clip = CLIPModel(CLIPConfig(**CLIP_H))
    add_time_conditioning(clip)
    return clip


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "SD 1.5 UNet": lambda: UNet2DConditionModel(**SD15_UNET),
    "SDXL UNet": lambda: UNet2DConditionModel(**SDXL_UNET),
    "SD 3.5 medium transformer": lambda: SD3Transformer2DModel(**SD35_MEDIUM),
    "FLUX.1-dev transformer": lambda: FluxTransformer2DModel(**FLUX_DEV),
    "VAE": lambda: AutoencoderKL(**VAE),
    "VAE of 16 channels": lambda: AutoencoderKL(**VAE_16),
    # The model's own names its token table twice.
    "T5-XXL encoder": lambda: T5EncoderModel(T5Config(**T5_XXL)).encoder,
    "CLIP ViT-L text encoder": lambda: CLIPTextModel(CLIPTextConfig(**CLIP_L)),
    "OpenCLIP ViT-bigG text encoder": lambda: CLIPTextModelWithProjection(CLIPTextConfig(**CLIP_G)),
    "PickScore (CLIP ViT-H)": lambda: CLIPModel(CLIPConfig(**CLIP_H)),
    "step-aware preference model": step_aware_model,
}


LORA_TARGETS = {
    "SD 3.5 medium transformer": StableDiffusion3.lora_targets,
    "FLUX.1-dev transformer": Flux.lora_targets,
}


@cache
def numbers(name: str) -> int:
    """Parameters of a network."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in NETWORKS[name]().parameters())


BLOCKS = {
    "SD 1.5 UNet": StableDiffusion.blocks,
    "SDXL UNet": StableDiffusion.blocks,
    "SD 3.5 medium transformer": StableDiffusion3.blocks,
    "FLUX.1-dev transformer": Flux.blocks,
}


@cache
def quantised_numbers(name: str) -> int:
    """Parameters of a denoiser whose weights a quantisation rounds."""
    with torch.device("meta"):
        return sum(layer.weight.numel() for _, layer in linear_layers(NETWORKS[name](), BLOCKS[name]))


def nf4(count: int) -> int:
    """bitsandbytes: half a byte a number, a byte for the scale of 64 numbers and four for that of 256 scales."""
    return count // 2 + count // 64 + 4 * (count // 64 // 256)


@cache
def trained_shapes(unet: str, rank: int | None) -> Shapes:
    """Shapes of what trains: the UNet's own weights, or with a rank its LoRA on the layers of its kind."""
    with torch.device("meta"):
        network = NETWORKS[unet]()
        if rank is not None:
            LoRA(rank=rank).apply(
                Mock(
                    spec=DiffusionPolicy,
                    denoiser=network,
                    lora_targets=LORA_TARGETS.get(unet, DiffusionPolicy.lora_targets),
                )
            )
    return [tuple(parameter.shape) for parameter in network.parameters() if parameter.requires_grad]


# Bytes of an optimizer's state, for parameters of the given shapes.


def adamw(shapes: Shapes) -> int:
    """Two fp32 moments per number."""
    return 8 * sum(map(prod, shapes))


def adafactor(shapes: Shapes) -> int:
    """fp32 sums over the last and over the last but one dimension, without first moment; of a vector the square."""
    return sum(
        4 * (prod(shape[:-1]) + prod(shape[:-2] + shape[-1:]) if len(shape) > 1 else prod(shape)) for shape in shapes
    )


def eight_bit_adam(shapes: Shapes) -> int:
    """bitsandbytes: two bytes per number and two fp32 scales per 256 numbers; tensors below 4096 numbers as AdamW."""
    return sum(8 * prod(s) if prod(s) < 4096 else 2 * prod(s) + 8 * ceil(prod(s) / 256) for s in shapes)


OPTIMIZERS = {"AdamW": adamw, "Adafactor": adafactor, "8-bit Adam": eight_bit_adam}


@dataclass(frozen=True)
class Training:
    """A method on a base model.

    Attributes:
        rank: LoRA's; None trains the UNet's own weights.
        frozen: frozen networks on the GPU besides the UNet.
        copy: whether the reference keeps a copy of the UNet.
    """

    unet: str
    method: str
    rank: int | None
    frozen: tuple[str, ...]
    copy: bool = False

    def bytes_held(self, frozen_bytes: int) -> dict[str, int]:
        """By purpose, where a frozen number takes ``frozen_bytes``. What trains and the copy of it take 4."""
        shapes = trained_shapes(self.unet, self.rank)
        trained = sum(map(prod, shapes))
        base = 0 if self.rank is None else numbers(self.unet)
        frozen = frozen_bytes * (base + sum(map(numbers, self.frozen)))
        held = {"weights": 4 * trained + frozen, "gradients": 4 * trained, "copy": 4 * trained if self.copy else 0}
        return held | {name: state(shapes) for name, state in OPTIMIZERS.items()}


TEXT = {
    "SD 1.5 UNet": ("CLIP ViT-L text encoder",),
    "SDXL UNet": ("CLIP ViT-L text encoder", "OpenCLIP ViT-bigG text encoder"),
}
CLIPS = ("CLIP ViT-L text encoder", "OpenCLIP ViT-bigG text encoder")
SPO_RANK = {"SD 1.5 UNet": 4, "SDXL UNet": 64}  # the configs spo_sd15 and spo_sdxl


def trainings() -> list[Training]:
    found = []
    for unet, text in TEXT.items():
        frozen, rank = ("VAE", *text), SPO_RANK[unet]
        found += [
            Training(unet, "DPO, full", None, frozen, copy=True),
            Training(unet, "DPO, LoRA rank 64", 64, frozen),
            Training(unet, f"SPO, LoRA rank {rank}", rank, (*frozen, "step-aware preference model")),
            Training(unet, "SFT, full", None, frozen),
        ]
    sd35, flux = "SD 3.5 medium transformer", "FLUX.1-dev transformer"
    frozen = ("VAE of 16 channels", *CLIPS, "T5-XXL encoder")
    found += [
        Training(sd35, "DPO, full", None, frozen, copy=True),
        Training(sd35, "DPO, LoRA rank 32", 32, frozen),
        Training(sd35, "SPO, LoRA rank 32", 32, (*frozen, "PickScore (CLIP ViT-H)")),
        Training(flux, "DPO, LoRA rank 64", 64, ("VAE of 16 channels", CLIPS[0], "T5-XXL encoder")),
    ]
    return found


def gigabytes(count: int) -> str:
    return f"{count / 1e9:.2f}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """In Markdown."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))


def network_table() -> str:
    rows = [
        [name, f"{numbers(name) / 1e6:.1f} M", gigabytes(4 * numbers(name)), gigabytes(2 * numbers(name))]
        for name in NETWORKS
    ]
    return table(["network", "numbers", "fp32, GB", "bf16 or fp16, GB"], rows)


def quantised_table() -> str:
    """Denoisers in bf16, and with the weights of their blocks' linear layers rounded."""
    rows = []
    for name in BLOCKS:
        rounded = quantised_numbers(name)
        rest = 2 * (numbers(name) - rounded)
        held = (2 * rounded + rest, rounded + rest, nf4(rounded) + rest)
        rows.append([name, f"{rounded / 1e6:.1f} M", *map(gigabytes, held)])
    return table(["network", "numbers that are rounded", "bf16, GB", "8 bits, GB", "NF4, GB"], rows)


def training_table() -> str:
    rows = []
    for training in trainings():
        for precision, frozen_bytes in (("fp32", 4), ("bf16-mixed", 2)):
            held = training.bytes_held(frozen_bytes)
            base = held["weights"] + held["gradients"] + held["copy"]
            trained = sum(map(prod, trained_shapes(training.unet, training.rank)))
            rows.append(
                [
                    training.unet.removesuffix(" UNet").removesuffix(" transformer"),
                    training.method,
                    precision,
                    f"{trained / 1e6:.1f} M",
                ]
                + [gigabytes(held[part]) for part in ("weights", "gradients", "copy")]
                + [f"{gigabytes(held[name])} / {gigabytes(base + held[name])}" for name in OPTIMIZERS]
                + ["not measured", "not measured"]
            )
    head = ["model", "method", "precision", "trained", "weights", "gradients", "copy"]
    sums = [f"{name}: moments / sum" for name in OPTIMIZERS]
    return table([*head, *sums, "activations", "measured by, when"], rows)


def main() -> None:
    print(network_table(), quantised_table(), training_table(), sep="\n\n")


if __name__ == "__main__":
    main()
