"""From the command line's words to a job: everything that can be known before weights are read is looked at here."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from datamodules.shards.json_files import read_json, write_json
from experiments.evaluation.job import Entry, Job
from experiments.evaluation.policies import PolicySource, find_policy, own_size
from experiments.evaluation.protocols import ProtocolFile
from lightning_modules.errors import ConfigError
from lightning_modules.files import clear_unfinished, packaged, resolved_path
from lightning_modules.folder_lock import holds_nothing

RECORD = "job.json"
_LABEL = re.compile(r"[^/=]+")


def make_job(
    folder: Path,
    protocol: ProtocolFile,
    texts: Sequence[str],
    policies: Sequence[str],
    baselines: Sequence[str],
    base: str | None,
) -> Job:
    """An evaluation whose policies are there and fit.

    Args:
        folder: its output.
        protocol: how is drawn and scored.
        texts: the prompts.
        policies: words, with a name before them or without.
        baselines: words of what they are compared with.
        base: the word of the base model of words that are none.

    Raises:
        ConfigError: a word that stands for nothing, an overlay of another base model, or names that mean two things.
    """
    words = [labelled(word) for word in policies]
    reference = [labelled(word) for word in baselines]
    sources = [find_policy(word, base) for _, word in (*reference, *words)]
    for source in sources:
        source.check()
    labels = _labels(reference, words)
    entries = [
        Entry(label, source, number < len(reference), f"{number:02d}_{_slug(label)}")
        for number, (label, source) in enumerate(zip(labels, sources, strict=True))
    ]
    sized = replace(protocol, resolution=protocol.resolution or _common_size(sources))
    return Job(folder, sized, tuple(texts), tuple(entries))


def labelled(word: str) -> tuple[str | None, str]:
    """``NAME=WORD``, or a word without a name.

    Raises:
        ConfigError: nothing after the sign.
    """
    name, sign, rest = word.partition("=")
    if not sign or packaged(word).exists() or not _LABEL.fullmatch(name):
        return None, word
    if not rest:
        raise ConfigError(f"policy {word!r}: wants NAME=POLICY")
    return name, rest


def begin(job: Job, described: Callable[[], list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Make the folder this job's, or check that it is; returns how its rewards describe themselves.

    Raises:
        ConfigError: it holds other files, or was begun with another protocol or other policies.
    """
    record = {
        "protocol": job.protocol.settings(job.texts),
        "policies": [
            {"name": entry.label, "policy": entry.source.word, "baseline": entry.baseline, **entry.source.identity()}
            for entry in job.entries
        ],
    }
    clear_unfinished(job.folder)
    path = job.folder / RECORD
    if path.exists():
        before = read_json(path)
        _refuse_other(job.folder, before, record)
        return list(before["rewards"])
    if not holds_nothing(job.folder):
        raise ConfigError(f"{job.folder} holds other files; name a new --output")
    rewards = described()
    write_json(path, {**record, "rewards": rewards})
    return rewards


def _refuse_other(folder: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    former = before.get("protocol")
    if not isinstance(former, dict) or not isinstance(before.get("rewards"), list):
        raise ConfigError(f"{folder / RECORD} is damaged; name a new --output")
    differ = [f"protocol's {key}" for key, value in now["protocol"].items() if former.get(key) != value]
    policies = before.get("policies")
    if policies != now["policies"]:
        differ.append("policies, or files of theirs")
    if differ:
        raise ConfigError(f"{folder} was begun with another {', '.join(differ)} (its {RECORD}); name a new --output")


def _labels(reference: Sequence[tuple[str | None, str]], words: Sequence[tuple[str | None, str]]) -> list[str]:
    """Baselines' and policies' names; one that was not given must not be taken for another's."""
    found = _named(words)
    bases = [
        f"{name} (baseline)" if label is None and name in found else name
        for (label, _), name in zip(reference, _named(reference))
    ]
    both = next((name for name in bases if name in found), None)
    if both is not None:
        raise ConfigError(f"a policy and a baseline are both called {both}; give them different names")
    return [*bases, *found]


def _named(words: Sequence[tuple[str | None, str]]) -> list[str]:
    names = [label or _own_name(word) for label, word in words]
    for (label, word), name in zip(words, names):
        if label is None and names.count(name) > 1:
            raise ConfigError(f"policy {word}: another one is called {name}, too; give NAME={word}")
    return names


def _own_name(word: str) -> str:
    """The last part of a word, but for checkpoints and exports, which the run's name tells better."""
    path = packaged(word)
    path = resolved_path(path) if path.exists() else path
    if path.parent.name in ("checkpoints", "export"):
        return path.parent.parent.name
    return path.name


def _slug(label: str) -> str:
    return re.sub(r"[^A-Za-z0-9.-]+", "_", label)[:40].strip("._") or "policy"


def _common_size(sources: Sequence[PolicySource]) -> int | None:
    sizes = {source.word: own_size(source) for source in sources}
    if len(set(sizes.values())) > 1:
        told = ", ".join(f"{word} {size or 'unknown'}" for word, size in sizes.items())
        raise ConfigError(f"the policies make pictures of different sizes ({told}); give the protocol a resolution")
    return next(iter(sizes.values()))
