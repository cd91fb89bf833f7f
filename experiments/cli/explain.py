"""One line out of jsonargparse's page: what was wrong, what was given, and the nearest name that exists."""

from __future__ import annotations

import importlib
import inspect
import re
import typing
from collections.abc import Iterable, Iterator
from typing import Any

from experiments.cli.compose import known_classes, nearest

LONGEST = 400  # characters of a message that fits no pattern below; more is a page again

_KEY = re.compile(r'Parser key "([^"]+)"')
_CLASS = re.compile(r"Problem with given class_path '([^']+)'")
_UNKNOWN_OPTION = re.compile(r"Option '([^']+)' is not accepted|unrecognized arguments: -*([^\s=]+)")
_UNKNOWN_CLASS = re.compile(r"Expected a dot import path string: (\S+)")
_NO_MODULE = re.compile(r"No module named '(\w+)[^']*'")
_WRONG_TYPE = re.compile(r"Expected an? (?:<class '([\w.]+)'>|(\w+))[^\n]*?\. Got value: (.+)")
_WRONG_CHOICE = re.compile(r"Expected a typing\.Literal\[(.+)\]\. Got value: (.+)")
_NO_FUNCTION = re.compile(r"expects a function or a callable class: (.+)\n[\s\S]*?Given value: (.+)")


def explain(message: str, options: Iterable[str]) -> str:
    """Args: the parser's message, and the names of its own options (``trainer.max_steps``, ...)."""
    for pattern, tell in (
        (_NO_MODULE, _no_module),
        (_UNKNOWN_OPTION, _unknown_option),
        (_WRONG_CHOICE, _wrong_choice),
        (_UNKNOWN_CLASS, _unknown_class),
        (_WRONG_TYPE, _wrong_type),
        (_NO_FUNCTION, _no_function),
    ):
        found = pattern.search(message)
        if found:
            before = message[: found.start()]
            key = ".".join(_KEY.findall(before))
            classes = _CLASS.findall(before)
            return tell(key, classes[-1] if classes else None, found, list(options))
    line = " ".join(message.split())
    return line if len(line) <= LONGEST else line[:LONGEST] + " ..."


def _no_module(key: str, owner: str | None, found: re.Match[str], options: list[str]) -> str:
    name = found.group(1)
    return f"{key or 'a class'} needs the package {name}, which is not installed: pip install {name}"


def _unknown_option(key: str, owner: str | None, found: re.Match[str], options: list[str]) -> str:
    name = found.group(1) or found.group(2)
    if owner is None:
        top = [*options, *{option.split(".")[0] for option in options}]
        close = nearest(name, top) or nearest(name.split(".")[0], top)
        return f"setting {name!r} does not exist{close}; --help_all lists all"
    name = name.split(".")[0]
    choices = [parameter for parameter in inspect.signature(_load(owner)).parameters if parameter != "self"]
    where = f"{key}.{name}" if key else name
    return (
        f"setting {where!r} does not exist{nearest(name, choices)}; "
        f"{owner.split('.')[-1]} takes {', '.join(choices) or 'no settings'}"
    )


def _unknown_class(key: str, owner: str | None, found: re.Match[str], options: list[str]) -> str:
    name = found.group(1)
    base = _expected_base(owner, key.split(".")[-1])
    if base is not None:
        public = (cls for cls in _subclasses(base) if not (inspect.isabstract(cls) or cls.__name__.startswith("_")))
        choices = sorted({cls.__name__ for cls in public})
        given = f"{name!r}{nearest(name, choices)}"
        return f"{key} wants a class of kind {base.__name__}, got {given}; there are {', '.join(choices)}"
    return f"{key}: no class named {name!r} fits here{nearest(name, known_classes())}"


def _wrong_type(key: str, owner: str | None, found: re.Match[str], options: list[str]) -> str:
    wanted = found.group(1) or found.group(2)
    return f"{key} wants a value of type {wanted.split('.')[-1]}, got {found.group(3).strip()!r}"


def _wrong_choice(key: str, owner: str | None, found: re.Match[str], options: list[str]) -> str:
    return f"{key} wants one of {found.group(1)}, got {found.group(2).strip()!r}"


def _no_function(key: str, owner: str | None, found: re.Match[str], options: list[str]) -> str:
    reason, given = found.groups()
    return f"{key}: {given.strip()!r} is neither a class nor a function that fits here ({reason})"


def _load(path: str) -> type:
    module, _, name = path.rpartition(".")
    loaded: type = getattr(importlib.import_module(module), name)
    return loaded


def _expected_base(owner: str | None, parameter: str) -> type | None:
    """The class that the owner's parameter is annotated with (the first one of a union), if it is one of ours."""
    if owner is None:
        return None
    hint = typing.get_type_hints(inspect.getattr_static(_load(owner), "__init__")).get(parameter)
    return _first_class(hint)


def _first_class(hint: Any) -> type | None:
    parts = typing.get_args(hint)
    if inspect.isclass(hint) and not parts and hint is not type(None):
        return hint
    return next((found for part in parts if (found := _first_class(part)) is not None), None)


def _subclasses(base: type) -> Iterator[type]:
    """All subclasses, after importing the framework's modules that lie beside the base."""
    package = base.__module__.rpartition(".")[0]
    for module in sorted(set(known_classes().values())):
        if package and module.startswith(package + "."):
            importlib.import_module(module)
    pending: list[type] = base.__subclasses__()
    while pending:
        cls = pending.pop()
        pending += cls.__subclasses__()
        yield cls
