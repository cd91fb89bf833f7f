"""A tree of settings: mappings, lists, and classes, which are ``{class_path: Name, init_args: {...}}``.

A key names a node of it, ``model.objective.beta``: ``init_args`` may be left out, and an entry of a list goes by its
class's name or by its number, ``trainer.callbacks.WinRate.every_n_steps``.
"""

from __future__ import annotations

import re
from typing import Any

from lightning_modules.errors import ConfigError

MISSING = object()


def is_class(node: Any) -> bool:
    return isinstance(node, dict) and isinstance(node.get("class_path"), str)


def class_of(node: Any) -> str | None:
    """The path of a class, short or dotted, of a node that is one or only its name, else None."""
    if isinstance(node, str):
        return class_named_by(node)
    return node["class_path"] if is_class(node) else None


def same_class(one: str, other: str) -> bool:
    """Whether two class paths, short or dotted, name the same class."""
    return one == other or (("." not in one or "." not in other) and short(one) == short(other))


def short(path: str) -> str:
    """``DPO`` of ``lightning_modules.objectives.dpo.DPO``."""
    return path.rpartition(".")[2]


def class_named_by(value: str) -> str | None:
    """``DPO``, ``package.DPO`` or ``{class_path: DPO, ...}`` as typed on a command line, else None."""
    if re.fullmatch(r"(\w+\.)*_?[A-Z]\w*", value) and value not in ("None", "True", "False"):
        return value
    if value.lstrip().startswith("{"):
        match = re.search(r"""["']?class_path["']?\s*:\s*["']?([\w.]+)""", value)
        return match.group(1) if match else None
    return None


def parts(key: str) -> list[str]:
    return [part for part in key.split(".") if part != "init_args"]


def plain(key: str) -> str:
    """The key without ``init_args``, so that one node has one key."""
    return ".".join(parts(key))


def within(key: str, other: str) -> bool:
    """Whether the node at ``key`` is the one at ``other`` or lies below it."""
    return key == other or key.startswith(f"{other}.")


def child(node: Any, part: str) -> Any:
    """The node below ``node`` that ``part`` names, or ``MISSING``."""
    if isinstance(node, list):
        return next((node[number] for number in _entries(node, part)), MISSING)
    fields = node.get("init_args") if is_class(node) else node
    return fields.get(part, MISSING) if isinstance(fields, dict) else MISSING


def find(tree: Any, key: str) -> Any:
    """The node at ``key``, or ``MISSING``."""
    for part in parts(key):
        tree = child(tree, part)
    return tree


def put(tree: Any, key: str, value: Any) -> None:
    """Replace the node at ``key``; mappings on the way to it are made where there are none, a list's entries not."""
    *way, last = parts(key)
    for part in way:
        below = child(tree, part)
        if not isinstance(below, dict | list):
            below = {"class_path": below} if isinstance(below, str) else {}
            put(tree, part, below)
        tree = below
    if isinstance(tree, list):
        for number in _entries(tree, last):
            tree[number] = value
    elif is_class(tree):
        tree["init_args"] = {**(tree.get("init_args") or {}), last: value}
    else:
        tree[last] = value


def remove(tree: Any, key: str) -> None:
    """Take the node at ``key`` out, if there is one."""
    *way, last = parts(key)
    for part in way:
        tree = child(tree, part)
    if isinstance(tree, list):
        for number in _entries(tree, last):
            del tree[number]
    elif isinstance(tree, dict):
        (tree.get("init_args") or {} if is_class(tree) else tree).pop(last, None)


def _entries(nodes: list[Any], part: str) -> list[int]:
    """Where in a list the entry is that ``part`` names: nowhere, or in one place."""
    if part.isdigit():
        return [int(part)] if int(part) < len(nodes) else []
    named = [number for number, node in enumerate(nodes) if short(class_of(node) or "") == part]
    return named[:1]


def merge(below: Any, above: Any) -> Any:
    """``above`` over ``below``: mappings key by key, everything else replaced; ``key+`` appends to a list.

    A class that changes replaces its node whole; see the docstring of ``compose``. Over a class ``init_args`` may be
    left out, ``objective: {beta: 100}``; a mapping without a class takes the one that is laid over it. A mapping over a
    list of classes changes those that it names, ``callbacks: {WinRate: {every_n_steps: 100}, SampleGrid: null}``.

    Raises:
        ConfigError: a class that the list does not hold, or appending to what is no list.
    """
    if isinstance(below, list) and isinstance(above, dict) and not is_class(above):
        return _merge_named(below, above)
    if isinstance(above, str) and is_class(below) and class_named_by(above) == above:
        return below if same_class(below["class_path"], above) else {"class_path": above}
    if isinstance(below, str) and isinstance(above, dict) and class_named_by(below) == below:
        below = {"class_path": below}
    if not (isinstance(below, dict) and isinstance(above, dict)):
        return above
    if is_class(below) and not _has_keywords(above):
        above = {"init_args": above}
    if is_class(above) and below and not _has_keywords(below):
        below = {"class_path": above["class_path"], "init_args": below}
    if is_class(below) and is_class(above) and not same_class(below["class_path"], above["class_path"]):
        return above
    merged = dict(below)
    for key, value in above.items():
        if isinstance(key, str) and key.endswith("+"):
            merged[key[:-1]] = _appended(key, merged.get(key[:-1]), value)
        else:
            merged[key] = merge(merged[key], value) if key in merged else value
    return merged


def _has_keywords(node: dict[str, Any]) -> bool:
    return not node.keys().isdisjoint(("class_path", "init_args", "dict_kwargs"))


def _appended(key: str, former: Any, value: Any) -> list[Any]:
    if isinstance(former, dict):
        raise ConfigError(f"a config appends to {key[:-1]}, which is no list below it, but has {', '.join(former)}")
    lists = [[] if node is None else node if isinstance(node, list) else [node] for node in (former, value)]
    return lists[0] + lists[1]


def _merge_named(below: list[Any], above: dict[Any, Any]) -> list[Any]:
    changed: dict[int, Any] = {}
    for name, value in above.items():
        entries = _entries(below, str(name))
        if not entries:
            have = ", ".join(short(class_of(node) or str(node)) for node in below)
            raise ConfigError(f"a config changes {name}, which the list below it does not hold; there are {have}")
        number = entries[0]
        changed[number] = MISSING if value is None else merge(changed.get(number, below[number]), value)
    present = (changed.get(number, node) for number, node in enumerate(below))
    return [node for node in present if node is not MISSING]


def switch_class(tree: dict[str, Any], key: str, value: str) -> None:
    """If the setting gives the node at ``key`` another class, empty the node; else leave the tree alone."""
    key = key.removesuffix(".class_path")
    node, given = find(tree, key), class_named_by(value)
    if is_class(node) and given is not None and not same_class(node["class_path"], given):
        put(tree, key, {"class_path": given})


def references(node: Any, key: str = "") -> dict[str, str]:
    """Key -> text of every value that is taken from elsewhere: ``{"model.seed": "${seed_everything}"}``."""
    if isinstance(node, str):
        return {key: node} if "${" in node else {}
    fields = node.get("init_args") if is_class(node) else node
    if isinstance(fields, list):
        fields = dict(enumerate(fields))
    found: dict[str, str] = {}
    for name, value in (fields or {}).items() if isinstance(fields, dict) else ():
        found |= references(value, f"{key}.{name}" if key else str(name))
    return found


def flat(node: Any, key: str = "") -> dict[str, Any]:
    """Key -> value of every setting; a class is one, too, by its path, and an entry of a list goes by its class."""
    if is_class(node):
        return {key: node["class_path"]} | flat(node.get("init_args") or {}, key)
    if isinstance(node, list) and any(is_class(entry) for entry in node):
        node = {short(entry["class_path"]) if is_class(entry) else i: entry for i, entry in enumerate(node)}
    if not isinstance(node, dict):
        return {key: node}
    found: dict[str, Any] = {}
    for name, value in node.items():
        found |= flat(value, f"{key}.{name}" if key else str(name))
    return found
