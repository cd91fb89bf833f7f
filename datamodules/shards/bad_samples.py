"""Samples that cannot be used: skipped, named once, counted, and an error when there are too many."""

from __future__ import annotations

import fcntl
import json
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from datamodules.shards.json_files import parse_json
from lightning_modules.errors import DataError
from lightning_modules.terminal import printable

log = logging.getLogger(__name__)

FILE = "bad_samples.jsonl"
MAX_NAMED = 3  # in the message that ends a run


@dataclass(frozen=True)
class BadSample:
    """A sample that cannot be used: its shard, its key there, and why."""

    shard: str
    key: str
    why: str

    def __str__(self) -> str:
        return printable(f"{self.shard}, sample {self.key}: {self.why}")


class BadSampleError(DataError):
    """One sample is damaged; its shard and the others in it may be fine."""

    def __init__(self, sample: BadSample) -> None:
        super().__init__(f"{sample}; prepare the shards again, which drops such pairs")
        self.sample = sample

    def __reduce__(self) -> tuple[type[BadSampleError], tuple[BadSample]]:
        return BadSampleError, (self.sample,)  # else it would come out of another process without its sample


class BadSamples:
    """Which samples of a data set were found bad, by all processes of a run and over its restarts.

    Finds are kept in one file of the run folder, a line each, so that ranks and a resumed run count together
    without talking to each other. Judged are different samples against the size of the whole data set: the
    order in which they are met doesn't matter, nor how often.

    Args:
        source: the data set as the user named it.
        data: its fingerprint; finds in another data set don't count here.
        total: its samples.
        max_share: the share of them that may be bad. Above 0 one always may.
        file: where finds are kept; None keeps them in this process.
    """

    def __init__(self, source: str, data: str, total: int, max_share: float, file: Path | None) -> None:
        self.source, self.data, self.total, self.max_share, self.file = source, data, total, max_share, file
        self._known: dict[tuple[str, str], BadSample] = {}

    @property
    def allowed(self) -> int:
        """How many different samples may be bad."""
        return max(1, int(self.max_share * self.total)) if self.max_share > 0 else 0

    @property
    def count(self) -> int:
        """How many different bad samples this process knows of."""
        return len(self._known)

    def add(self, found: Sequence[BadSample]) -> None:
        """Note what was found, with a line in the log for each sample that nobody has named before.

        Raises:
            DataError: there are more than are allowed, or the file cannot be written.
        """
        if all((sample.shard, sample.key) in self._known for sample in found):
            return
        for sample in self._remember(found):
            log.warning("skipped a bad sample: %s", sample)
        if len(self._known) > self.allowed:
            raise DataError(self._too_many())

    def summary(self) -> str:
        """How many, and how many of each shard."""
        shards = Counter(sample.shard for sample in self._known.values())
        named = ", ".join(f"{shard} {count}" for shard, count in shards.most_common(MAX_NAMED))
        more = f" and {len(shards) - MAX_NAMED} more shards" if len(shards) > MAX_NAMED else ""
        return f"{len(self._known)} of {self.total} samples of {self.source} are bad ({named}{more})"

    def _too_many(self) -> str:
        first = "; ".join(str(sample) for sample in list(self._known.values())[:MAX_NAMED])
        where = f" (all found so far in {self.file})" if self.file else ""
        return (
            f"{self.summary()}, data.max_bad_share {self.max_share} allows {self.allowed}: {first}{where}; prepare the "
            "shards again, which drops such pairs, or raise data.max_bad_share"
        )

    def forget(self) -> None:
        """Begin again, as a run from scratch does; other data sets' lines stay in the file.

        Raises:
            DataError: the file cannot be written.
        """
        self._known = {}
        if self.file is None or not self.file.exists():
            return
        with self._alone_with() as file:
            lines = [line for line in file.read().splitlines(keepends=True) if not self._parsed(line)]
            file.seek(0)
            file.truncate()
            file.write(b"".join(lines))

    def _remember(self, found: Sequence[BadSample]) -> list[BadSample]:
        """Those of ``found`` that neither this process nor another has named."""
        if self.file is None:
            return self._new(found)
        with self._alone_with() as file:
            written = file.read()
            self._new(self._parsed(written))
            new = self._new(found)
            # A process that was killed may have left half a line, which must not swallow the next.
            start = b"" if written.endswith(b"\n") or not written else b"\n"
            file.write(start + b"".join(self._line(sample) for sample in new))
        return new

    @contextmanager
    def _alone_with(self) -> Iterator[BinaryIO]:
        """The file, open for reading and appending, while no other process has it."""
        assert self.file is not None
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with self.file.open("a+b") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                file.seek(0)
                yield file
        except OSError as error:
            raise DataError(
                f"cannot note bad samples in {self.file}: {error.strerror or error}; free some space or choose "
                "another --run_dir"
            ) from error

    def _new(self, samples: Sequence[BadSample]) -> list[BadSample]:
        new = {}
        for sample in samples:
            if (sample.shard, sample.key) not in self._known:
                new[sample.shard, sample.key] = sample
                self._known[sample.shard, sample.key] = sample
        return list(new.values())

    def _line(self, sample: BadSample) -> bytes:
        return json.dumps({"data": self.data, **vars(sample)}).encode() + b"\n"

    def _parsed(self, written: bytes) -> list[BadSample]:
        samples = []
        for line in written.splitlines():
            try:
                fields = parse_json(line)
            except ValueError:
                continue  # half a line: whoever finds that sample again names it again
            if isinstance(fields, dict) and fields.pop("data", None) == self.data:
                samples.append(BadSample(**{name: str(fields.get(name)) for name in ("shard", "key", "why")}))
        return samples
