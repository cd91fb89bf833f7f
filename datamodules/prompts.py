"""Prompt files of every common kind -> a list of prompts."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from datamodules.shards.json_files import parse_json
from lightning_modules.errors import DataError
from lightning_modules.files import packaged

# The largest published prompt list here, HPDv2's, has 100 kB a file; a text encoder reads 77 tokens of a prompt.
MAX_FILE_BYTES = 64 * 1024 * 1024
MAX_PROMPT_CHARACTERS = 10_000

KNOWN_FORMS = (
    ".txt with one prompt per line; .json with a list of strings or of objects with a caption; "
    ".jsonl with a prompt field per line; .tsv with a Prompt column (PartiPrompts)"
)


def load_prompts(path: str | Path) -> list[str]:
    """Read a prompt file; its kind follows from its suffix, and blank lines are passed over.

    Known forms: plain text, one prompt per line (``.txt``); a JSON list of strings (HPDv2) or of objects with a
    "caption" (SPO's training prompts) (``.json``); JSON lines with a "prompt" (``.jsonl``); a table with a column
    Prompt (PartiPrompts, ``.tsv``). Lines end at line feeds alone: prompts of web users hold other separators.

    Raises:
        DataError: the file is missing, empty, too large, not UTF-8, or of no known form.
    """
    path = Path(path).expanduser()
    read = _READERS.get(path.suffix.lower())
    if read is None:
        raise DataError(f"prompt file {path}: suffix {path.suffix!r} is not known; known forms: {KNOWN_FORMS}")
    prompts = read(path, _text(path))
    if not prompts:
        raise DataError(f"prompt file {path} holds no prompts; known forms: {KNOWN_FORMS}")
    for number, prompt in enumerate(prompts, 1):
        if not is_prompt(prompt):
            raise DataError(
                f"prompt file {path}: prompt {number} has {len(prompt.strip())} characters, "
                f"expected 1 to {MAX_PROMPT_CHARACTERS}; correct or remove it"
            )
    return prompts


def is_prompt(text: str) -> bool:
    """Whether a text is neither blank nor longer than any prompt."""
    return bool(text.strip()) and len(text) <= MAX_PROMPT_CHARACTERS


def prompt_texts(prompts: Sequence[str] | str, number: int | None = None) -> list[str]:
    """Prompts as given, or out of a file of any kind that ``load_prompts`` reads; the first ``number``.

    A file is looked for from the working folder, then inside the installed ``experiments`` package
    (``embedded/prompts/shapes_test.txt``).
    """
    if not isinstance(prompts, str):
        return list(prompts)[:number]
    return load_prompts(packaged(prompts))[:number]


def _text(path: Path) -> str:
    if path.exists() and not path.is_file():
        raise DataError(f"prompt file {path} is a folder or a device; name a file: {KNOWN_FORMS}")
    try:
        size = path.stat().st_size
        if size > MAX_FILE_BYTES:
            raise DataError(f"prompt file {path} has {size} bytes, more than {MAX_FILE_BYTES}; split it")
        return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise DataError(f"cannot read prompt file {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"prompt file {path} is not UTF-8 text ({error.reason} at byte {error.start})") from error


def _read_lines(path: Path, text: str) -> list[str]:
    return [line.strip() for line in text.split("\n") if line.strip()]


def _read_json(path: Path, text: str) -> list[str]:
    value = _parse(path, text, "the file")
    if not isinstance(value, list):
        raise DataError(f"prompt file {path} holds a JSON {_kind(value)}, not a list; known forms: {KNOWN_FORMS}")
    return [_prompt(path, f"entry {number}", item, "caption") for number, item in enumerate(value, 1)]


def _read_json_lines(path: Path, text: str) -> list[str]:
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    return [_prompt(path, f"line {number}", _parse(path, line, f"line {number}"), "prompt") for number, line in lines]


def _read_table(path: Path, text: str) -> list[str]:
    # PartiPrompts quotes nothing: a quotation mark in a prompt is part of it.
    try:
        rows = list(csv.reader(io.StringIO(text), delimiter="\t", quoting=csv.QUOTE_NONE))
    except csv.Error as error:
        raise DataError(f"prompt file {path} is no table ({error}); known forms: {KNOWN_FORMS}") from error
    header = rows[0] if rows else []
    if "Prompt" not in header:
        shown = str(header)[:200]
        raise DataError(f"prompt file {path} has the columns {shown}, none is Prompt; known forms: {KNOWN_FORMS}")
    prompts = []
    for number, row in enumerate(rows[1:], 2):
        if not row:
            continue
        if len(row) < len(header):
            raise DataError(f"prompt file {path}, line {number}: {len(row)} columns, the header has {len(header)}")
        cells = dict(zip(header, row))
        prompts.append(cells["Prompt"].strip())
    return prompts


def _parse(path: Path, text: str, place: str) -> Any:
    try:
        return parse_json(text)
    except ValueError as error:
        message = f"prompt file {path}: {place} is not valid JSON ({error}); known forms: {KNOWN_FORMS}"
        raise DataError(message) from error


def _prompt(path: Path, place: str, item: Any, field: str) -> str:
    """A prompt from a string or from an object that has it as ``field``."""
    if isinstance(item, str):
        return item
    if isinstance(item, dict) and isinstance(item.get(field), str):
        return str(item[field])
    seen = f"the fields {str(sorted(item))[:200]}" if isinstance(item, dict) else f"a {_kind(item)}"
    raise DataError(
        f"prompt file {path}: {place} has {seen}, expected a string or an object with a text {field!r}; "
        f"known forms: {KNOWN_FORMS}"
    )


def _kind(value: Any) -> str:
    return {dict: "object", list: "list", str: "string", bool: "boolean", type(None): "null"}.get(type(value), "number")


_READERS: dict[str, Callable[[Path, str], list[str]]] = {
    ".txt": _read_lines,
    ".json": _read_json,
    ".jsonl": _read_json_lines,
    ".tsv": _read_table,
}
