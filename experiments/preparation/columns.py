"""Columns of preference tables: which types each may have, and a row's values as the rest of the code expects them.

Tables have passed through pandas, polars, datasets and others, so that the same values come in many types: integers
with gaps as floats with NaN, booleans as 0 and 1, pictures as a structure of bytes and path. What means the same is
taken; another type is refused before any row is read.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.types as kinds

from lightning_modules.errors import DataError


def check_columns(path: Path, schema: pyarrow.Schema, wanted: Mapping[str, str], required: tuple[str, ...]) -> None:
    """Look at a table's columns before its rows are read.

    Args:
        path: the table, for the message.
        schema: its columns.
        wanted: columns that will be read, and what each holds: "picture", "text", "identity", "number" or "flag".
        required: those that must be there.

    Raises:
        DataError: a required column is missing, or a column has a type that cannot hold what is wanted.
    """
    missing = [name for name in required if name not in schema.names]
    if missing:
        raise DataError(
            f"{path} has no column {', '.join(missing)}; it has {', '.join(schema.names)}. "
            f"Pick-a-Pic files have {', '.join(required)}: check --input"
        )
    for name, meaning in wanted.items():
        if name not in schema.names:
            continue
        kind = schema.field(name).type
        expected, fits = TYPES[meaning]
        if not (fits(kind) or (kinds.is_null(kind) and name not in required)):
            raise DataError(f"{path}: column {name} is {kind}, expected {expected}: convert it, or check --input")


def plain(row: Mapping[str, Any], wanted: Mapping[str, str], folder: Path) -> dict[str, Any]:
    """A row with pictures as bytes, identities as text, flags as booleans, and None for NaN.

    Args:
        row: values as pyarrow gives them.
        wanted: as in ``check_columns``.
        folder: from where a picture's path counts.
    """
    return {name: _plain(value, wanted[name], folder) for name, value in row.items()}


def _plain(value: Any, meaning: str, folder: Path) -> Any:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if meaning == "picture" and isinstance(value, Mapping):
        return _picture(value, folder)
    if meaning == "flag":
        return bool(value)
    if meaning == "identity":
        return str(value)
    if meaning == "number" and isinstance(value, float) and value.is_integer():
        return int(value)
    return value


def _picture(value: Mapping[str, Any], folder: Path) -> bytes | None:
    """The bytes of a picture that ``datasets`` stores as bytes or as the path of a file; None if it cannot be read."""
    if value["bytes"] is not None or not value.get("path"):
        return value["bytes"]
    try:
        with open(os.path.join(folder, value["path"]), "rb", buffering=0) as file:  # noqa: PTH118, PTH123  # twice as fast
            return file.read(os.fstat(file.fileno()).st_size)
    except OSError:
        return None


def _is_text(kind: pyarrow.DataType) -> bool:
    if kinds.is_dictionary(kind):
        return _is_text(kind.value_type)
    return kinds.is_string(kind) or kinds.is_large_string(kind) or kinds.is_string_view(kind)


def _is_bytes(kind: pyarrow.DataType) -> bool:
    if kinds.is_dictionary(kind):
        return _is_bytes(kind.value_type)
    return kinds.is_binary(kind) or kinds.is_large_binary(kind) or kinds.is_binary_view(kind)


def _is_picture(kind: pyarrow.DataType) -> bool:
    if kinds.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        inner = kind.field("bytes").type
        return _is_bytes(inner) or kinds.is_null(inner)
    return _is_bytes(kind)


def _is_number(kind: pyarrow.DataType) -> bool:
    return kinds.is_integer(kind) or kinds.is_floating(kind)


TYPES: dict[str, tuple[str, Callable[[pyarrow.DataType], bool]]] = {
    "picture": ("encoded pictures as binary, or as a structure of bytes and path", _is_picture),
    "text": ("text", _is_text),
    "identity": ("text or whole numbers", lambda kind: _is_text(kind) or kinds.is_integer(kind)),
    "number": ("numbers", _is_number),
    "flag": ("booleans, or 0 and 1", lambda kind: kinds.is_boolean(kind) or _is_number(kind)),
}
