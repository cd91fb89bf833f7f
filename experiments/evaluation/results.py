"""What an evaluation found: every score of every picture, as ``evaluation.json`` keeps them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from callbacks.evaluation.kept import picture_file
from datamodules.shards.json_files import read_json, write_json
from lightning_modules.errors import DataError

FILE = "evaluation.json"

# Column -> prompt -> picture. Columns are the rewards' names, and "<reward>/<part>" for their parts.
NestedScores = dict[str, list[list[float]]]


@dataclass(frozen=True)
class Drawn:
    """The pictures of one policy at one guidance, and what they were scored.

    Attributes:
        label: the method; several of one label (at one guidance) are its runs.
        source: the policy's word of the command line: a run, a folder, a file or a hub id.
        baseline: whether it is what the others are compared with.
        guidance: effective guidance, 1 for none.
        folder: where its pictures lie, seen from the evaluation's folder; see ``picture_file``.
        scores: every column's scores, the same number of pictures for every prompt.
    """

    label: str
    source: str
    baseline: bool
    guidance: float
    folder: str
    scores: NestedScores

    def picture(self, prompt: int, picture: int) -> str:
        """A picture's path, seen from the evaluation's folder."""
        return f"{self.folder}/{picture_file(prompt, picture)}"


@dataclass(frozen=True)
class Evaluation:
    """Several policies under one protocol.

    Attributes:
        protocol: how was drawn and scored, in full.
        prompts: texts.
        drawn: policies and baselines, guidance by guidance.
    """

    protocol: dict[str, Any]
    prompts: list[str]
    drawn: list[Drawn]

    def write(self, folder: Path) -> Path:
        """Write ``evaluation.json`` into the evaluation's folder: the same bytes for the same findings."""
        write_json(folder / FILE, asdict(self))
        return folder / FILE

    @staticmethod
    def read(folder: Path) -> Evaluation:
        """What an evaluation's folder holds.

        Raises:
            DataError: there is none, or it is damaged.
        """
        path = folder / FILE
        if not path.is_file():
            raise DataError(f"{folder} holds no {FILE}; name the --output of a finished experiments.evaluate")
        value = read_json(path)
        try:
            if not all(_fits(entry["scores"], len(value["prompts"])) for entry in value["drawn"]):
                raise ValueError
            return Evaluation(**(value | {"drawn": [Drawn(**entry) for entry in value["drawn"]]}))
        except (KeyError, TypeError, ValueError, AttributeError):
            raise DataError(f"{path} is damaged or of another version; make it again") from None


def _fits(scores: Any, prompts: int) -> bool:
    """Whether every column has the same number of numbers for each of the prompts."""
    rows = [row for column in scores.values() for row in column]
    return (
        all(len(column) == prompts for column in scores.values())
        and len({len(row) for row in rows}) == 1
        and all(isinstance(score, (int, float)) for row in rows for score in row)
    )
