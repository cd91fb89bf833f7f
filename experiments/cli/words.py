"""Words of the command line that the parser would read otherwise than they are meant: they are carried out before it.

* Callbacks go by their names, ``--trainer.callbacks.WinRate.every_n_steps=10``. The parser knows entries of a list by
  their order alone: a setting below ``--trainer.callbacks`` would change the last.
* ``null``, mappings, lists and classes below a class. The parser reads them, and hands the text of what it has read to
  the parser of the class: ``--model.policy.negative_prompt=null`` would be the text "None".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from experiments.cli.compose import known_classes, nearest
from experiments.cli.tree import (
    MISSING,
    class_named_by,
    class_of,
    find,
    is_class,
    merge,
    parts,
    put,
    remove,
    short,
    within,
)
from lightning_modules.errors import ConfigError

LIST = "trainer.callbacks"


def with_structures(tree: dict[str, Any], words: Sequence[str]) -> tuple[str, ...]:
    """Put into ``tree`` what words give that is no plain number or text, and return the other words.

    Raises:
        ConfigError: ``null`` below a class that the settings don't name.
    """
    others: list[tuple[str, str]] = []
    for word in words:
        key, _, value = word.removeprefix("--").partition("=")
        given = _structure(tree, key, value)
        *way, _ = parts(key) or [""]
        if given is MISSING or not way or way[0] not in ("model", "data") or key.endswith((".help", "+")):
            others.append((key, word))
            continue
        if not isinstance(find(tree, ".".join(way)), dict):
            if value.strip() in ("null", "~"):
                raise ConfigError(f"{key}=null: the settings name no class for {'.'.join(way)}; name it first")
            others.append((key, word))
            continue
        put(tree, key, merge(find(tree, key), given))
        others = [(former, word) for former, word in others if not within(former, key)]  # given before, and replaced
    return tuple(word for _, word in others)


def _structure(tree: dict[str, Any], key: str, text: str) -> Any:
    """What goes into the tree: nothing, a mapping, a list, a class, or a text that looks like one but is none."""
    if not text.strip():
        return MISSING
    named = class_named_by(text)
    if named == text:
        return {"class_path": text} if is_class(find(tree, key)) or short(text) in known_classes() else MISSING
    try:
        value = _loaded(text)
    except (YAMLError, OmegaConfBaseException):
        return MISSING
    if value is None or text.lstrip().startswith(("{", "[")):
        return value if value is None or isinstance(value, dict | list) else MISSING
    return text if isinstance(value, dict | list) else MISSING


def with_callbacks(tree: dict[str, Any], overrides: Sequence[str]) -> tuple[str, ...]:
    """Carry out in ``tree`` every word about callbacks, in their order, and return the other words.

    Raises:
        ConfigError: a callback that the settings don't name, or a setting of one that is not named.
    """
    others: list[str] = []
    for word in overrides:
        key, _, value = word.partition("=")
        if key.startswith(f"--{LIST}") and not key.endswith(".help"):
            _carry_out(tree, key.removeprefix("--"), value)
        else:
            others.append(word)
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
        return _loaded(text)
    except (YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"{key} cannot be read as YAML, got {text!r}") from error


def _loaded(text: str) -> Any:
    """A text as YAML, with numbers as they are in a file."""
    read: Any = OmegaConf.to_container(OmegaConf.create(f"value:\n  {text}"), resolve=False)
    return read["value"]


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
