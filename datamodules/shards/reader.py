"""The shard format: tar files of numbered samples beside a manifest, written atomically, read by random access.

A folder of shards holds ``00000.tar``, ``00001.tar``, ... and, written last, ``manifest.json``. A sample is a few
members of one tar file that share a key, a zero-padded integer::

    000000012.chosen.jpg   000000012.rejected.jpg   000000012.json                     kind "pixels"
    000000012.latents.safetensors   [000000012.embeds.safetensors]   000000012.json    kind "latents"
    000000012.step.safetensors   000000012.json                                        kind "steps"
    000000012.picture.jpg   000000012.json                                             kind "pictures"

The encoded bytes of a picture pass through untouched. Nothing is ever pickled or unpickled. Shards without a
manifest are accepted where their members are named as above.

Reading keeps an index of member offsets for each open tar file, so that any sample can be fetched at any time and a
run's position is one integer. Remote shards are downloaded whole into a cache folder first.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
import weakref
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from datamodules.shards.bad_samples import BadSample, BadSampleError
from datamodules.shards.download import Downloads, Expected, is_remote
from datamodules.shards.manifest import LatentsKey, ShardInfo
from datamodules.shards.samples import Sample
from datamodules.shards.tar_index import Member, TarError, members
from lightning_modules.errors import DataError

# A picture of MAX_PICTURE_PIXELS has less, and so have the latents of one; a sample's json has some hundred bytes.
MAX_MEMBER_BYTES = 256 * 1024 * 1024
MAX_INFO_BYTES = 1024 * 1024
_MEMBER = re.compile(
    r"(\d+)\.(json|(?:chosen|rejected|picture)\.(?:jpg|jpeg|png|webp)|(?:latents|embeds|step)\.safetensors)"
)
_FORMS = ({"chosen", "rejected"}, {"picture"}, {"latents"}, {"step"})  # what a sample has beside its json
_BLOCK = 1 << 20
REMEDY = "copy or download it again, or delete it and prepare the shards again"


class IndexedShard:
    """A local tar file with the offsets of its members; reads any sample without touching the others.

    Raises:
        DataError: the file is missing, truncated, holds another number of samples than expected, or has members
            that are not samples of this format.
    """

    def __init__(self, path: Path, samples: int | None = None) -> None:
        self.path = path
        self.rows: dict[str, dict[str, tuple[int, int]]] = {}
        try:
            # Without blocking: a named pipe would wait for a writer that may never come.
            self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            self.close = weakref.finalize(self, os.close, self._descriptor)
            if not stat.S_ISREG(os.fstat(self._descriptor).st_mode):
                raise DataError(f"shard {path} is a folder, a pipe or a device; name a tar file")
            for member in members(self._descriptor):
                self._add(member)
        except FileNotFoundError as error:
            raise DataError(f"shard {path} does not exist; check the path or prepare the shards again") from error
        except TarError as error:
            raise DataError(f"shard {path}: {error}; {REMEDY}") from error
        except OSError as error:
            raise DataError(f"shard {path} cannot be read ({error.strerror or error}); {REMEDY}") from error
        self._check_samples()
        self.keys = tuple(self.rows)
        if samples is not None and len(self.keys) != samples:
            raise DataError(
                f"shard {path} holds {len(self.keys)} samples but the manifest says {samples}: "
                f"it is truncated or was replaced; {REMEDY}"
            )

    def _check_samples(self) -> None:
        for key, row in self.rows.items():
            roles = {name.split(".")[0] for name in row}
            if not any(roles >= {"json", *needed} for needed in _FORMS):
                raise DataError(
                    f"shard {self.path}: sample {key} has only {sorted(row)}; needed are a json member and "
                    f"a chosen and a rejected picture, or one picture, or latents, or a step; {REMEDY}"
                )

    def _add(self, member: Member) -> None:
        match = _MEMBER.fullmatch(member.name)
        if match is None:
            raise DataError(
                f"shard {self.path}: member {member.name!r} is not a sample: names are an integer key without a dot "
                "and then .json, .chosen.jpg, .rejected.jpg or .picture.jpg (or png, webp), .latents.safetensors, "
                ".embeds.safetensors or .step.safetensors (a dot inside a key merges "
                "samples); rename the members or prepare it again"
            )
        key, name = match.groups()
        row = self.rows.setdefault(key, {})
        if name in row:
            raise DataError(f"shard {self.path}: two members are named {member.name!r}; {REMEDY}")
        row[name] = (member.offset, member.size)

    def check_digest(self, expected: str) -> None:
        """Read the file once, and compare it with what its manifest says.

        Raises:
            DataError: it holds other bytes, or cannot be read.
        """
        found, position = hashlib.blake2b(digest_size=16), 0
        try:
            while block := os.pread(self._descriptor, _BLOCK, position):
                found.update(block)
                position += len(block)
        except OSError as error:
            raise DataError(f"shard {self.path} cannot be read ({error.strerror or error}); {REMEDY}") from error
        if found.hexdigest() != expected:
            raise DataError(
                f"shard {self.path} holds other bytes than its manifest says: it was altered or damaged since it was "
                f"written; {REMEDY}"
            )

    def read(self, key: str, only: str | None = None) -> Sample:
        """All members of a sample, or one alone.

        Raises:
            DataError: the file has been cut since it was opened, or cannot be read any more.
            BadSampleError: a member is larger than any that this program writes.
        """
        found = {}
        for name, (offset, size) in self.rows[key].items():
            if only not in (None, name):
                continue
            limit = MAX_INFO_BYTES if name == "json" else MAX_MEMBER_BYTES
            if size > limit:
                raise BadSampleError(BadSample(str(self.path), key, f"{name} has {size} bytes, more than {limit}"))
            try:
                found[name] = os.pread(self._descriptor, size, offset)
            except OSError as error:
                reason = error.strerror or error
                raise DataError(f"shard {self.path} cannot be read any more ({reason}); {REMEDY}") from error
            if len(found[name]) != size:
                raise DataError(f"shard {self.path} was truncated while in use, at sample {key}; {REMEDY}")
        return Sample(str(self.path), key, found)

    @property
    def kind(self) -> str:
        names = {name for row in self.rows.values() for name in row}
        kinds = {"latents.safetensors": "latents", "step.safetensors": "steps"}
        if any(name.startswith("picture.") for name in names):
            return "pictures"
        return next((kind for member, kind in kinds.items() if member in names), "pixels")


@dataclass(frozen=True)
class Located:
    """A shard and where it is: a local path or a URL."""

    location: str
    info: ShardInfo

    @property
    def expected(self) -> Expected:
        return Expected(self.info.bytes, self.info.digest)


class ShardSet:
    """All shards of a data set, in their given order, read by (shard, row).

    Holds at most ``max_open`` indices and file descriptors; each process opens its own. The bytes of a shard are
    compared with the manifest's hash when it is first opened, once for all processes that read this set: a gigabyte
    takes 1.2 seconds of a core and what its disk needs, and is in the page cache afterwards.
    """

    def __init__(
        self,
        kind: str,
        shards: Sequence[Located],
        latents: LatentsKey | None,
        has_ties: bool,
        downloads: Downloads,
        max_open: int,
    ) -> None:
        self.kind, self.latents, self.has_ties = kind, latents, has_ties
        self._shards, self._downloads, self._max_open = tuple(shards), downloads, max_open
        self._open: OrderedDict[int, IndexedShard] = OrderedDict()
        # In memory that workers share. Two that open a shard at once both check it, which does no harm.
        self._checked = torch.zeros(len(self._shards), dtype=torch.bool).share_memory_()

    @property
    def sizes(self) -> tuple[int, ...]:
        """Samples of every shard."""
        return tuple(shard.info.samples for shard in self._shards)

    def __len__(self) -> int:
        return sum(self.sizes)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict()}  # file descriptors don't travel to another process

    def fingerprint(self) -> str:
        """A hash of what the data set holds, wherever it lies."""
        shards = [(s.info.file, s.info.samples, s.info.bytes, s.info.digest) for s in self._shards]
        key = repr((self.kind, self.latents and self.latents.hash, shards))
        return hashlib.blake2b(key.encode(), digest_size=16).hexdigest()

    def shard(self, number: int) -> IndexedShard:
        """Shard ``number`` with its index, from the open ones or freshly opened."""
        found = self._open.get(number)
        if found is None:
            located = self._shards[number]
            path = Path(located.location)
            if is_remote(located.location):
                path = self._downloads.fetch(located.location, located.expected)
            found = IndexedShard(path, located.info.samples)
            if located.info.digest and not self._checked[number]:
                found.check_digest(located.info.digest)
                self._checked[number] = True
            self._open[number] = found
            if len(self._open) > self._max_open:
                self._open.popitem(last=False)[1].close()
        self._open.move_to_end(number)
        return found

    def read(self, shard: int, row: int) -> Sample:
        """
        Raises:
            DataError: the shard is gone, truncated or of another content than it was.
            BadSampleError: this sample alone cannot be used.
        """
        opened = self.shard(shard)
        return self._read(shard, opened.keys[row])

    def captions(self) -> Iterator[str]:
        """Of every sample, in order, but for damaged ones; no picture is read.

        Raises:
            DataError: a shard is gone or damaged.
        """
        for number in range(len(self._shards)):
            for key in self.shard(number).keys:
                with suppress(BadSampleError):
                    yield self.shard(number).read(key, only="json").info()["caption"]

    def _read(self, shard: int, key: str) -> Sample:
        # Named as the user named it: a cache folder may be another one on another machine.
        location = self._shards[shard].location
        try:
            return replace(self.shard(shard).read(key), shard=location)
        except BadSampleError as error:
            raise BadSampleError(replace(error.sample, shard=location)) from error

    def read_embeds(self, shard: int, sample: Sample, info: Mapping[str, Any]) -> dict[str, Tensor]:
        """The prompt embeddings of a latents sample, stored with it or with an earlier one of its shard."""
        key = info.get("embeds_key", sample.key)
        if not isinstance(key, str) or key not in self.shard(shard).rows:
            raise sample.bad(f"its prompt embeddings should be at sample {str(key)[:80]}, which is not there")
        owner = sample if key == sample.key else self._read(shard, key)
        return owner.tensors("embeds", embeds=2)
