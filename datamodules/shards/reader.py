"""The shard format: tar files of numbered samples beside a manifest, written atomically, read by random access.

A folder of shards holds ``00000.tar``, ``00001.tar``, ... and, written last, ``manifest.json``. A sample is a few
members of one tar file that share a key, a zero-padded integer::

    000000012.chosen.jpg   000000012.rejected.jpg   000000012.json                     kind "pixels"
    000000012.latents.safetensors   [000000012.embeds.safetensors]   000000012.json    kind "latents"
    000000012.step.safetensors   000000012.json                                        kind "steps"

The encoded bytes of a picture pass through untouched. Nothing is ever pickled or unpickled. Shards without a
manifest are accepted where their members are named as above.

Reading keeps an index of member offsets for each open tar file, so that any sample can be fetched at any time and a
run's position is one integer. Remote shards are downloaded whole into a cache folder first.
"""

from __future__ import annotations

import hashlib
import os
import re
import weakref
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import webdataset
from torch import Tensor
from webdataset.shardlists import expand_urls

from datamodules.shards.bad_samples import BadSample, BadSampleError
from datamodules.shards.download import Downloads, Expected, is_remote
from datamodules.shards.json_files import MAX_JSON_BYTES
from datamodules.shards.manifest import MANIFEST, LatentsKey, Manifest, ShardInfo
from datamodules.shards.samples import Sample
from datamodules.shards.tar_index import Member, TarError, members
from lightning_modules.errors import ConfigError, DataError
from lightning_modules.files import atomic_file

KEY_DIGITS = 9
# A picture of MAX_PICTURE_PIXELS has less, and so have the latents of one; a sample's json has some hundred bytes.
MAX_MEMBER_BYTES = 256 * 1024 * 1024
MAX_INFO_BYTES = 1024 * 1024
MAX_OPEN_SHARDS = 32
_MEMBER = re.compile(r"(\d+)\.(json|(?:chosen|rejected)\.(?:jpg|jpeg|png|webp)|(?:latents|embeds|step)\.safetensors)")


# -------------------------------------------------------------------------------------------- writing


class _HashingFile:
    """Passes bytes on to a file and hashes them on the way."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.hash, self.size = file, hashlib.blake2b(digest_size=16), 0

    def write(self, data: bytes) -> int:
        self.hash.update(data)
        self.size += len(data)
        return self.file.write(data)


def write_shard(path: Path, samples: Iterable[tuple[int, Mapping[str, bytes]]]) -> ShardInfo:
    """Write samples (number, {member name without the key: bytes}) as one tar file, atomically.

    The same samples give the same bytes. Samples are consumed one by one, so a shard is never held in memory.
    """
    count = 0
    with atomic_file(path) as file:
        target = _HashingFile(file)
        with webdataset.TarWriter(target, encoder=False, mtime=0) as tar:
            for number, members in samples:
                tar.write({"__key__": f"{number:0{KEY_DIGITS}d}", **members})
                count += 1
    return ShardInfo(path.name, count, target.size, target.hash.hexdigest())


# -------------------------------------------------------------------------------------------- reading


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
            self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            self.close = weakref.finalize(self, os.close, self._descriptor)
            for member in members(self._descriptor):
                self._add(member)
        except FileNotFoundError as error:
            raise DataError(f"shard {path} does not exist; check the path or prepare the shards again") from error
        except TarError as error:
            raise DataError(f"shard {path}: {error}; {_REMEDY}") from error
        except OSError as error:
            raise DataError(f"shard {path} cannot be read ({error.strerror or error}); {_REMEDY}") from error
        self._check_samples()
        self.keys = tuple(self.rows)
        if samples is not None and len(self.keys) != samples:
            raise DataError(
                f"shard {path} holds {len(self.keys)} samples but the manifest says {samples}: "
                f"it is truncated or was replaced; {_REMEDY}"
            )

    def _check_samples(self) -> None:
        for key, row in self.rows.items():
            roles = {name.split(".")[0] for name in row}
            if not any(roles >= {"json", *needed} for needed in ({"chosen", "rejected"}, {"latents"}, {"step"})):
                raise DataError(
                    f"shard {self.path}: sample {key} has only {sorted(row)}; needed are a json member and "
                    f"a chosen and a rejected picture, or latents, or a step; {_REMEDY}"
                )

    def _add(self, member: Member) -> None:
        match = _MEMBER.fullmatch(member.name)
        if match is None:
            raise DataError(
                f"shard {self.path}: member {member.name!r} is not a sample: names are an integer key without a dot "
                "and then .json, .chosen.jpg or .rejected.jpg (or png, webp), .latents.safetensors, "
                ".embeds.safetensors or .step.safetensors (a dot inside a key merges "
                "samples); rename the members or prepare it again"
            )
        key, name = match.groups()
        row = self.rows.setdefault(key, {})
        if name in row:
            raise DataError(f"shard {self.path}: two members are named {member.name!r}; {_REMEDY}")
        row[name] = (member.offset, member.size)

    def read(self, key: str) -> Sample:
        """
        Raises:
            DataError: the file has been cut since it was opened, or cannot be read any more.
            BadSampleError: a member is larger than any that this program writes.
        """
        found = {}
        for name, (offset, size) in self.rows[key].items():
            limit = MAX_INFO_BYTES if name == "json" else MAX_MEMBER_BYTES
            if size > limit:
                raise BadSampleError(BadSample(str(self.path), key, f"{name} has {size} bytes, more than {limit}"))
            try:
                found[name] = os.pread(self._descriptor, size, offset)
            except OSError as error:
                reason = error.strerror or error
                raise DataError(f"shard {self.path} cannot be read any more ({reason}); {_REMEDY}") from error
            if len(found[name]) != size:
                raise DataError(f"shard {self.path} was truncated while in use, at sample {key}; {_REMEDY}")
        return Sample(str(self.path), key, found)

    @property
    def kind(self) -> str:
        names = {name for row in self.rows.values() for name in row}
        kinds = {"latents.safetensors": "latents", "step.safetensors": "steps"}
        return next((kind for member, kind in kinds.items() if member in names), "pixels")


_REMEDY = "copy or download it again, or delete it and prepare the shards again"


@dataclass(frozen=True)
class _Located:
    """A shard and where it is: a local path or a URL."""

    location: str
    info: ShardInfo

    @property
    def expected(self) -> Expected:
        return Expected(self.info.bytes, self.info.digest)


class ShardSet:
    """All shards of a data set, in their given order, read by (shard, row).

    Holds at most ``max_open`` indices and file descriptors; each process opens its own.
    """

    def __init__(
        self,
        kind: str,
        shards: Sequence[_Located],
        latents: LatentsKey | None,
        has_ties: bool,
        downloads: Downloads,
        max_open: int,
    ) -> None:
        self.kind, self.latents, self.has_ties = kind, latents, has_ties
        self._shards, self._downloads, self._max_open = tuple(shards), downloads, max_open
        self._open: OrderedDict[int, IndexedShard] = OrderedDict()

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
            found = self._open[number] = IndexedShard(path, located.info.samples)
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


# ------------------------------------------------------------------------------------------- locating


def open_shards(
    shards: str | Sequence[str], downloads: Downloads | None = None, max_open: int = MAX_OPEN_SHARDS
) -> ShardSet:
    """Find the shards that ``shards`` names.

    Args:
        shards: one or several of: a prepared folder; the URL of one; a tar file's path or URL; a brace list of
            either such as ``data/{00000..00009}.tar``; a ``pipe:`` command that prints a tar file.
        downloads: how remote shards are fetched and where they are kept.
        max_open: how many shards a process keeps open.

    Raises:
        DataError: a shard or manifest is missing, damaged, or of another kind than the rest.
        ConfigError: a remote shard without a cache folder, or a brace list that is malformed.
    """
    downloads = downloads or Downloads()
    names = [shards] if isinstance(shards, str) else list(shards)
    locations = [location for name in names for location in _expand(name)]
    located = [_locate(location, downloads) for location in locations]
    found = [shard for shards_there, _ in located for shard in shards_there]
    if not found:
        raise DataError(f"no shards in {', '.join(names) or 'an empty list'}; prepare them, or check the path")
    first = located[0][1]
    for location, (_, manifest) in zip(locations, located, strict=True):
        if (manifest.kind, manifest.latents) != (first.kind, first.latents):
            raise DataError(
                f"{location} holds {manifest.kind} that do not go with the {first.kind} of {locations[0]}: "
                "train on shards that were prepared alike"
            )
    has_ties = any(manifest.counts.get("ties_kept", 0) for _, manifest in located)
    return ShardSet(first.kind, found, first.latents, has_ties, downloads, max_open)


def _expand(name: str) -> list[str]:
    try:
        return [location.removeprefix("file://") for location in expand_urls(name)]
    except (ValueError, KeyError) as error:
        raise ConfigError(f"shards {name!r}: {error}; write a brace list as {{00000..00009}}.tar") from error


def _locate(location: str, downloads: Downloads) -> tuple[list[_Located], Manifest]:
    """The shards at one location with the manifest that describes them, one made by a scan for bare tar files."""
    if is_remote(location):
        if location.startswith("pipe:") or location.split("?")[0].endswith(".tar"):
            return _bare_remote(location, downloads)
        folder = location.removesuffix(MANIFEST).rstrip("/")
        of_a_manifest = replace(downloads, most_bytes=MAX_JSON_BYTES)
        manifest = Manifest.read(of_a_manifest.fetch(f"{folder}/{MANIFEST}", refresh=True))
        return [_Located(f"{folder}/{shard.file}", shard) for shard in manifest.shards], manifest
    path = Path(location)
    if path.name == MANIFEST:
        path = path.parent
    if path.is_dir():
        if not (path / MANIFEST).exists():
            raise DataError(
                f"{path} has no {MANIFEST}: its preparation has not finished. Run it again to complete it, "
                "or name the tar files themselves, as in folder/{00000..00009}.tar"
            )
        manifest = Manifest.read(path / MANIFEST)
        return [_checked(path / shard.file, shard) for shard in manifest.shards], manifest
    if (path.parent / MANIFEST).exists():
        manifest = Manifest.read(path.parent / MANIFEST)
        mine = [_checked(path, shard) for shard in manifest.shards if shard.file == path.name]
        if mine:
            return mine, manifest
    return _bare(location, path)


def _checked(path: Path, shard: ShardInfo) -> _Located:
    """A local shard whose size is what the manifest says; cheap, so that truncation shows before training starts."""
    if not path.exists():
        raise DataError(f"shard {path} does not exist; check the path or prepare the shards again")
    if path.stat().st_size != shard.bytes:
        raise DataError(
            f"shard {path} has {path.stat().st_size} bytes but the manifest says {shard.bytes}: "
            f"it is truncated or was replaced; {_REMEDY}"
        )
    return _Located(str(path), shard)


def _bare_remote(location: str, downloads: Downloads) -> tuple[list[_Located], Manifest]:
    path = downloads.fetch(location)
    try:
        return _bare(location, path)
    except DataError:
        path.unlink(missing_ok=True)  # nobody knew what was to come: the next run shall ask again
        raise


def _bare(location: str, path: Path) -> tuple[list[_Located], Manifest]:
    scanned = IndexedShard(path)
    if scanned.kind != "pixels":
        raise DataError(
            f"{location}: {scanned.kind} without a {MANIFEST} cannot be checked against the policy; name the folder"
        )
    # Of the name a fingerprint is made; a URL or a command may end in anything.
    name = re.sub(r"[^\w.-]", "_", Path(location).name, flags=re.ASCII)[-200:].lstrip(".") or "_"
    info = ShardInfo(name, len(scanned.keys), path.stat().st_size)
    return [_Located(location, info)], Manifest("pixels", (info,))
