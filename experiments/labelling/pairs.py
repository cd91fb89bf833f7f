"""Pairs of pictures that somebody is to choose from, out of a folder or a table."""

from __future__ import annotations

import csv
import hashlib
import io
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from datamodules.shards.json_files import parse_json
from lightning_modules.errors import DataError

# What both browsers and Pillow show, and nothing that could hold a script, as SVG can.
MEDIA_TYPES = {
    ".png": "image/png",
    ".jpg": "image/jpeg",
    ".jpeg": "image/jpeg",
    ".webp": "image/webp",
    ".gif": "image/gif",
    ".bmp": "image/bmp",
    ".avif": "image/avif",
}
# How the two files of a pair end, after the stem that they share and one of SEPARATORS.
ENDINGS = (("0", "1"), ("1", "2"), ("a", "b"), ("chosen", "rejected"))
SEPARATORS = (".", "_", "-")
MAX_TABLE_BYTES = 256 * 1024 * 1024

KNOWN_FORMS = (
    "a .jsonl or .csv table with image_0, image_1 and prompt; a folder that predict filled with two or more pictures "
    "per prompt (pictures.json); a folder with parquet files of prepare_feedback or Pick-a-Pic; a folder with "
    "NAME_0.png, NAME_1.png and the prompt in NAME.txt; a folder of two folders with pictures of the same names"
)


@dataclass(frozen=True)
class PicturePair:
    """Two pictures of one prompt.

    Attributes:
        image_0, image_1: paths as ``choices.jsonl`` has them: from its folder, or absolute if they lie elsewhere.
        prompt: the text that both were made from.
    """

    image_0: str
    image_1: str
    prompt: str

    @cached_property
    def key(self) -> str:
        """Names the pair in addresses and keys its draws; 16 hexadecimal digits."""
        fields = (self.image_0, self.image_1, self.prompt)
        return hashlib.blake2b(repr(fields).encode(), digest_size=8).hexdigest()

    @staticmethod
    def of(image_0: Path, image_1: Path, prompt: str, record_folder: Path) -> PicturePair:
        """The pair of two absolute paths, as a record in ``record_folder`` names it."""

        def written(path: Path) -> str:
            inside = path.is_relative_to(record_folder)
            return path.relative_to(record_folder).as_posix() if inside else str(path)

        return PicturePair(written(image_0), written(image_1), prompt)


def read_pairs(place: Path, record_folder: Path) -> list[PicturePair]:
    """The pairs of a table or a folder in their order, each once.

    Args:
        place: table or folder, absolute.
        record_folder: where ``choices.jsonl`` is written, absolute.

    Raises:
        DataError: there are none, or a picture or a prompt is missing.
    """
    if place.is_dir():
        found = _from_folder(place)
    elif place.suffix.lower() in (".jsonl", ".csv"):
        found = _from_table(place)
    elif place.exists():
        raise DataError(f"{place} has no pairs of pictures that could be read; known forms: {KNOWN_FORMS}")
    else:
        raise DataError(f"{place} does not exist; --pairs wants {KNOWN_FORMS}")
    rows = [PicturePair.of(*pair, record_folder) for pair in found]
    pairs = list(dict.fromkeys(rows))
    if len(pairs) < len(rows):
        sys.stderr.write(f"note: {len(rows) - len(pairs)} rows of {place} name a pair again; it is shown once\n")
    if not pairs:
        raise DataError(f"{place} holds no pairs of pictures; known forms: {KNOWN_FORMS}")
    return pairs


Found = Iterator[tuple[Path, Path, str]]


def _from_folder(folder: Path) -> Found:
    if (folder / "pictures.json").is_file():
        return _from_predict(folder)
    inner = sorted(path for path in folder.iterdir() if path.is_dir() and _pictures(path))
    if not _pictures(folder) and len(inner) == 2:
        return _of_two_folders(*inner)
    return _by_ending(folder)


def _pictures(folder: Path) -> dict[str, Path]:
    """Stem -> picture, sorted.

    Raises:
        DataError: two pictures have one stem.
    """
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in MEDIA_TYPES and path.is_file():
            if path.stem in found:
                raise DataError(f"{found[path.stem]} and {path} have one stem; remove one of them")
            found[path.stem] = path
    return found


def _by_ending(folder: Path) -> Found:
    pictures = _pictures(folder)
    partners: dict[str, tuple[str, str]] = {}  # first stem -> second stem, stem of both
    taken: set[str] = set()
    for first, second in ENDINGS:
        for stem in pictures:
            for separator in SEPARATORS:
                both = stem.removesuffix(separator + first)
                other = f"{both}{separator}{second}"
                if both and both != stem and other in pictures and not taken & {stem, other}:
                    partners[stem] = other, both
                    taken |= {stem, other}
    _tell_left_out(folder, len(pictures) - len(taken))
    for stem in sorted(partners):
        other, both = partners[stem]
        image_0, image_1 = pictures[stem], pictures[other]
        texts = (folder / f"{both}.txt", image_0.with_suffix(".txt"), image_1.with_suffix(".txt"))
        yield image_0, image_1, _caption(*texts)


def _of_two_folders(first: Path, second: Path) -> Found:
    pictures, others = _pictures(first), _pictures(second)
    _tell_left_out(first.parent, len(pictures.keys() ^ others.keys()))
    for stem, path in pictures.items():
        if stem in others:
            texts = (first.parent / f"{stem}.txt", path.with_suffix(".txt"), others[stem].with_suffix(".txt"))
            yield path, others[stem], _caption(*texts)


def _tell_left_out(folder: Path, count: int) -> None:
    if count:
        sys.stderr.write(f"note: {count} pictures in {folder} have no partner and are not shown\n")


def _caption(*places: Path) -> str:
    """The text of the first file that is there.

    Raises:
        DataError: none is, or it is empty or no text.
    """
    for place in places:
        if place.is_file():
            try:
                text = place.read_bytes().decode("utf-8-sig").strip()
            except UnicodeDecodeError as error:
                raise DataError(f"{place} is not UTF-8 text ({error.reason} at byte {error.start})") from error
            if text:
                return text
    raise DataError(f"the prompt of {places[1].with_suffix('')} is missing; write it into {places[0]}")


def _from_predict(folder: Path) -> Found:
    """Pictures of one prompt, two at a time: the first and the second, the third and the fourth."""
    place = folder / "pictures.json"
    entries = _json(place, _text(place))
    by_prompt: dict[str, list[Path]] = {}
    for entry in entries if isinstance(entries, list) else [None]:
        if not (
            isinstance(entry, dict) and isinstance(entry.get("file"), str) and isinstance(entry.get("prompt"), str)
        ):
            raise DataError(f"{place}: expected a list of {{file, prompt}}, as predict writes it")
        by_prompt.setdefault(entry["prompt"], []).append(_picture(place, "an entry", entry["file"]))
    if entries and all(len(files) == 1 for files in by_prompt.values()):
        raise DataError(f"{place}: one picture per prompt makes no pair; predict with --pictures.images_per_prompt=2")
    _tell_left_out(folder, sum(len(files) % 2 for files in by_prompt.values()))
    for prompt, files in by_prompt.items():
        for first, second in zip(files[::2], files[1::2]):
            yield first, second, prompt


def _from_table(path: Path) -> Found:
    rows = _csv_rows(path) if path.suffix.lower() == ".csv" else _json_rows(path)
    for place, row in rows:
        values = [row.get("image_0"), row.get("image_1"), row.get("prompt", row.get("caption"))]
        if not all(isinstance(value, str) and value.strip() for value in values):
            seen = ", ".join(map(str, row))[:200]
            raise DataError(f"{path}, {place}: has the fields {seen}, expected texts image_0, image_1 and prompt")
        image_0, image_1, prompt = map(str, values)
        yield _picture(path, place, image_0), _picture(path, place, image_1), prompt


def _json_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(_text(path).split("\n"), 1):
        if line.strip():
            row = _json(path, line, f", line {number}")
            if not isinstance(row, dict):
                raise DataError(f"{path}, line {number}: is no JSON object with image_0, image_1 and prompt")
            yield f"line {number}", row


def _csv_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        for number, row in enumerate(csv.DictReader(io.StringIO(_text(path), newline="")), 1):
            yield f"row {number}", row
    except csv.Error as error:
        raise DataError(f"{path} is no CSV table ({error})") from error


def _picture(table: Path, place: str, name: str) -> Path:
    """A picture that a table names, seen from the table's folder.

    Raises:
        DataError: no such file, or no picture by its name.
    """
    path = table.parent / Path(name).expanduser()
    if path.suffix.lower() not in MEDIA_TYPES:
        raise DataError(f"{table}, {place}: {name!r} is no picture; known are {', '.join(MEDIA_TYPES)}")
    if not path.is_file():
        raise DataError(f"{table}, {place}: {path} does not exist; paths count from the table's folder")
    return path


def _text(path: Path) -> str:
    try:
        if path.stat().st_size > MAX_TABLE_BYTES:
            raise DataError(f"{path} has more than {MAX_TABLE_BYTES} bytes; split it")
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start})") from error
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error


def _json(path: Path, text: str, place: str = "") -> Any:
    try:
        return parse_json(text)
    except ValueError as error:
        raise DataError(f"{path}{place}: not valid JSON ({error})") from error
