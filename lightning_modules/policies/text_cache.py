"""Prompt embeddings by caption, on disk: what encoded them need not be in memory.

The folder holds ``00000.safetensors``, ``00001.safetensors``, ...: rows of some captions each, as the encoders gave
them, with the captions and the hash of the encoders as metadata. Files are added and never changed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save
from torch import nn

from lightning_modules.batches import Conditioning
from lightning_modules.errors import ConfigError, DataError
from lightning_modules.files import atomic_file
from lightning_modules.weights.audit import UNREADABLE
from lightning_modules.weights.network_hash import add_network

COMMAND = "python -m experiments.encode_prompts"
_PARTS = ("embeds", "pooled")


def text_key(encoders: Mapping[str, nn.Module], tokenizers: Sequence[Any], settings: Mapping[str, Any]) -> str:
    """A hash of all that embeddings depend on.

    Args:
        encoders: text encoders by name; their weights are read whole.
        tokenizers: theirs.
        settings: as ``DiffusionPolicy.encoding_settings``.
    """
    digest = hashlib.blake2b(repr(("text", 1, sorted(settings.items()))).encode(), digest_size=16)
    for tokenizer in tokenizers:
        words = (type(tokenizer).__name__, tokenizer.model_max_length, sorted(tokenizer.get_vocab().items()))
        digest.update(repr(words).encode())
    for encoder in encoders.values():
        add_network(digest, encoder)
    return digest.hexdigest()


class TextCache:
    """The embeddings in a folder.

    Args:
        folder: may be empty, or missing until something is added.
        key: hash of the encoders.

    Raises:
        ConfigError: the folder holds embeddings of other encoders.
        DataError: a file is damaged.
    """

    def __init__(self, folder: Path, key: str) -> None:
        self.folder, self.key = folder, key
        self._rows: dict[str, tuple[Path, int]] = {}
        for file in _files(folder):
            metadata = _metadata(file)
            if metadata["key"] != key:
                raise ConfigError(
                    f"text cache {folder}: its embeddings carry the hash {metadata['key']} and this policy's text "
                    f"encoders give {key}: other weights, precision or t5_tokens; fill another folder ({COMMAND})"
                )
            self._rows |= {caption: (file, row) for row, caption in enumerate(metadata["captions"])}

    def missing(self, captions: Sequence[str]) -> list[str]:
        """The different ones that it lacks, in their order."""
        return [caption for caption in dict.fromkeys(captions) if caption not in self._rows]

    def read(self, captions: Sequence[str]) -> Conditioning:
        """One row a caption, on the CPU, as they were encoded.

        Raises:
            ConfigError: it lacks one.
            DataError: a file is gone or damaged.
        """
        missing = self.missing(captions)
        if missing:
            raise ConfigError(
                f"text cache {self.folder}: no embeddings of {missing[0][:200]!r}; add them with {COMMAND} --config "
                f"CONFIG --output {self.folder} (--prompts FILE for others than the config names) and resume, or leave "
                "model.policy.text_cache out"
            )
        return Conditioning.cat([self._read(*self._rows[caption]) for caption in captions])

    def add(self, captions: Sequence[str], cond: Conditioning) -> None:
        """Keep the rows of different captions that it lacks, as one file.

        Raises:
            DataError: the disk does not take it.
        """
        rows = {name: getattr(cond, name) for name in _PARTS if getattr(cond, name) is not None}
        metadata = {"key": self.key, "captions": json.dumps(list(captions))}
        numbers = [int(file.stem) for file in _files(self.folder)]
        file = self.folder / f"{max(numbers, default=-1) + 1:05d}.safetensors"
        with atomic_file(file) as stream:
            stream.write(save({name: value.detach().cpu().contiguous() for name, value in rows.items()}, metadata))
        self._rows |= {caption: (file, row) for row, caption in enumerate(captions)}

    def _read(self, file: Path, row: int) -> Conditioning:
        try:
            with safe_open(file, "pt") as opened:
                found = {name: opened.get_slice(name)[row : row + 1] for name in _PARTS if name in opened.keys()}  # noqa: SIM118
            return Conditioning(**found)
        except UNREADABLE as error:
            raise _damaged(file, error) from error


def cached_captions(folder: Path) -> set[str]:
    """What a folder holds embeddings of, whatever encoded them.

    Raises:
        DataError: a file is damaged.
    """
    return {caption for file in _files(folder) for caption in _metadata(file)["captions"]}


def _files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.glob("*.safetensors") if file.stem.isdecimal())


def _metadata(file: Path) -> dict[str, Any]:
    try:
        with safe_open(file, "pt") as opened:
            metadata = dict(opened.metadata())
            captions = json.loads(metadata["captions"])
            rows = {opened.get_slice(name).get_shape()[0] for name in opened.keys()}  # noqa: SIM118  # no iterator
        if rows != {len(captions)} or not all(isinstance(caption, str) for caption in captions):
            raise ValueError(f"{len(captions)} captions for {rows} rows")
        return {"key": metadata["key"], "captions": captions}
    except UNREADABLE as error:
        raise _damaged(file, error) from error


def _damaged(file: Path, error: Exception) -> DataError:
    return DataError(
        f"text cache: {file} cannot be read ({' '.join(str(error).split())[:200]}); delete it and fill the cache "
        f"again ({COMMAND})"
    )
