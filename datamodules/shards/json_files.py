"""JSON: written atomically, and read from files that anybody may have written."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any, NoReturn

from lightning_modules.errors import DataError
from lightning_modules.files import atomic_file

# A manifest has 150 bytes per shard, a pool chunk's record 50 bytes per comparison.
MAX_JSON_BYTES = 256 * 1024 * 1024


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` atomically as indented JSON."""
    with atomic_file(path) as file:
        file.write(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False).encode() + b"\n")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file, or ``DataError``."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # a named pipe would wait for a writer that may never come
            raise DataError(f"{path} is a folder, a pipe or a device; name a JSON file")
        if status.st_size > MAX_JSON_BYTES:
            raise DataError(
                f"{path} has {status.st_size} bytes, more than {MAX_JSON_BYTES}; it is damaged, make it again"
            )
        value = parse_json(path.read_bytes())
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise DataError(f"{path}: not valid JSON ({error}); it is damaged, make it again") from error
    if not isinstance(value, dict):
        raise DataError(f"{path}: holds a JSON {type(value).__name__}, expected an object")
    return value


def parse_json(text: str | bytes) -> Any:
    """A value from JSON that anybody may have written.

    Raises:
        ValueError: not JSON, NaN or Infinity (which are no JSON), nested too deeply, or a text that is not Unicode.
    """
    if isinstance(text, bytes):
        text = text.decode("utf-8-sig")
    try:
        value = json.loads(text, parse_constant=_refuse_constant)
        if "\\u" in text:
            # "\\ud800" alone is accepted by the parser, and then by nothing that reads text.
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError("nested too deeply") from None
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")
