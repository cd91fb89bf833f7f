"""Networks of random weights in the sizes that benchmarks run at, as folders that the policy and the judge read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
from memory_by_count import CLIP_G, CLIP_H, CLIP_L, SD15_UNET, SDXL_UNET, VAE
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from lightning_modules.policies import StableDiffusion, StableDiffusionXL
from lightning_modules.policies.adaptation import Adaptation
from lightning_modules.policies.latent_diffusion import LatentDiffusion
from lightning_modules.policies.tiny_decoder import TinyDecoder
from lightning_modules.rewards.step_aware import StepAwarePreferenceModel

PIPELINES = Path(__file__).parent.parent / "pipelines"
TOKENS = {"vocab_size": 578, "max_position_embeddings": 77, "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}
DEEP: dict[str, Any] = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
}
CROSS = "CrossAttnDownBlock2D", "CrossAttnUpBlock2D"


@dataclass(frozen=True)
class Size:
    """Of the networks, and of the work of one round.

    Attributes:
        unet, vae, text, judge: the networks' configurations; None takes the tiny ones of ``tests/pipelines``.
        steps, branch_from_step, candidates, prompts: of a pool.
        pairs: of a DPO step.
        side: of pictures that are read, in pixels.
        samples: pairs read, or rows prepared, per round.
        loop_steps: training steps per round of the overhead.
    """

    unet: dict[str, Any] | None
    vae: dict[str, Any] | None
    text: tuple[dict[str, Any], ...]
    judge: dict[str, Any] | None
    steps: int
    branch_from_step: int
    candidates: int
    prompts: int
    pairs: int
    side: int
    samples: int
    loop_steps: int
    sdxl: bool = False


SIZES = {
    "tiny": Size(None, None, (), None, steps=3, branch_from_step=1, candidates=2, prompts=2, pairs=2, side=32,
                 samples=8, loop_steps=3),
    # A UNet of 34 million numbers at 32 x 32 latents and a VAE of SD 1.5's depth; a judge of 12 layers.
    "mid": Size(
        {"sample_size": 32, "block_out_channels": (64, 128, 256, 256), "layers_per_block": 2,
         "down_block_types": (CROSS[0],) * 3 + ("DownBlock2D",), "up_block_types": ("UpBlock2D",) + (CROSS[1],) * 3,
         "attention_head_dim": 8, "cross_attention_dim": 64},
        {"block_out_channels": (32, 64, 64, 64), **DEEP},
        ({"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4},),
        {"projection_dim": 192,
         "text_config": {"hidden_size": 192, "intermediate_size": 768, "num_hidden_layers": 12,
                         "num_attention_heads": 6},
         "vision_config": {"hidden_size": 288, "intermediate_size": 1152, "num_hidden_layers": 12,
                           "num_attention_heads": 6, "image_size": 224, "patch_size": 16}},
        steps=5, branch_from_step=1, candidates=4, prompts=1, pairs=2, side=512, samples=1000, loop_steps=60),
    "sd15": Size(SD15_UNET, VAE, (CLIP_L,), CLIP_H, steps=20, branch_from_step=4, candidates=4, prompts=10, pairs=8,
                 side=512, samples=1000, loop_steps=100),
    "sdxl": Size(SDXL_UNET, VAE, (CLIP_L, CLIP_G), CLIP_H, steps=20, branch_from_step=4, candidates=2, prompts=2,
                 pairs=2, side=1024, samples=1000, loop_steps=100, sdxl=True),
}  # fmt: skip


def build(size: Size, folder: Path) -> None:
    """Write the pipeline ``sd`` and the judge ``judge`` into a folder, or links to the tiny ones."""
    folder.mkdir(exist_ok=True)
    if size.unet is None:
        (folder / "sd").symlink_to(PIPELINES / "tiny-sd15")
        (folder / "judge").symlink_to(PIPELINES / "tiny-spm")
        return
    torch.manual_seed(0)
    template = PIPELINES / ("tiny-sdxl" if size.sdxl else "tiny-sd15")
    pipeline = folder / "sd"
    pipeline.mkdir()
    for part in ("model_index.json", "scheduler", "tokenizer", *(("tokenizer_2",) if size.sdxl else ())):
        (pipeline / part).symlink_to(template / part)
    UNet2DConditionModel(**size.unet).save_pretrained(pipeline / "unet")
    AutoencoderKL(**{"latent_channels": 4, **size.vae}).save_pretrained(pipeline / "vae")
    for number, text in enumerate(size.text):
        kind = CLIPTextModelWithProjection if number else CLIPTextModel
        config: Any = CLIPTextConfig(**{**TOKENS, **text})
        kind(config).save_pretrained(pipeline / ("text_encoder_2" if number else "text_encoder"))
    judge = {**size.judge, "text_config": {**TOKENS, **size.judge["text_config"]}}
    CLIPModel(CLIPConfig(**judge)).save_pretrained(folder / "judge")


def policy(size: Size, folder: Path, adaptation: Adaptation, device: str, **options: Any) -> LatentDiffusion:
    kind = StableDiffusionXL if size.sdxl else StableDiffusion
    return kind(str(folder / "sd"), adaptation, **options).to(device)


def judge(folder: Path, device: str) -> StepAwarePreferenceModel:
    found = StepAwarePreferenceModel(str(folder / "judge"), str(PIPELINES / "tiny-spm"))
    if found.model.config.vision_config.image_size != found.processing.crop:  # the tiny processor knows the tiny judge
        side = found.model.config.vision_config.image_size
        found.processing = type(found.processing)(side, side, found.processing.mean, found.processing.std)
    return found.to(device).eval()


def tiny_decoder(size: Size, folder: Path, device: str) -> TinyDecoder:
    """taesd's layers with random weights; at ``mid`` as much narrower as the VAE is."""
    width = 64 if size.vae is VAE else 16
    place = folder / "taesd"
    if not place.exists():
        torch.manual_seed(0)
        AutoencoderTiny(encoder_block_out_channels=(width,) * 4,
                        decoder_block_out_channels=(width,) * 4).save_pretrained(place)  # fmt: skip
    return TinyDecoder(str(place)).to(device)
