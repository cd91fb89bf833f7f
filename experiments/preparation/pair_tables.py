"""Preference pairs as people keep them: a table of picture files, the page's choices, or two folders of pictures."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datamodules.shards.json_files import parse_json
from experiments.cli.compose import nearest
from lightning_modules.errors import ConfigError, DataError

FORMS = (
    "a .csv, .json or .jsonl table with the columns chosen, rejected, prompt, or image_0, image_1, choice, prompt "
    "(paths count from the table's folder), the choices.jsonl of experiments.label, or a folder with chosen/NAME.png, "
    "rejected/NAME.png and the prompt in NAME.txt beside either"
)
PICTURES = (".png", ".jpg", ".jpeg", ".webp")
ROLES = ("chosen", "rejected", "prompt", "image_0", "image_1", "choice")
# Further names that tables have for the same thing.
NAMES = {"caption": "prompt", "text": "prompt", "winner": "choice", "preference": "choice"}
CHOICES = {"0": 1.0, "image_0": 1.0, "left": 1.0, "1": 0.0, "image_1": 0.0, "right": 0.0, "tie": 0.5, "0.5": 0.5}


@dataclass(frozen=True)
class FilePair:
    """Two picture files and how much the first was preferred.

    Attributes:
        first, second: existing files.
        prompt: what both were made from.
        label: 1, 0, or 0.5 for a tie.
    """

    first: Path
    second: Path
    prompt: str
    label: float


def read_file_pairs(place: Path, columns: Mapping[str, str]) -> list[FilePair]:
    """The pairs of a table or a folder, in its order.

    Args:
        place: see ``FORMS``.
        columns: a role (chosen, rejected, prompt, image_0, image_1, choice) and the table's name for it.

    Raises:
        DataError: no pairs, a picture that is not there, or a choice that means nothing.
        ConfigError: a column that the table does not have.
    """
    if place.is_dir() and (place / "choices.jsonl").is_file():
        place = place / "choices.jsonl"
    if not place.exists():
        raise DataError(f"--input {place} does not exist; give {FORMS}")
    if place.is_dir():
        pairs = list(_of_folders(place))
    elif place.suffix.lower() in (".csv", ".json", ".jsonl"):
        pairs = list(_of_table(place, columns))
    else:
        raise DataError(f"--input {place} is no such table; give {FORMS}")
    if not pairs:
        raise DataError(f"--input {place} holds no pairs; give {FORMS}")
    return pairs


def _of_folders(folder: Path) -> Iterator[FilePair]:
    sides = [folder / "chosen", folder / "rejected"]
    if not all(side.is_dir() for side in sides):
        raise DataError(f"--input {folder} has no folders chosen and rejected; give {FORMS}")
    for first in sorted(path for path in sides[0].iterdir() if path.suffix.lower() in PICTURES):
        others = [path for path in sides[1].glob(f"{first.stem}.*") if path.suffix.lower() in PICTURES]
        if len(others) != 1:
            raise DataError(f"{first}: {len(others)} pictures of that name in {sides[1]}, want one")
        texts = [path.with_suffix(".txt") for path in (first, others[0]) if path.with_suffix(".txt").is_file()]
        if not texts:
            raise DataError(f"{first} has no prompt; write it into {first.with_suffix('.txt')}")
        yield FilePair(first, others[0], texts[0].read_text(encoding="utf-8-sig").strip(), 1.0)


def _of_table(table: Path, columns: Mapping[str, str]) -> Iterator[FilePair]:
    rows = _last_choices(list(_rows(table)))
    if not rows:
        return
    names = _names(table, rows[0][1], columns)
    for place, row in rows:
        missing = [name for name in names.values() if name not in row]
        if missing:
            raise DataError(f"{place} has no {missing[0]}")
        prompt = row[names["prompt"]]
        if not isinstance(prompt, str) or not prompt.strip():
            raise DataError(f"{place}: the prompt is {str(prompt)[:80]!r}; write a text")
        if "choice" in names:
            label = CHOICES.get(str(row[names["choice"]]).strip().lower())
            if label is None:
                raise DataError(f"{place}: choice is {row[names['choice']]!r}; want one of {', '.join(CHOICES)}")
            sides = ("image_0", "image_1")
        else:
            label, sides = 1.0, ("chosen", "rejected")
        first, second = (_picture(table, place, row[names[side]]) for side in sides)
        if first == second:
            raise DataError(f"{place}: both pictures are {first}")
        yield FilePair(first, second, prompt.strip(), label)


def _names(table: Path, row: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, str]:
    """Role -> column of the table, for the roles that make a pair."""
    for role, name in columns.items():
        if role not in ROLES:
            raise ConfigError(f"--columns names {role!r}{nearest(role, ROLES)}; there are {', '.join(ROLES)}")
        if name not in row:
            raise ConfigError(f"{table} has no column {name!r}{nearest(name, row)}; it has {', '.join(row)}")
    found = {NAMES.get(name, name): name for name in row} | dict(columns)
    for wanted in (("chosen", "rejected", "prompt"), ("image_0", "image_1", "choice", "prompt")):
        if all(role in found for role in wanted):
            return {role: found[role] for role in wanted}
    raise ConfigError(
        f"{table} has the columns {', '.join(row) or 'none'}; name those of chosen, rejected and prompt, or of "
        "image_0, image_1, choice and prompt, as in --columns chosen=a,rejected=b,prompt=c"
    )


def _last_choices(rows: list[tuple[str, dict[str, Any]]]) -> list[tuple[str, dict[str, Any]]]:
    """Of the page's record the last line of each pair and person; what was skipped or taken back is no choice."""
    if not rows or "annotator" not in rows[0][1]:
        return rows
    last: dict[str, tuple[str, dict[str, Any]]] = {}
    for place, row in rows:
        last[repr([row.get(name) for name in ("image_0", "image_1", "prompt", "annotator")])] = (place, row)
    return [(place, row) for place, row in last.values() if row.get("choice") is not None]


def _rows(table: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each row, with its place for messages."""
    try:
        text = table.read_bytes().decode("utf-8-sig")
        if table.suffix.lower() == ".csv":
            for number, row in enumerate(csv.DictReader(io.StringIO(text, newline="")), start=2):
                yield f"{table}, line {number}", {name: value for name, value in row.items() if name is not None}
            return
        if table.suffix.lower() == ".jsonl":
            found = [parse_json(line) for line in text.split("\n") if line.strip()]
        else:
            found = parse_json(text)
    except (OSError, ValueError, csv.Error) as error:
        raise DataError(f"cannot read {table}: {' '.join(str(error).split())[:200]}") from error
    if not isinstance(found, list) or not all(isinstance(row, dict) for row in found):
        raise DataError(f"{table} is no list of JSON objects; give {FORMS}")
    yield from ((f"{table}, row {number}", row) for number, row in enumerate(found, start=1))


def _picture(table: Path, place: str, name: Any) -> Path:
    if not isinstance(name, str) or not name:
        raise DataError(f"{place}: a picture is {str(name)[:80]!r}; write its path")
    path = table.parent / Path(name).expanduser()
    if not path.is_file():
        raise DataError(f"{place}: the picture {path} does not exist; correct the path, or remove the row")
    return path
