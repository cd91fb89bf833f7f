"""Files that ship in a folder of the package, by their names, or a user's own of the same kind."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from experiments.cli.compose import nearest
from lightning_modules.errors import ConfigError


def packaged(folder: str) -> list[str]:
    """Names of the YAML files in a folder of ``experiments``."""
    entries = (resources.files("experiments") / folder).iterdir()
    return sorted(entry.name.removesuffix(".yaml") for entry in entries if entry.name.endswith(".yaml"))


def read_packaged(kind: str, folder: str, name: str) -> tuple[Path, Any]:
    """A file by its path, or by its name if it ships, and what it holds; a user's own of that name goes first.

    Args:
        kind: what such a file is, for messages.
        folder: of ``experiments``, where those that ship are.
        name: as the user typed it.

    Raises:
        ConfigError: no such file, or one that is no YAML.
    """
    shipped = Path(str(resources.files("experiments"))) / folder / f"{name}.yaml"
    path = shipped if shipped.is_file() and not Path(name).is_file() else Path(name).expanduser()
    if not path.is_file():
        known = packaged(folder)
        raise ConfigError(f"{kind} {name!r}{nearest(name, known)}: no file, and none of {', '.join(known)}")
    try:
        return path, yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, OSError, ValueError) as error:
        raise ConfigError(f"{kind} {path}: cannot be read as YAML ({' '.join(str(error).split())})") from error
