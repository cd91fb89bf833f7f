"""The texts that an experiment's settings name: prompts in files and lists, captions of shards."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from datamodules.prompts import prompt_texts
from experiments.cli.tree import MISSING, find
from lightning_modules.files import resolved_path

PROMPTS = ("prompts", "test_prompts")
SHARDS = ("shards", "val_shards", "liked", "unliked")


def prompts_of(settings: Mapping[str, Any]) -> list[str]:
    """All prompts of the settings, their negative prompt and the empty one, each once.

    Raises:
        DataError: a prompt file that cannot be read.
    """
    negative = find(settings, "model.policy.negative_prompt")
    found = ["", negative if isinstance(negative, str) else ""]
    for value in _values(settings, PROMPTS):
        found += prompt_texts(value)
    return list(dict.fromkeys(found))


def shards_of(settings: Mapping[str, Any]) -> list[tuple[list[str], Path | None]]:
    """The names of every set of shards, and where remote ones are kept."""
    cache = find(settings, "data.cache_dir")
    folder = resolved_path(cache) if isinstance(cache, str) else None
    data = find(settings, "data")
    values = _values({} if data is MISSING else data, SHARDS)
    return [([value] if isinstance(value, str) else list(value), folder) for value in values]


def shard_captions(names: Sequence[str], cache_dir: Path | None) -> Iterator[str]:
    """The caption of every sample.

    Raises:
        DataError: a shard is missing or damaged.
        ConfigError: remote shards without a folder to keep them in.
    """
    from datamodules.shards.download import Downloads
    from datamodules.shards.locate import open_shards

    yield from open_shards(names, Downloads(cache_dir)).captions()


def _values(node: Any, names: Sequence[str]) -> Iterator[Any]:
    """Of every entry of such a name, wherever it stands in a tree."""
    if isinstance(node, Mapping):
        for name, value in node.items():
            if name in names and value is not None:
                yield value
            else:
                yield from _values(value, names)
    elif isinstance(node, list):
        for entry in node:
            yield from _values(entry, names)
