"""Callbacks on the command line, by their names: ``--trainer.callbacks.WinRate.every_n_steps=10``.

The parser knows entries of a list by their order alone: a setting below ``--trainer.callbacks`` would change the last.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from omegaconf import OmegaConf
from yaml import YAMLError

from experiments.cli.compose import known_classes, nearest
from experiments.cli.tree import MISSING, class_named_by, class_of, find, merge, put, remove, short
from lightning_modules.errors import ConfigError

LIST = "trainer.callbacks"


def with_callbacks(tree: dict[str, Any], overrides: Sequence[str]) -> tuple[str, ...]:
    """Carry out in ``tree`` every word about callbacks, in their order, and return the other words.

    Raises:
        ConfigError: a callback that the settings don't name, or a setting of one that is not named.
    """
    others: list[str] = []
    rest = iter(overrides)
    for word in rest:
        key, sign, value = word.partition("=")
        if not key.startswith(f"--{LIST}") or key.endswith(".help"):
            others.append(word)
            continue
        if not sign:
            value = next(rest, "")
        _carry_out(tree, key.removeprefix("--"), value)
    return tuple(others)


def _carry_out(tree: dict[str, Any], key: str, text: str) -> None:
    value = _parsed(key, text)
    callbacks = find(tree, LIST)
    callbacks = [] if callbacks in (MISSING, None) else callbacks if isinstance(callbacks, list) else [callbacks]
    if key in (LIST, f"{LIST}+"):
        given = [] if value is None else value if isinstance(value, list) else [value]
        put(tree, LIST, [*(callbacks if key.endswith("+") else []), *map(_as_node, given)])
        return
    put(tree, LIST, callbacks)
    name = key.removeprefix(f"{LIST}.").split(".")[0]
    node = find(tree, f"{LIST}.{name}")
    if node is MISSING:
        raise ConfigError(_not_there(key, name, callbacks))
    if value is None and key == f"{LIST}.{name}":
        remove(tree, key)
        return
    former = find(tree, key)
    put(tree, key, value if former in (MISSING, None) else merge(former, value))


def _parsed(key: str, text: str) -> Any:
    try:
        entries: Any = OmegaConf.to_container(OmegaConf.create(f"- {text}"), resolve=False)
        (value,) = entries
    except (YAMLError, ValueError) as error:
        raise ConfigError(f"{key} cannot be read as YAML, got {text!r}") from error
    return value


def _as_node(value: Any) -> Any:
    return {"class_path": value} if isinstance(value, str) else value


def _not_there(key: str, name: str, callbacks: list[Any]) -> str:
    have = [short(class_of(callback) or "") for callback in callbacks]
    if class_named_by(name) is None:
        first = have[0] if have else "NAME"
        return f"{key}: say of which callback, as in {LIST}.{first}.{name}; there are {', '.join(have) or 'none'}"
    there = f"there are {', '.join(have)}" if have else "there are none"
    add = f"; add it with --{LIST}+={name}" if name in known_classes() and name not in have else ""
    return f"{LIST} names no {name}{nearest(name, have)}; {there}{add}"
