"""Prompt files of every common kind -> a list of prompts."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from datamodules.shards.json_files import parse_json
from lightning_modules.errors import DataError
from lightning_modules.files import atomic_file, packaged

# The largest published prompt list here, HPDv2's, has 100 kB a file; a text encoder reads 77 tokens of a prompt.
MAX_FILE_BYTES = 64 * 1024 * 1024
MAX_PROMPT_CHARACTERS = 10_000

FIELDS = ("prompt", "caption")  # of objects in JSON
KNOWN_FORMS = (
    ".txt with one prompt per line; .json with a list of strings or of objects with a prompt or a caption; "
    ".jsonl with such an object per line; .tsv with a Prompt column (PartiPrompts); "
    "a folder of .txt files of one prompt each (DPG-Bench)"
)


def load_prompts(path: str | Path) -> list[str]:
    """Read a prompt file; its kind follows from its suffix.

    Known forms: plain text, one prompt per line (``.txt``); a JSON list of strings (HPDv2) or of objects with a prompt
    (Diffusion-SDPO, ImageReward) or a caption (SPO) (``.json``); JSON lines of such objects (GenEval, ``.jsonl``); a
    table with a column Prompt (PartiPrompts, ``.tsv``); a folder with a ``.txt`` file for each prompt (DPG-Bench),
    names that are numbers first.

    A prompt is read as it stands, for training as for evaluation: its outer spaces and quotation marks are part of it.
    Lines end with a line feed, or a carriage return and one; other separators, which prompts of web users hold, are
    text. Blank lines are no prompts and passed over.

    Raises:
        DataError: the file is missing, empty, too large, not UTF-8, or of no known form.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        prompts = _read_folder(path)
    else:
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


def write_prompts(path: Path, prompts: Sequence[str]) -> None:
    """Write prompts as ``.txt`` or ``.json``, such that ``load_prompts`` and other programs read the same ones.

    Raises:
        DataError: another suffix, or a prompt that is none, or that a text file cannot hold: programs split lines at
            more than line feeds.
    """
    for number, prompt in enumerate(prompts, 1):
        if not is_prompt(prompt):
            raise DataError(
                f"prompt {number} has {len(prompt.strip())} characters, expected 1 to {MAX_PROMPT_CHARACTERS}"
            )
    if path.suffix == ".json":
        content = json.dumps(list(prompts), ensure_ascii=False, indent=0) + "\n"
    elif path.suffix == ".txt":
        for number, prompt in enumerate(prompts, 1):
            if prompt.splitlines() != [prompt] or prompt.startswith("\ufeff"):
                raise DataError(
                    f"prompt {number}, {prompt[:40]!r}, holds a line separator, at which a text file would be split: "
                    f"write {path.with_suffix('.json')} instead"
                )
        content = "".join(prompt + "\n" for prompt in prompts)
    else:
        raise DataError(f"prompts are written as .txt or .json, got {path}")
    with atomic_file(path) as file:
        file.write(content.encode())


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
        raise DataError(f"prompt file {path} is a pipe or a device; name a file: {KNOWN_FORMS}")
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
    return [line for _, line in _lines(text)]


def _lines(text: str) -> list[tuple[int, str]]:
    """Lines that are not blank, without their ends, and their numbers."""
    lines = ((number, line.removesuffix("\r")) for number, line in enumerate(text.split("\n"), 1))
    return [(number, line) for number, line in lines if line.strip()]


def _read_json(path: Path, text: str) -> list[str]:
    value = _parse(path, text, "the file")
    if not isinstance(value, list):
        raise DataError(f"prompt file {path} holds a JSON {_kind(value)}, not a list; known forms: {KNOWN_FORMS}")
    return [_prompt(path, f"entry {number}", item) for number, item in enumerate(value, 1)]


def _read_json_lines(path: Path, text: str) -> list[str]:
    return [_prompt(path, f"line {number}", _parse(path, line, f"line {number}")) for number, line in _lines(text)]


def _read_table(path: Path, text: str) -> list[str]:
    # PartiPrompts quotes nothing: a quotation mark in a prompt is part of it, which readers of CSV take away.
    rows = [(number, line.split("\t")) for number, line in _lines(text)]
    header = rows[0][1] if rows else []
    if "Prompt" not in header:
        shown = str(header)[:200]
        raise DataError(f"prompt file {path} has the columns {shown}, none is Prompt; known forms: {KNOWN_FORMS}")
    for number, row in rows[1:]:
        if len(row) < len(header):
            raise DataError(f"prompt file {path}, line {number}: {len(row)} columns, the header has {len(header)}")
    return [row[header.index("Prompt")] for _, row in rows[1:]]


def prompt_files(folder: Path) -> list[Path]:
    """The ``.txt`` files of a folder in the order of their prompts: names that are numbers first, then by name."""
    try:
        files = [path for path in folder.iterdir() if path.suffix == ".txt" and path.is_file()]
    except OSError as error:
        raise DataError(f"cannot read prompt folder {folder}: {error.strerror or error}") from error
    return sorted(
        files, key=lambda path: (not path.stem.isdecimal(), int(path.stem) if path.stem.isdecimal() else 0, path.stem)
    )


def _read_folder(folder: Path) -> list[str]:
    prompts = []
    for path in prompt_files(folder):
        lines = _lines(_text(path))
        if len(lines) != 1:
            raise DataError(
                f"prompt file {path} has {len(lines)} lines of text; in a folder every file is one prompt: "
                "name the file itself if its lines are"
            )
        prompts.append(lines[0][1])
    return prompts


def _parse(path: Path, text: str, place: str) -> Any:
    try:
        return parse_json(text)
    except ValueError as error:
        message = f"prompt file {path}: {place} is not valid JSON ({error}); known forms: {KNOWN_FORMS}"
        raise DataError(message) from error


def _prompt(path: Path, place: str, item: Any) -> str:
    """A prompt from a string, or from an object that has it as one of ``FIELDS``."""
    if isinstance(item, str):
        return item
    texts = [item[field] for field in FIELDS if field in item] if isinstance(item, dict) else []
    if texts and all(isinstance(text, str) for text in texts):
        if len(set(texts)) == 1:
            return str(texts[0])
        raise DataError(f"prompt file {path}: {place} has a prompt and another caption; leave the one that is meant")
    seen = f"the fields {str(sorted(item))[:200]}" if isinstance(item, dict) else f"a {_kind(item)}"
    raise DataError(
        f"prompt file {path}: {place} has {seen}, expected a string or an object with a text as prompt or caption; "
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
