"""Single pictures, liked or not, out of prepared pairs or of a table with a row per picture."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from datamodules.shards.bad_samples import BadSampleError
from datamodules.shards.pictures import picture_size
from datamodules.shards.reader import ShardSet
from experiments.preparation.pair_rows import Row, TableReader, by_role
from lightning_modules.errors import ConfigError, DataError

Mixed = Literal["liked", "unliked", "drop"]
ROLES = ("image", "liked", "prompt")
LIKED = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}
MAX_NAMED = 20  # damaged pictures that are named


@dataclass(frozen=True)
class Single:
    """An encoded picture with its prompt."""

    picture: bytes
    prompt: str

    @property
    def key(self) -> bytes:
        """The same for the same picture and prompt."""
        prompt = self.prompt.encode()
        return hashlib.blake2b(len(prompt).to_bytes(8, "big") + prompt + self.picture, digest_size=16).digest()


@dataclass
class Found:
    """What is known of the pictures of an input.

    Attributes:
        votes: of each picture by its key, whether it was liked and whether it was not.
        counts: of what was read and left out.
        damaged: names of the first that were left out for that.
    """

    votes: dict[bytes, tuple[bool, bool]] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)
    damaged: list[str] = field(default_factory=list)

    def vote(self, single: Single, liked: bool) -> None:
        for_it, against = self.votes.get(single.key, (False, False))
        self.votes[single.key] = (for_it or liked, against or not liked)

    def drop(self, name: str) -> None:
        self.counts["damaged_dropped"] += 1
        if len(self.damaged) < MAX_NAMED:
            self.damaged.append(name)

    def labels(self, mixed: Mixed) -> dict[bytes, bool]:
        """Whether each picture is liked; those that were both are as ``mixed`` says. Counts them."""
        both = [key for key, votes in self.votes.items() if all(votes)]
        found = {key: votes[0] for key, votes in self.votes.items() if not all(votes)}
        self.counts["mixed"] = len(both)
        if mixed != "drop":
            found |= dict.fromkeys(both, mixed == "liked")
        return found


def of_pairs(shards: ShardSet, found: Found) -> Iterator[tuple[Single, bool]]:
    """Both pictures of every pair that is no tie: the chosen one liked, the rejected one not."""
    for shard, size in enumerate(shards.sizes):
        for row in range(size):
            try:
                sample = shards.read(shard, row)
                info = sample.info()
                label = sample.number(info, "label", 0.5, 1.0)
                pictures = sample.picture("chosen"), sample.picture("rejected")
            except BadSampleError as error:
                found.drop(str(error.sample))
                continue
            found.counts["read"] += 1
            if label == 0.5:
                found.counts["ties_dropped"] += 1
                continue
            yield Single(pictures[0], info["caption"]), True
            yield Single(pictures[1], info["caption"]), False


def of_table(
    table: Path, rows: Iterator[Row], columns: Mapping[str, str], found: Found
) -> Iterator[tuple[Single, bool]]:
    """Every row's picture, by the columns image, liked and prompt.

    Raises:
        DataError: a picture that is not there, or a label or prompt that means nothing.
        ConfigError: a column that the table does not have.
    """
    reader: TableReader | None = None
    for place, row in rows:
        reader = reader or TableReader(table, _names(table, row, columns))
        picture = reader.picture(place, row, "image")
        liked = _liked(place, reader.value(place, row, "liked"))
        prompt = reader.prompt(place, row, [picture])
        data = picture if isinstance(picture, bytes) else picture.read_bytes()
        found.counts["read"] += 1
        try:
            picture_size(data)
        except DataError as error:
            found.drop(f"{place}: {error}")
            continue
        yield Single(data, prompt), liked


def _names(table: Path, row: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, str]:
    """Role -> column of the table."""
    found = by_role(table, row, columns, ROLES)
    if not {"image", "liked"} <= found.keys():
        pairs = {"chosen", "image_0"} & found.keys()
        hint = "; of pairs prepare_pairs makes shards, which can be given here" if pairs else ""
        raise ConfigError(
            f"{table} has the columns {', '.join(row) or 'none'}; name those of image, liked and prompt, as in "
            f"--columns image=a,liked=b,prompt=c{hint}"
        )
    return {role: found[role] for role in ROLES if role in found}


def _liked(place: str, value: Any) -> bool:
    if isinstance(value, float) and value.is_integer():  # whole numbers with gaps are floats in many tables
        value = int(value)
    liked = LIKED.get(str(value).strip().lower())
    if liked is None:
        raise DataError(f"{place}: liked is {str(value)[:80]!r}; want one of {', '.join(LIKED)}")
    return liked
