"""ImageReward's published files on transformers' BLIP modules: sizes, names, and every weight accounted for."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

from lightning_modules.errors import ConfigError
from lightning_modules.rewards.linear_head import LinearHead
from lightning_modules.rewards.preprocessing import SIDE
from lightning_modules.weights.audit import UNREADABLE, mismatch
from lightning_modules.weights.state_dicts import find_weights, read_state_dict

WHOSE = "ImageReward"
# Names in the published file -> names here, applied in this order.
RENAMED = (
    (r"^blip\.visual_encoder\.cls_token$", "vision.embeddings.class_embedding"),
    (r"^blip\.visual_encoder\.pos_embed$", "vision.embeddings.position_embedding"),
    (r"^blip\.visual_encoder\.patch_embed\.proj\.", "vision.embeddings.patch_embedding."),
    (r"^blip\.visual_encoder\.norm\.", "vision.post_layernorm."),
    (r"^blip\.visual_encoder\.blocks\.", "vision.encoder.layers."),
    (r"^(vision\.encoder\.layers\.\d+\.)norm([12])\.", r"\1layer_norm\2."),
    (r"^(vision\.encoder\.layers\.\d+\.)attn\.qkv\.", r"\1self_attn.qkv."),
    (r"^(vision\.encoder\.layers\.\d+\.)attn\.proj\.", r"\1self_attn.projection."),
    (r"^blip\.text_encoder\.", "text."),
    (r"^mlp\.", "head."),
)
# In the file and without part in a score: two projections of BLIP's training, and a buffer 0, 1, 2, ...
UNUSED = re.compile(r"blip\.(vision|text)_proj\.(weight|bias)|blip\.text_encoder\.embeddings\.position_ids")
# What is read of med_config.json. Its encoder_width is not: the official code replaces it by the vision network's.
SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size",
         "max_position_embeddings", "layer_norm_eps", "hidden_act", "pad_token_id")  # fmt: skip


class Network(nn.Module):
    """BLIP's vision network, its text network that attends to it, and the head on the text's first token.

    Args:
        vision, text: their sizes.
    """

    def __init__(self, vision: BlipVisionConfig, text: BlipTextConfig) -> None:
        super().__init__()
        self.vision: Any = BlipVisionModel(vision)
        self.text: Any = BlipTextModel(text, add_pooling_layer=False)
        self.head = LinearHead(text.hidden_size)

    def forward(
        self, pixels: Float[Tensor, "n 3 h w"], ids: Int[Tensor, "n l"], mask: Int[Tensor, "n l"]
    ) -> Float[Tensor, " n"]:
        """Raw scores of preprocessed pictures and tokenised prompts, fp32."""
        return self.head(self.first_token(self.image_tokens(pixels), ids, mask).float())

    def image_tokens(self, pixels: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n patches d"]:
        """Every token after the last norm; the first is the class token."""
        return self.vision(pixel_values=pixels).last_hidden_state

    def first_token(
        self, seen: Float[Tensor, "n patches d"], ids: Int[Tensor, "n l"], mask: Int[Tensor, "n l"]
    ) -> Float[Tensor, "n w"]:
        """The text's [CLS], which has attended to all of text and picture."""
        hidden = self.text(input_ids=ids, attention_mask=mask, encoder_hidden_states=seen, is_decoder=False)
        return hidden.last_hidden_state[:, 0]


def load_network(pretrained: str, med_config: str, vision_heads: int) -> Network:
    """The published network, on the CPU.

    Args:
        pretrained: file of the weights, or ``organisation/name/file`` on the hub.
        med_config: file of the text network's sizes, or the same on the hub.
        vision_heads: of the vision network.

    Raises:
        ConfigError: missing or damaged files, or weights with other keys or of other sizes.
    """
    file = find_weights(pretrained, WHOSE)
    found = read_state_dict(file, WHOSE)
    vision = _vision_config(found, vision_heads)
    text = _text_config(med_config, vision.hidden_size)
    weights = {renamed(name): value for name, value in found.items() if not UNUSED.fullmatch(name)}
    with torch.device("meta"):
        network = Network(vision, text)
    difference = mismatch(network.state_dict(), weights)
    if difference is not None:
        raise ConfigError(
            f"{WHOSE}: {file} does not hold the network of {med_config}: {difference}; give the published "
            "ImageReward.pt and med_config.json"
        )
    network.load_state_dict(weights, assign=True)
    positions = torch.arange(text.max_position_embeddings).expand(1, -1)
    network.text.embeddings.register_buffer("position_ids", positions, persistent=False)  # of no file
    return network


def renamed(name: str) -> str:
    """A published weight's name here."""
    for pattern, replacement in RENAMED:
        name = re.sub(pattern, replacement, name)
    return name


def _vision_config(weights: Mapping[str, Tensor], heads: int) -> BlipVisionConfig:
    """Width, depth and patch are the weights'; where there are none, the published ones, which then are missed."""
    tokens = weights.get("blip.visual_encoder.cls_token", torch.empty(1, 1, 1024, device="meta"))
    patch = weights.get("blip.visual_encoder.patch_embed.proj.weight", torch.empty(1024, 3, 16, 16, device="meta"))
    blocks = {match[1] for name in weights if (match := re.match(r"blip\.visual_encoder\.blocks\.(\d+)\.", name))}
    width = tokens.shape[-1]
    if heads < 1 or width % heads:
        raise ConfigError(f"{WHOSE}: vision_heads must divide the vision network's width {width}, got {heads}")
    return BlipVisionConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=len(blocks) or 24,
        num_attention_heads=heads,
        image_size=SIDE,
        patch_size=patch.shape[-1],
        layer_norm_eps=1e-6,
        hidden_act="gelu",
    )


def _text_config(name: str, vision_width: int) -> BlipTextConfig:
    file = find_weights(name, WHOSE, suffixes=(".json",))
    try:
        said = json.loads(file.read_text(encoding="utf-8"))
        return BlipTextConfig(
            **{size: said[size] for size in SIZES},
            encoder_hidden_size=vision_width,
            is_decoder=True,  # it has cross-attention
        )
    except (*UNREADABLE, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"{WHOSE}: {file} does not hold the sizes of BLIP's text network ({reason})") from error
