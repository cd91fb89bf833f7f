"""The record of choices, ``choices.jsonl``: one JSON object per line, appended and on disk before it is answered.

    {"image_0": "pictures/7_0.png", "image_1": "pictures/7_1.png", "prompt": "a cat", "choice": 1, "annotator": "ann",
     "left": 1, "time": "2026-11-26T09:00:00+00:00"}

``choice`` is 0 or 1, the picture that won wherever it was shown; ``"tie"``; or null, which is no choice: the pair was
skipped (``"skipped": true``), or a choice was taken back. **A reader's rule**: of the lines with the same image_0,
image_1, prompt and annotator the last one counts, and null counts as if there were none. Paths are relative to the
file's folder or absolute; lines end with a line feed alone. ``left`` is the picture that was shown at the left.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import sys
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal

from datamodules.shards.json_files import parse_json
from experiments.labelling.pairs import PicturePair
from lightning_modules.errors import ConfigError, DataError

Answer = Literal[0, 1, "tie", "skip"]

NAME = "choices.jsonl"
LONGEST_NAME = 64  # characters of an annotator's name


class ChoiceLog:
    """What everybody has chosen so far; one process at a time writes it.

    Opening it again after any interruption gives every choice that was answered: a last line that was cut off was
    never answered, and is taken out.

    Args:
        folder: holds or gets ``choices.jsonl``.

    Raises:
        ConfigError: another process writes to it, or the folder cannot be written to.
        DataError: the file holds something else.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / NAME
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("a+b", buffering=0)
        except OSError as error:
            raise ConfigError(f"cannot write {self.path}: {error.strerror}; name another --output") from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._file.close()
            raise ConfigError(f"another process writes to {self.path}; end it, or name another --output") from error
        self._answers: dict[str, dict[PicturePair, Answer]] = {}
        try:
            self._read()
        except BaseException:
            self._file.close()
            raise

    def close(self) -> None:
        self._file.close()

    def answers(self, annotator: str) -> dict[PicturePair, Answer]:
        """One person's choices and skipped pairs, in the order in which they were made."""
        return self._answers.get(annotator, {})

    def annotators(self) -> list[str]:
        return list(self._answers)

    def record(self, pair: PicturePair, annotator: str, answer: Answer, left: int) -> None:
        """Write a choice; on return it is on disk. The same choice again changes nothing.

        Raises:
            DataError: the disk does not take it; then nothing is recorded.
        """
        if self.answers(annotator).get(pair) == answer:
            return
        skipped = {"skipped": True} if answer == "skip" else {}
        self._append(pair, annotator, {"choice": None if skipped else answer, **skipped, "left": left})
        self._note(pair, annotator, answer)

    def take_back(self, pair: PicturePair, annotator: str) -> None:
        """Write that the person has made no choice here; if that is so already, nothing changes.

        Raises:
            DataError: the disk does not take it; then the choice stands.
        """
        if pair in self.answers(annotator):
            self._append(pair, annotator, {"choice": None})
            self._note(pair, annotator, None)

    def _note(self, pair: PicturePair, annotator: str, answer: Answer | None) -> None:
        answers = self._answers.setdefault(annotator, {})
        answers.pop(pair, None)  # so that a new answer is the last one in the order
        if answer is not None:
            answers[pair] = answer

    def _append(self, pair: PicturePair, annotator: str, fields: dict[str, Any]) -> None:
        entry = {"image_0": pair.image_0, "image_1": pair.image_1, "prompt": pair.prompt}
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        entry |= {"choice": fields.pop("choice"), "annotator": annotator, **fields, "time": now}
        line = json.dumps(entry, ensure_ascii=False).encode() + b"\n"
        end = self._file.seek(0, os.SEEK_END)
        try:
            if self._file.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(self._file.fileno())
        except OSError as error:
            with suppress(OSError):
                self._file.truncate(end)
            raise DataError(f"cannot write {self.path}: {error.strerror}; make room, then choose again") from error

    def _read(self) -> None:
        self._file.seek(0)
        content = self._file.readall()
        *lines, tail = content.split(b"\n")
        for number, line in enumerate(lines, 1):
            if line.strip():
                self._note(*self._parsed(line, number))
        if not tail:
            return
        try:
            entry = self._parsed(tail, len(lines) + 1)
        except DataError:
            self._file.truncate(len(content) - len(tail))
            sys.stderr.write(f"{self.path}: the last line was cut off when it was written, and is taken out\n")
        else:  # all but its line feed
            self._note(*entry)
            self._file.write(b"\n")
        os.fsync(self._file.fileno())

    def _parsed(self, line: bytes, number: int) -> tuple[PicturePair, str, Answer | None]:
        try:
            entry = parse_json(line)
        except ValueError as error:
            raise DataError(
                f"{self.path}, line {number}: not valid JSON ({error}); correct or remove the line"
            ) from error
        fields = entry if isinstance(entry, dict) else {}
        texts = [fields.get(name) for name in ("image_0", "image_1", "prompt", "annotator")]
        choice: Any = fields.get("choice", "nothing")
        known = choice is None or choice == "tie" or (type(choice) is int and choice in (0, 1))
        if not (known and all(isinstance(text, str) for text in texts)):
            wanted = 'image_0, image_1, prompt, annotator and a choice of 0, 1, "tie" or null'
            raise DataError(f"{self.path}, line {number}: expected {wanted}; correct or remove the line")
        image_0, image_1, prompt, annotator = map(str, texts)
        skipped = choice is None and fields.get("skipped") is True
        return PicturePair(image_0, image_1, prompt), annotator, "skip" if skipped else choice


def checked_name(name: object) -> str:
    """An annotator's name without outer spaces.

    Raises:
        ConfigError: it is none.
    """
    text = name.strip() if isinstance(name, str) else ""
    if not text or len(text) > LONGEST_NAME or not text.isprintable():
        raise ConfigError(f"a name has 1 to {LONGEST_NAME} printable characters, got {str(name)[:80]!r}")
    return text
