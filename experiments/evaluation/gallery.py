"""The prompts on which a policy gained most, least, and as commonly, with everybody's pictures side by side."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from experiments.evaluation.findings import Method, prompt_differences
from experiments.evaluation.results import Evaluation

PROMPTS = 3  # of each kind
PICTURES = 2  # of a prompt, the first ones
SIDE = 256  # pixels; larger pictures are made smaller, so that the page stays one that can be sent


@dataclass(frozen=True)
class Picture:
    """One picture as the page holds it.

    Attributes:
        file: its path, seen from the evaluation's folder.
        address: it itself, as a ``data:`` address; None where the file is missing or damaged.
        small: whether it is to be enlarged without smoothing.
    """

    file: str
    address: str | None
    small: bool


@dataclass(frozen=True)
class Column:
    """What one method made of a prompt: its mean score, of all its runs, and pictures of the first."""

    method: Method
    score: float
    pictures: list[Picture]


@dataclass(frozen=True)
class Shown:
    """One prompt: its number, the policy's mean score minus the baseline's, and the methods' pictures."""

    number: int
    prompt: str
    difference: float
    columns: list[Column]


@dataclass(frozen=True)
class Gallery:
    """Of one policy by one reward: kinds of prompts ("best", ...) and the prompts."""

    reward: str
    policy: Method
    baseline: Method
    groups: dict[str, list[Shown]]


def gallery(
    evaluation: Evaluation, folder: Path, reward: str, policy: Method, baseline: Method, beside: Sequence[Method]
) -> Gallery:
    """Choose prompts by the paired difference, ties by their order.

    Args:
        evaluation, folder: what was drawn, and where its pictures lie.
        reward: the column that is compared.
        policy, baseline: whose difference counts.
        beside: whose pictures are shown, the baseline and the policy among them.
    """
    differences = prompt_differences(policy, baseline, reward)
    groups = {
        kind: [
            Shown(n, evaluation.prompts[n], differences[n], [_column(one, reward, n, folder) for one in beside])
            for n in numbers
        ]
        for kind, numbers in chosen(differences).items()
    }
    return Gallery(reward, policy, baseline, groups)


def chosen(differences: Sequence[float]) -> dict[str, list[int]]:
    """Numbers of the prompts with the greatest, the middle and the smallest differences, none of them twice."""
    order = sorted(range(len(differences)), key=lambda n: -differences[n])
    each = min(PROMPTS, max(1, len(order) // 3))
    middle = (len(order) - each) // 2
    picked = {"best": order[:each], "worst": order[each:][-each:]}
    left = [n for n in order[middle : middle + each] if n not in (*picked["best"], *picked["worst"])]
    kinds = {"best": picked["best"], "median": left, "worst": picked["worst"]}
    return {kind: numbers for kind, numbers in kinds.items() if numbers}


def _column(method: Method, reward: str, prompt: int, folder: Path) -> Column:
    scores = method.scores(reward)[prompt]
    first = method.runs[0]
    pictures = range(min(PICTURES, len(first.scores[reward][prompt])))
    shown = [embedded(folder, first.picture(prompt, n)) for n in pictures]
    return Column(method, sum(scores) / len(scores), shown)


def embedded(folder: Path, file: str) -> Picture:
    """A picture small enough for a page: as it is, or made smaller and a JPEG."""
    try:
        with Image.open(folder / file) as image:
            picture = image.convert("RGB")
    except OSError:
        return Picture(file, None, False)
    side = max(picture.size)
    buffer = io.BytesIO()
    if side > SIDE:
        picture.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
        picture.save(buffer, "JPEG", quality=88)
    else:
        picture.save(buffer, "PNG")
    kind = "jpeg" if side > SIDE else "png"
    address = f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
    return Picture(file, address, side < SIDE // 2)
