"""Prompts of base models with text encoders: encoders in memory, or embeddings out of a cache."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_modules.batches import Conditioning
from lightning_modules.policies.adaptation import Adaptation
from lightning_modules.policies.base import DiffusionPolicy
from lightning_modules.policies.text_cache import TextCache, text_key
from lightning_modules.weights.pretrained import Pretrained


class TextConditioned(DiffusionPolicy):
    """A policy with ``vae``, ``text_encoder...`` and ``tokenizer...`` as in a diffusers pipeline's folder.

    Text encoders that don't train compute in the type that they have, whatever autocast says, so that their results are
    the same in training, in validation and when data is encoded beforehand.

    Attributes:
        negative_prompt: what guidance contrasts with.
        texts_of: with a text cache, the hash of the encoders that filled it: pools are named after it, too.
    """

    # diffusers hides its classes behind a lazy module whose stand-ins the type checker would see.
    vae: Any
    adaptation: Adaptation
    negative_prompt: str | None
    texts_of: str

    def __init__(self) -> None:
        super().__init__()
        self._negative_cache: dict[torch.device, Conditioning] = {}
        self._texts: TextCache | None = None
        self._text_source: tuple[Pretrained, str | None, torch.dtype]  # what ``_load_text`` was given

    @abstractmethod
    def _load_text(self, pipeline: Pretrained, variant: str | None, dtype: torch.dtype) -> None:
        """Set ``text_encoder``, ... in the given number type, and their tokenizers."""

    @abstractmethod
    def _encode_text(self, prompts: list[str]) -> Conditioning:
        """One row per prompt, on the device of the text encoders."""

    def _encode_negative(self) -> Conditioning:
        return self.encode_prompts([self.negative_prompt or ""])

    def encoders(self) -> Mapping[str, nn.Module]:
        if self._texts is None:
            return {"vae": self.vae, **self._text_encoders()}
        self._load_text(*self._text_source)
        text = {name: encoder.requires_grad_(False).eval() for name, encoder in self._text_encoders().items()}
        self._free_text_encoders()
        return {"vae": self.vae, **text}

    def _text_encoders(self) -> dict[str, nn.Module]:
        """Those in memory."""
        return {name: child for name, child in self.named_children() if name.startswith("text_encoder")}

    def _free_text_encoders(self) -> None:
        for name in self._text_encoders():
            delattr(self, name)

    def text_key(self) -> str:
        """A hash of all that prompts' embeddings depend on."""
        text = {name: encoder for name, encoder in self.encoders().items() if name != "vae"}
        tokenizers = [value for name, value in sorted(vars(self).items()) if name.startswith("tokenizer")]
        return text_key(text, tokenizers, self.encoding_settings())

    def use_texts(self, folder: Path) -> None:
        """Take embeddings out of a text cache from now on, and free the text encoders.

        Raises:
            ConfigError: it is of other encoders.
            DataError: a file of it is damaged.
        """
        self._texts = TextCache(folder, self.text_key())
        self.texts_of = self._texts.key
        self._free_text_encoders()

    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        if self._texts is not None:
            return self._texts.read(prompts).to(self.device)
        if self.adaptation.trains_text_encoders:
            return self._encode_text(list(prompts))
        with torch.no_grad(), self._without_autocast():
            return self._encode_text(list(prompts))

    def _without_autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, enabled=False)

    def _negative(self, n: int) -> Conditioning:
        """The negative prompt's conditioning, n rows."""
        if self.adaptation.trains_text_encoders:
            return self._encode_negative().repeat_interleave(n)
        if self.device not in self._negative_cache:
            # Validation may come first and run in inference mode, whose tensors training could not use later.
            with torch.inference_mode(False):
                self._negative_cache[self.device] = self._encode_negative()
        return self._negative_cache[self.device].repeat_interleave(n)
