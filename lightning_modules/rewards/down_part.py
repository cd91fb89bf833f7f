"""The down and middle part of Stable Diffusion's UNet as an encoder of noisy latents (LPO, arXiv 2502.01051)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from jaxtyping import Float, Int
from torch import Tensor, nn

from lightning_modules.batches import Conditioning

UP_PART = ("up_blocks.", "conv_norm_out.", "conv_out.")  # of the weights' names


def without_weights(config: Mapping[str, Any]) -> tuple[Any, set[str]]:
    """A ``UNet2DConditionModel`` without its up part, whose weights have shapes alone (torch's "meta" device).

    Args:
        config: as ``UNet2DConditionModel.load_config`` reads it.

    Returns:
        The network, and the names of the weights that its up part would have had.
    """
    with torch.device("meta"):
        unet: Any = UNet2DConditionModel.from_config(dict(config))
    left_out = {name for name in unet.state_dict() if name.startswith(UP_PART)}
    unet.up_blocks = nn.ModuleList()
    unet.conv_norm_out = unet.conv_out = None
    return unet, left_out


def feature_widths(unet: Any) -> list[int]:
    """Channels of what ``stage_means`` gives: the stages of the way down, then the middle."""
    widths = list(unet.config.block_out_channels)
    return [*widths, widths[-1]]


def stage_means(
    unet: Any, latents: Float[Tensor, "n c h w"], timesteps: Int[Tensor, " n"], cond: Conditioning
) -> list[Float[Tensor, "n _"]]:
    """Means over h and w, fp32, of each down block's last layer, before it is downsampled, and of the middle block.

    Source: official unet_2d_condition_reward.py:1053, 1282-1332 of Kwai-Kolors/LPO@9c2e8b8.
    """
    dtype = unet.conv_in.weight.dtype
    latents, context = latents.to(dtype), cond.embeds.to(dtype)
    added = None
    if cond.pooled is not None and cond.time_ids is not None:
        added = {"text_embeds": cond.pooled.to(dtype), "time_ids": cond.time_ids}
    time = unet.time_embedding(unet.get_time_embed(latents, timesteps))
    further = unet.get_aug_embed(time, context, added)
    time = time if further is None else time + further
    hidden = unet.conv_in(latents)
    means = []
    for block in unet.down_blocks:
        options = {"encoder_hidden_states": context} if getattr(block, "has_cross_attention", False) else {}
        hidden, outputs = block(hidden_states=hidden, temb=time, **options)
        last = outputs[-1] if block.downsamplers is None else outputs[-2]
        means.append(last.float().mean(dim=(2, 3)))
    middle = unet.mid_block(hidden, time, encoder_hidden_states=context)
    return [*means, middle.float().mean(dim=(2, 3))]
