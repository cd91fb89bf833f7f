"""Tokenizers of pipelines, which must not know more than the text encoder they are for."""

from __future__ import annotations

from typing import Any

from transformers import CLIPTokenizer

from lightning_modules.errors import ConfigError
from lightning_modules.weights.pretrained import Pretrained


def read_tokenizer(pipeline: Pretrained, name: str, text_encoder: Any, kind: Any = CLIPTokenizer) -> Any:
    """The tokenizer that lies in ``name``; CLIP's cuts where its text encoder does if its files don't say where.

    Args:
        pipeline: where it lies.
        name: its folder there.
        text_encoder: reads its ids.
        kind: its class.

    Raises:
        ConfigError: it knows more tokens than the text encoder.
    """
    tokenizer: Any = pipeline.component(name).load(kind.from_pretrained, kind="tokenizer")
    config = text_encoder.config
    if len(tokenizer) > config.vocab_size:
        raise ConfigError(
            f"the {name} of {pipeline.name!r} knows {len(tokenizer)} tokens and its text encoder {config.vocab_size}; "
            "give the tokenizer that belongs to it"
        )
    if (limit := getattr(config, "max_position_embeddings", None)) is not None:
        # transformers says 10^30 where the files say nothing.
        tokenizer.model_max_length = min(tokenizer.model_max_length, limit)
    return tokenizer
