"""What evaluations keep: their history, the reference's scores, and under which names pictures lie."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lightning_modules.files import atomic_file, set_aside

log = logging.getLogger(__name__)


def picture_file(prompt: int, picture: int) -> str:
    """Name of a picture's file by its prompt's number and its own among the prompt's pictures: ``00012_03.png``."""
    return f"{prompt:05d}_{picture:02d}.png"


def add_entry(path: Path, entry: Mapping[str, Any]) -> None:
    """Add an evaluation to a history; one of the same split and step (a repeated one) is replaced."""
    history = {(former["split"], former["step"]): former for former in _history(path)}
    history[entry["split"], entry["step"]] = dict(entry)
    _write(path, list(history.values()))


def drop_later_entries(path: Path, step: int) -> None:
    """Take the evaluations of later steps out of a history: of a run that went back to ``step`` they are no part."""
    history = _history(path)
    kept = [entry for entry in history if entry["step"] <= step]
    if len(kept) < len(history):
        _write(path, kept)


def read_kept(path: Path, fits: Callable[[Any], bool]) -> Any:
    """What a file holds, None where there is none.

    One that holds something else is set aside as ``<name>.damaged``, which a line says: it can be made again, or looked
    into, and is no reason to end a run.
    """
    try:
        value = json.loads(path.read_bytes())
        if fits(value):
            return value
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError):
        pass
    log.warning("%s is damaged; set aside as %s, and begun again", path, set_aside(path).name)
    return None


def _history(path: Path) -> list[dict[str, Any]]:
    def is_entry(value: Any) -> bool:
        return isinstance(value, dict) and isinstance(value.get("split"), str) and isinstance(value.get("step"), int)

    return read_kept(path, lambda value: isinstance(value, list) and all(map(is_entry, value))) or []


def _write(path: Path, value: Any) -> None:
    with atomic_file(path) as file:
        file.write(json.dumps(value, indent=1).encode())
