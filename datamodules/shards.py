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
import io
import json
import os
import re
import struct
import weakref
import zlib
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO

import torch
import webdataset
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor
from webdataset.shardlists import expand_urls

from datamodules.bad_samples import BadSample, BadSampleError
from datamodules.download import Downloads, Expected, is_remote
from datamodules.files import MAX_JSON_BYTES, atomic_file, parse_json, read_json, write_json
from datamodules.tar_index import Member, TarError, members
from lightning_modules.errors import ConfigError, DataError
from lightning_modules.randomness import generator

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
KEY_DIGITS = 9
PICTURE_FORMATS = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}
# Decoded, a picture of this size takes 200 MB; generated pictures have 0.25 to 4 megapixels.
MAX_PICTURE_PIXELS = 64 * 1024 * 1024
# A picture of MAX_PICTURE_PIXELS has less, and so have the latents of one; a sample's json has some hundred bytes.
MAX_MEMBER_BYTES = 256 * 1024 * 1024
MAX_INFO_BYTES = 1024 * 1024
MAX_SHARD_SAMPLES = 10_000_000
MIN_SAMPLE_BYTES = 1536  # the headers of two members, and a block of json
MAX_OPEN_SHARDS = 32
# What Pillow raises on damaged pictures, depending on the format and on where the damage is.
DECODE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    LookupError,
    OverflowError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
)
# What safetensors raises on damaged bytes, and on types that this torch doesn't know.
TENSOR_ERRORS = (SafetensorError, KeyError, ValueError, RuntimeError, TypeError, OverflowError)
_SHARD_FILE = re.compile(r"[\w-][\w.-]{0,200}", re.ASCII)
_MEMBER = re.compile(r"(\d+)\.(json|(?:chosen|rejected)\.(?:jpg|jpeg|png|webp)|(?:latents|embeds|step)\.safetensors)")


# ---------------------------------------------------------------------------------------------- writing


@dataclass(frozen=True)
class ShardInfo:
    """One tar file: its name in the folder, how many samples it holds, its size, and the hash of its bytes.

    The hash is empty for shards that came without a manifest.
    """

    file: str
    samples: int
    bytes: int
    digest: str = ""

    def __post_init__(self) -> None:
        """
        Raises:
            ValueError: no name of a file in the folder, or numbers that cannot be; manifests are not always ours.
        """
        if not isinstance(self.file, str) or not _SHARD_FILE.fullmatch(self.file) or not isinstance(self.digest, str):
            raise ValueError(f"names a shard outside its folder: {str(self.file)[:80]!r}")
        numbers = self.samples, self.bytes
        if not all(type(number) is int and 0 <= number < 1 << 62 for number in numbers) or not (
            self.samples * MIN_SAMPLE_BYTES <= self.bytes and self.samples <= MAX_SHARD_SAMPLES
        ):
            raise ValueError(f"a shard of {str(self.samples)[:30]} samples and {str(self.bytes)[:30]} bytes")


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


def picture_suffix(data: bytes) -> str | None:
    """``jpg``, ``png`` or ``webp`` from a picture's first bytes, None for anything else."""
    if data[:3] == b"\xff\xd8\xff":
        return "jpg"
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        return "png"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    return None


def pixel_members(chosen: bytes, rejected: bytes, info: Mapping[str, Any]) -> dict[str, bytes]:
    """The members of a pair of encoded pictures; ``info`` needs a "caption"."""
    members = {"json": _dump(info)}
    for role, data in (("chosen", chosen), ("rejected", rejected)):
        suffix = picture_suffix(data)
        if suffix is None:
            raise DataError(f"the {role} picture is neither JPEG, PNG nor WebP: it begins with {data[:8]!r}")
        members[f"{role}.{suffix}"] = data
    return members


def latent_members(
    latents: Mapping[str, Tensor], embeds: Mapping[str, Tensor] | None, info: Mapping[str, Any]
) -> dict[str, bytes]:
    """The members of an encoded pair: latents "chosen" and "rejected", and the prompt's "embeds" and "pooled".

    Prompt embeddings are larger than latents and captions repeat, so a shard stores each caption's once: where
    ``embeds`` is None, ``info["embeds_key"]`` names the sample of the same shard that has them.
    """
    members = {"json": _dump(info), "latents.safetensors": _packed(latents)}
    if embeds is not None:
        members["embeds.safetensors"] = _packed(embeds)
    return members


def step_members(latents: Mapping[str, Tensor], info: Mapping[str, Any]) -> dict[str, bytes]:
    """The members of a pair of denoising steps.

    Args:
        latents: "latents" (x_t), "chosen" and "rejected" (x_{t-1}), and "rejected_latents" where the rejected step
            has its own x_t.
        info: "caption", "timestep", "prev_timestep", "score_gap".
    """
    return {"json": _dump(info), "step.safetensors": _packed(latents)}


def _packed(tensors: Mapping[str, Tensor]) -> bytes:
    # safetensors takes no rows of a batch as they are: they share memory and may be strided.
    return save_tensors({name: value.clone(memory_format=torch.contiguous_format) for name, value in tensors.items()})


def _dump(info: Mapping[str, Any]) -> bytes:
    return json.dumps(info, sort_keys=True, ensure_ascii=False, allow_nan=False).encode()


# ------------------------------------------------------------------------------------------- manifest


@dataclass(frozen=True)
class LatentsKey:
    """What made a folder's latents: ``hash`` covers the networks' weights and the other three fields."""

    hash: str
    resolution: int
    crop: str
    dtype: str

    def __post_init__(self) -> None:
        """
        Raises:
            ValueError: fields of other types; manifests are not always ours.
        """
        if type(self.resolution) is not int or not all(isinstance(f, str) for f in (self.hash, self.crop, self.dtype)):
            raise ValueError("its latents' key has fields of other types")


@dataclass(frozen=True)
class Manifest:
    """What a folder of shards holds and where it came from.

    Attributes:
        kind: "pixels", "latents" or "steps".
        shards: the tar files, in order.
        counts: rows read, pairs kept, and what was dropped, by reason.
        settings: what the shards were made from and with; ``job`` is the hash of these.
        corrupt: names of the first damaged rows.
        latents: set if kind is "latents".
        statistics: numbers about how the samples came about, by name.
    """

    kind: str
    shards: tuple[ShardInfo, ...]
    counts: dict[str, int] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    job: str = ""
    corrupt: tuple[str, ...] = ()
    latents: LatentsKey | None = None
    statistics: dict[str, float] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        write_json(folder / MANIFEST, {"format_version": FORMAT_VERSION, **asdict(self)})

    @staticmethod
    def read(path: Path) -> Manifest:
        """
        Raises:
            DataError: no such file, not JSON, a newer format, or fields missing.
        """
        value = read_json(path)
        version = value.get("format_version")
        if version != FORMAT_VERSION:
            raise DataError(f"{path}: format version {str(version)[:20]}, expected {FORMAT_VERSION}; prepare it again")
        try:
            return Manifest(
                _one_of(value["kind"], ("pixels", "latents", "steps")),
                tuple(ShardInfo(**shard) for shard in value["shards"]),
                {str(name): int(count) for name, count in dict(value["counts"]).items()},
                dict(value["settings"]),
                str(value["job"]),
                tuple(map(str, value["corrupt"])),
                LatentsKey(**value["latents"]) if value["kind"] == "latents" else None,
                # Manifests of an earlier version have none.
                {str(name): float(number) for name, number in dict(value.get("statistics", {})).items()},
            )
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            reason = " ".join(str(error).split())[:200]
            raise DataError(f"{path}: not a shard manifest ({reason}); prepare the shards again") from error


def _one_of(value: Any, known: Sequence[str]) -> str:
    if value not in known:
        raise ValueError(f"{str(value)[:80]!r} is none of {', '.join(known)}")
    return str(value)


# -------------------------------------------------------------------------------------------- reading


@dataclass(frozen=True)
class Sample:
    """One sample's raw members, with where it came from for error messages."""

    shard: str
    key: str
    members: dict[str, bytes]

    def bad(self, why: str) -> BadSampleError:
        """The error that says that this sample cannot be used."""
        return BadSampleError(BadSample(self.shard, self.key, " ".join(why.split())[:300]))

    def info(self) -> dict[str, Any]:
        """The sample's JSON member; it has at least a "caption"."""
        try:
            info = parse_json(self.members["json"])
        except ValueError as error:
            raise self.bad(f"the json member is damaged ({error})") from error
        if not isinstance(info, dict) or not isinstance(info.get("caption"), str):
            raise self.bad(f'the json member needs a text field "caption", got {str(info)[:80]!r}')
        return info

    def number(self, info: Mapping[str, Any], name: str, low: float, high: float) -> float:
        """A field of ``info`` that lies in [low, high]; 1 where it has none."""
        value = info.get(name, 1.0)
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            raise self.bad(f"{name} must lie in [{low}, {high}], got {str(value)[:80]}")
        return float(value)

    def picture(self, role: str) -> bytes:
        """The encoded bytes of the "chosen" or the "rejected" picture."""
        for suffix in ("jpg", "jpeg", "png", "webp"):
            if f"{role}.{suffix}" in self.members:
                return self.members[f"{role}.{suffix}"]
        raise self.bad(f"has no {role} picture")

    def image(self, role: str) -> Image.Image:
        """The "chosen" or the "rejected" picture, decoded."""
        data = self.picture(role)
        try:
            return decode_picture(data)
        except DataError as error:
            raise self.bad(f"{role}: {error}") from error

    def tensors(self, member: str, **dimensions: int) -> dict[str, Tensor]:
        """The tensors of the "latents", the "embeds" or the "step" member.

        Args:
            member: which.
            dimensions: tensors that must be there, by name, and how many dimensions each has.
        """
        try:
            tensors = load_tensors(self.members[f"{member}.safetensors"])
        except TENSOR_ERRORS as error:
            raise self.bad(f"no whole {member} ({type(error).__name__}: {error})") from error
        for name, count in dimensions.items():
            if name not in tensors or tensors[name].ndim != count:
                raise self.bad(f"{member} has no {name!r} of {count} dimensions")
        for name, value in tensors.items():
            if not value.is_floating_point() or not value.float().isfinite().all():
                raise self.bad(f"{member}: {name[:80]!r} holds numbers that are not finite or no numbers at all")
        return tensors


def decode_picture(data: bytes) -> Image.Image:
    """RGB pixels of a JPEG, PNG or WebP picture; what is transparent becomes white.

    Raises:
        DataError: damaged, of another format, or larger than ``MAX_PICTURE_PIXELS``.
    """
    _check_pixels(*_webp_size(data))
    try:
        with Image.open(io.BytesIO(data), formats=tuple(PICTURE_FORMATS.values())) as image:
            _check_pixels(*image.size)
            image.load()
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return image.convert("RGB")
    except DECODE_ERRORS as error:
        raise DataError(f"a damaged picture of {len(data)} bytes ({type(error).__name__}: {error})") from error


def _check_pixels(width: int, height: int) -> None:
    if width * height > MAX_PICTURE_PIXELS:
        raise DataError(f"a picture of {width}x{height} px is larger than {MAX_PICTURE_PIXELS} px")


def _webp_size(data: bytes) -> tuple[int, int]:
    """Width and height from a WebP picture's header; (0, 0) for anything else.

    Pillow makes room for a WebP picture when it is opened, before it tells the size.
    """
    if picture_suffix(data) != "webp" or len(data) < 30:
        return 0, 0
    if data[12:16] == b"VP8X":
        return int.from_bytes(data[24:27], "little") + 1, int.from_bytes(data[27:30], "little") + 1
    if data[12:16] == b"VP8L":
        bits = int.from_bytes(data[21:25], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    return int.from_bytes(data[26:28], "little") & 0x3FFF, int.from_bytes(data[28:30], "little") & 0x3FFF


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


# ---------------------------------------------------------------------------------------------- order


class StoredOrder:
    """Sample n is the n-th as stored; sample N + n is sample n again."""

    def __init__(self, sizes: Sequence[int]) -> None:
        self._ends = list(accumulate(sizes))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, n: int) -> tuple[int, int]:
        """The shard and the row in it of sample n."""
        return _find(self._ends, n % len(self))


class ShuffledOrder:
    """The order in which a run sees N samples: sample n = e N + p is the p-th of epoch e. Nothing is dropped.

    Epoch e permutes the shards by (seed, e), cuts them into windows of ``shuffle_shards`` and permutes the samples
    of each window together by (seed, e, window). So sample n is a pure function of (seed, n), found without
    visiting the samples before it; a process works on one window of shards at a time, which bounds what it opens.

    Attributes:
        sizes: samples of every shard.
        seed: the run's.
        shuffle_shards: 1 mixes within shards only; the number of shards or more is a full shuffle.
    """

    def __init__(self, sizes: Sequence[int], seed: int, shuffle_shards: int) -> None:
        if shuffle_shards < 1:
            raise ConfigError(f"shuffle_shards is {shuffle_shards}, it must be at least 1")
        self.sizes, self.seed, self.shuffle_shards = tuple(sizes), seed, shuffle_shards
        self._total = sum(sizes)
        # Two of each: batches straddle the border of two windows or epochs.
        self._epochs: OrderedDict[int, tuple[list[list[int]], list[int]]] = OrderedDict()
        self._windows: OrderedDict[tuple[int, int], tuple[list[int], list[int]]] = OrderedDict()

    def __len__(self) -> int:
        return self._total

    def __getitem__(self, n: int) -> tuple[int, int]:
        """The shard and the row in it of sample n, for any n >= 0."""
        epoch, position = divmod(n, self._total)
        windows, ends = self._epoch(epoch)
        window, offset = _find(ends, position)
        permutation, shard_ends = self._window(epoch, window, windows[window])
        place, row = _find(shard_ends, permutation[offset])
        return windows[window][place], row

    def _epoch(self, epoch: int) -> tuple[list[list[int]], list[int]]:
        """The epoch's windows, each a list of shards, and the position after each window's last sample."""
        if epoch not in self._epochs:
            order = torch.randperm(len(self.sizes), generator=generator(self.seed, "shards", epoch)).tolist()
            step = self.shuffle_shards
            windows = [order[start : start + step] for start in range(0, len(order), step)]
            ends = list(accumulate(sum(self.sizes[shard] for shard in window) for window in windows))
            _keep_two(self._epochs, epoch, (windows, ends))
        return self._epochs[epoch]

    def _window(self, epoch: int, window: int, shards: list[int]) -> tuple[list[int], list[int]]:
        """A permutation of the window's samples and the position after each of its shards' last sample."""
        if (epoch, window) not in self._windows:
            ends = list(accumulate(self.sizes[shard] for shard in shards))
            permutation = torch.randperm(ends[-1], generator=generator(self.seed, "window", epoch, window)).tolist()
            _keep_two(self._windows, (epoch, window), (permutation, ends))
        return self._windows[epoch, window]


def _find(ends: Sequence[int], position: int) -> tuple[int, int]:
    """Which of several consecutive ranges, given by their ends, holds a position, and how far into it."""
    index = bisect_right(ends, position)
    return index, position - (ends[index - 1] if index else 0)


def _keep_two(cache: OrderedDict[Any, Any], key: Any, value: Any) -> None:
    cache[key] = value
    if len(cache) > 2:
        cache.popitem(last=False)
