"""A table's rows as preference pairs: chosen and rejected, two pictures and a choice, or pictures and their scores."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, combinations
from pathlib import Path
from typing import Any

from experiments.cli.compose import nearest
from lightning_modules.errors import ConfigError, DataError

Picture = Path | bytes
Row = tuple[str, Mapping[str, Any]]  # with its place, for messages

# What a row may say of pictures, each beside a prompt.
FORMS = (
    ("chosen", "rejected"),
    ("image_0", "image_1", "choice"),
    ("image_0", "image_1", "score_0", "score_1"),
    ("images", "scores"),
    ("image", "score"),
)
ROLES = tuple(dict.fromkeys([*chain(*FORMS), "prompt"]))
FORMS_IN_WORDS = " or of ".join(f"{', '.join(form)} and prompt" for form in FORMS)
# Further names that tables have for the same thing.
NAMES = {"caption": "prompt", "text": "prompt", "winner": "choice", "preference": "choice"}
CHOICES = {"0": 1.0, "image_0": 1.0, "left": 1.0, "1": 0.0, "image_1": 0.0, "right": 0.0, "tie": 0.5, "0.5": 0.5}
CAPTIONS = (".txt", ".caption")  # of files with a picture's prompt beside it


@dataclass(frozen=True)
class FilePair:
    """Two pictures and how much the first was preferred.

    Attributes:
        first, second: existing files, or encoded pictures.
        prompt: what both were made from.
        label: 1, 0, or 0.5 for a tie.
    """

    first: Picture
    second: Picture
    prompt: str
    label: float


@dataclass(frozen=True)
class FromScores:
    """How scored pictures of one prompt become pairs.

    Attributes:
        every: every two pictures; else the best and the worst alone.
        margin: scores closer than that are a tie, as equal scores are.

    Raises:
        ConfigError: a margin below 0.
    """

    every: bool = False
    margin: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.margin < math.inf:
            raise ConfigError(f"--margin must be 0 or more, got {self.margin}")

    def pairs(self, scored: Sequence[tuple[Picture, float]], prompt: str, place: str) -> Iterator[FilePair]:
        """
        Raises:
            DataError: one picture alone.
        """
        if len(scored) < 2:
            raise DataError(f"{place}: {prompt[:80]!r} has one picture, and a pair takes two; add one, or remove it")
        if self.every:
            wanted = list(combinations(scored, 2))
        else:
            ordered = sorted(scored, key=lambda entry: -entry[1])  # of equals the first is the best, the last the worst
            wanted = [(ordered[0], ordered[-1])]
        for (first, high), (second, low) in wanted:
            gap = high - low
            label = 0.5 if gap == 0 or abs(gap) < self.margin else float(gap > 0)
            yield FilePair(first, second, prompt, label)


def pairs_of_rows(
    table: Path, rows: Iterable[Row], columns: Mapping[str, str], from_scores: FromScores
) -> Iterator[FilePair]:
    """The pairs that a table's rows say, in their order; those of single scored pictures by prompt.

    Args:
        table: from whose folder paths count.
        rows: each with its place.
        columns: a role (see ``ROLES``) and the table's name for it.
        from_scores: what becomes of pictures with scores.

    Raises:
        DataError: a picture that is not there, a choice or score that means nothing, or no prompt.
        ConfigError: a column that the table does not have.
    """
    rows = iter(rows)
    head = next(rows, None)
    if head is None:
        return
    reader = TableReader(table, _names(table, head[1], columns))
    if not any(role in reader.names for role in ("score", "scores", "score_0")):
        refuse_unread(table, {}, from_scores)
    groups: dict[str, list[tuple[Picture, float]]] = {}
    for place, row in chain([head], rows):
        if "image" in reader.names:
            picture = reader.picture(place, row, "image")
            group = groups.setdefault(reader.prompt(place, row, [picture]), [])
            group.append((picture, reader.score(place, reader.value(place, row, "score"))))
        elif "images" in reader.names:
            scored = reader.scored(place, row)
            yield from from_scores.pairs(scored, reader.prompt(place, row, [picture for picture, _ in scored]), place)
        else:
            yield from reader.pair(place, row, from_scores)
    for prompt, scored in groups.items():
        yield from from_scores.pairs(scored, prompt, str(table))


def refuse_unread(place: Path, columns: Mapping[str, str], from_scores: FromScores) -> None:
    """For an input without scores, and with ``columns`` given for one without columns of its own.

    Raises:
        ConfigError: it was told what it would never read.
    """
    if columns:
        raise ConfigError(f"--columns is for tables, and {place} is none; leave it out")
    if from_scores != FromScores():
        raise ConfigError(f"--pairs and --margin are for pictures with scores, and {place} has none; leave them out")


def caption_beside(pictures: Sequence[Picture], place: str) -> str:
    """The prompt in a text file beside one of the pictures, as ``NAME.txt`` or ``NAME.caption``.

    Raises:
        DataError: there is none.
    """
    paths = [picture for picture in pictures if isinstance(picture, Path)]
    for text in (path.with_suffix(suffix) for path in paths for suffix in CAPTIONS):
        try:
            return text.read_text(encoding="utf-8-sig").strip()
        except FileNotFoundError:
            continue
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"cannot read {text}: {' '.join(str(error).split())[:200]}") from error
    remedy = f"write it into {paths[0].with_suffix('.txt')}" if paths else "add a column"
    raise DataError(f"{place} has no prompt; {remedy}")


def by_role(table: Path, row: Mapping[str, Any], columns: Mapping[str, str], roles: Sequence[str]) -> dict[str, str]:
    """Role -> column of the table: as the user names them, else by the columns' own names.

    Raises:
        ConfigError: the user names a role or a column that is not there.
    """
    for role, name in columns.items():
        if role not in roles:
            raise ConfigError(f"--columns names {role!r}{nearest(role, roles)}; there are {', '.join(roles)}")
        if name not in row:
            raise ConfigError(f"{table} has no column {name!r}{nearest(name, row)}; it has {', '.join(row)}")
    return {NAMES.get(name, name): name for name in row} | dict(columns)


def _names(table: Path, row: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, str]:
    """Role -> column of the table, for the roles that make a pair."""
    found = by_role(table, row, columns, ROLES)
    for form in FORMS:
        if all(role in found for role in form):
            return {role: found[role] for role in (*form, "prompt") if role in found}
    raise ConfigError(
        f"{table} has the columns {', '.join(row) or 'none'}; name those of {FORMS_IN_WORDS}, as in "
        "--columns chosen=a,rejected=b,prompt=c"
    )


@dataclass(frozen=True)
class TableReader:
    """What a row's columns hold, and what is wrong with it if they don't.

    Attributes:
        table: from whose folder paths count.
        names: role -> column.
    """

    table: Path
    names: Mapping[str, str]

    def pair(self, place: str, row: Mapping[str, Any], from_scores: FromScores) -> Iterator[FilePair]:
        sides = ("chosen", "rejected") if "chosen" in self.names else ("image_0", "image_1")
        first, second = (self.picture(place, row, side) for side in sides)
        if first == second:
            what = first if isinstance(first, Path) else "the same bytes"
            raise DataError(f"{place}: both pictures are {what}")
        prompt = self.prompt(place, row, [first, second])
        if "score_0" in self.names:
            scores = [self.score(place, self.value(place, row, role)) for role in ("score_0", "score_1")]
            every = FromScores(every=True, margin=from_scores.margin)
            yield from every.pairs([(first, scores[0]), (second, scores[1])], prompt, place)
        else:
            yield FilePair(first, second, prompt, self.choice(place, row) if "choice" in self.names else 1.0)

    def value(self, place: str, row: Mapping[str, Any], role: str) -> Any:
        if self.names[role] not in row:
            raise DataError(f"{place} has no {self.names[role]}")
        return row[self.names[role]]

    def choice(self, place: str, row: Mapping[str, Any]) -> float:
        value = self.value(place, row, "choice")
        if isinstance(value, float) and value.is_integer():  # whole numbers with gaps are floats in many tables
            value = int(value)
        label = CHOICES.get(str(value).strip().lower())
        if label is None:
            raise DataError(f"{place}: choice is {value!r}; want one of {', '.join(CHOICES)}")
        return label

    def score(self, place: str, value: Any) -> float:
        try:
            score = float(value)
        except (TypeError, ValueError):
            score = math.nan
        if not math.isfinite(score):
            raise DataError(f"{place}: a score is {str(value)[:80]!r}; write a number")
        return score

    def scored(self, place: str, row: Mapping[str, Any]) -> list[tuple[Picture, float]]:
        images, scores = self.value(place, row, "images"), self.value(place, row, "scores")
        if not isinstance(images, list) or not isinstance(scores, list) or len(images) != len(scores):
            raise DataError(f"{place}: images and scores must be lists of one length")
        found = [self._found(place, image) for image in images]
        return list(zip(found, (self.score(place, score) for score in scores), strict=True))

    def prompt(self, place: str, row: Mapping[str, Any], pictures: Sequence[Picture]) -> str:
        if "prompt" not in self.names:
            return caption_beside(pictures, place)
        prompt = self.value(place, row, "prompt")
        if not isinstance(prompt, str) or not prompt.strip():
            raise DataError(f"{place}: the prompt is {str(prompt)[:80]!r}; write a text")
        return prompt.strip()

    def picture(self, place: str, row: Mapping[str, Any], role: str) -> Picture:
        return self._found(place, self.value(place, row, role))

    def _found(self, place: str, value: Any) -> Picture:
        if isinstance(value, Mapping):  # as Hugging Face's datasets stores pictures
            value = value.get("bytes") or value.get("path")
        if isinstance(value, bytes) and value:
            return value
        if not isinstance(value, str) or not value:
            raise DataError(f"{place}: a picture is {str(value)[:80]!r}; write its path")
        path = self.table.parent / Path(value).expanduser()
        if not path.is_file():
            raise DataError(f"{place}: the picture {path} does not exist; correct the path, or remove the row")
        return path
