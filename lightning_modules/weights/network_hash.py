"""What a VAE's or text encoder's outputs depend on, for the hashes of what is kept of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

# Besides the weights: an autoencoder's and a CLIP text encoder's; and T5's, below.
_CONFIG_FIELDS = ("scaling_factor", "shift_factor", "hidden_act", "num_attention_heads", "layer_norm_eps")
_T5_FIELDS = ("layer_norm_epsilon", "feed_forward_proj", "relative_attention_max_distance")


def add_network(digest: Any, network: nn.Module) -> None:
    """Add a network to a hash: some fields of its configuration, every weight, and the weights' type.

    It reads the weights, not their names or the folder that they came from: names change with library versions.
    """
    config = getattr(network, "config", None)
    digest.update(repr([(name, getattr(config, name, None)) for name in _CONFIG_FIELDS]).encode())
    if getattr(config, "model_type", None) == "t5":
        digest.update(repr([(name, getattr(config, name, None)) for name in _T5_FIELDS]).encode())
    for parameter in network.parameters():
        data = parameter.detach().cpu().contiguous()
        digest.update(repr((tuple(data.shape), str(data.dtype))).encode())
        digest.update(data.reshape(-1).view(torch.uint8).numpy().tobytes())
