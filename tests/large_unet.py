"""A UNet of 35 million random weights: large enough that its passes, and what is kept of it, are what a run costs."""

import torch
from diffusers import UNet2DConditionModel

SIDE, WIDTH = 16, 32


def save_a_35m_unet(folder):
    """For latents of 16 x 16 and prompt embeddings of 32; returns its folder."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=SIDE,
        block_out_channels=(96, 192, 352),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=2,
        attention_head_dim=8,
        cross_attention_dim=WIDTH,
    )
    unet.save_pretrained(folder / "unet")
    return str(folder / "unet")
