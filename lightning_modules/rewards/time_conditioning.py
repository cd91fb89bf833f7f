"""A CLIP vision tower that is given a timestep: SPO's architecture (arXiv 2406.04314, section 3.2)."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Real
from torch import Tensor, nn

FREQUENCIES = 256  # numbers a timestep becomes before the MLP; the published models' size


class TimeEmbedder(nn.Module):
    """Timesteps to vectors: cosines and sines of 128 frequencies from 1 to 1/10000, then an MLP (DiT's embedder,
    arXiv 2212.09748)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        layers = nn.Linear(FREQUENCIES, width), nn.Linear(width, width)
        for layer in layers:
            nn.init.normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
        self.mlp = nn.Sequential(layers[0], nn.SiLU(), layers[1])

    def forward(self, timesteps: Real[Tensor, " n"]) -> Float[Tensor, "n width"]:
        half = FREQUENCIES // 2
        steps = torch.arange(half, dtype=torch.float32, device=timesteps.device)
        angles = timesteps.float()[:, None] * torch.exp(-math.log(10000) * steps / half)
        waves = torch.cat([angles.cos(), angles.sin()], dim=-1)
        return self.mlp(waves.to(next(self.parameters()).dtype))


def add_time_conditioning(clip: Any) -> None:
    """Give a ``CLIPModel``'s vision tower its time conditioning, such that it still computes what it did.

    Every layer and the last norm get a linear map from the time embedding to shifts, scales and gates (adaLN); its
    weights are 0 and its biases are what changes nothing: 1 for gates, 0 for the others. The modules are named as in
    the published checkpoints.
    """
    vision, width = clip.vision_model, clip.config.vision_config.hidden_size
    clip.t_embedder = TimeEmbedder(width)
    vision.adaLN_modulation = _modulation(width, 2)
    for layer in vision.encoder.layers:
        layer.adaLN_modulation = _modulation(width, 6)
        biases = layer.adaLN_modulation[1].bias.data.view(6, width)
        biases[2] = biases[5] = 1.0


def _modulation(width: int, parts: int) -> nn.Sequential:
    linear = nn.Linear(width, parts * width)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return nn.Sequential(nn.SiLU(), linear)


def modulated_layer(
    layer: Any, hidden: Float[Tensor, "n l width"], time: Float[Tensor, "n width"]
) -> Float[Tensor, "n l width"]:
    """One transformer layer of CLIP with adaLN: x + gate f(norm(x) (1 + scale) + shift), for attention, then MLP."""
    modulation = layer.adaLN_modulation(time)[:, None].chunk(6, dim=-1)
    attention_shift, attention_scale, attention_gate, mlp_shift, mlp_scale, mlp_gate = modulation
    attended, _ = layer.self_attn(
        hidden_states=layer.layer_norm1(hidden) * (1 + attention_scale) + attention_shift, attention_mask=None
    )
    hidden = hidden + attention_gate * attended
    return hidden + mlp_gate * layer.mlp(layer.layer_norm2(hidden) * (1 + mlp_scale) + mlp_shift)


def time_conditioned_embeds(
    clip: Any, pixels: Float[Tensor, "n 3 h w"], timesteps: Real[Tensor, " n"]
) -> Float[Tensor, "n d"]:
    """Unit vectors of preprocessed pictures at their timesteps, fp32."""
    vision = clip.vision_model
    time = clip.t_embedder(timesteps)
    hidden = vision.pre_layrnorm(vision.embeddings(pixels))
    for layer in vision.encoder.layers:
        hidden = modulated_layer(layer, hidden, time)
    shift, scale = vision.adaLN_modulation(time).chunk(2, dim=-1)
    pooled = vision.post_layernorm(hidden[:, 0]) * (1 + scale) + shift
    return F.normalize(clip.visual_projection(pooled).float(), dim=-1)
