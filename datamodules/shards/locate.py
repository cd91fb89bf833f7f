"""From what a user names, folders, tar files, brace lists and URLs, to the shards of a data set."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from webdataset.shardlists import expand_urls

from datamodules.shards.download import Downloads, is_remote
from datamodules.shards.json_files import MAX_JSON_BYTES
from datamodules.shards.manifest import MANIFEST, Manifest, ShardInfo
from datamodules.shards.reader import REMEDY, IndexedShard, Located, ShardSet
from lightning_modules.errors import ConfigError, DataError

MAX_OPEN_SHARDS = 32
MAX_SHARDS = 1_000_000  # of one brace list


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
    locations = [location for name in names for location in expand(name)]
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


def expand(name: str) -> list[str]:
    """The locations that a name stands for: several, for a brace list.

    Raises:
        ConfigError: the brace list is malformed, or of too many names.
    """
    if _most_names(name) > MAX_SHARDS:
        raise ConfigError(f"shards {name[:200]!r} is a brace list of more than {MAX_SHARDS} names; name a folder")
    try:
        names = [location.removeprefix("file://") for location in expand_urls(name)]
        return [name if is_remote(name) else str(Path(name).expanduser()) for name in names]
    except (ValueError, KeyError) as error:
        raise ConfigError(f"shards {name!r}: {error}; write a brace list as {{00000..00009}}.tar") from error


def _most_names(name: str) -> int:
    """How many names a brace list stands for, or more, without making any of them."""
    count = 1
    for choices in re.findall(r"\{([^{}]*)\}", name):
        bounds = re.fullmatch(r"(-?\d+)\.\.(-?\d+)(?:\.\.-?\d+)?", choices)
        letters = 58 if ".." in choices else 1  # from A to z
        count *= abs(int(bounds[2]) - int(bounds[1])) + 1 if bounds else choices.count(",") + letters
    return count


def _locate(location: str, downloads: Downloads) -> tuple[list[Located], Manifest]:
    """The shards at one location with the manifest that describes them, one made by a scan for bare tar files."""
    if is_remote(location):
        if location.startswith("pipe:") or location.split("?")[0].endswith(".tar"):
            return _bare_remote(location, downloads)
        folder = location.removesuffix(MANIFEST).rstrip("/")
        of_a_manifest = replace(downloads, most_bytes=MAX_JSON_BYTES)
        manifest = Manifest.read(of_a_manifest.fetch(f"{folder}/{MANIFEST}", refresh=True))
        return [Located(f"{folder}/{shard.file}", shard) for shard in manifest.shards], manifest
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


def _checked(path: Path, shard: ShardInfo) -> Located:
    """A local shard whose size is what the manifest says; cheap, so that truncation shows before training starts."""
    if not path.exists():
        raise DataError(f"shard {path} does not exist; check the path or prepare the shards again")
    if path.stat().st_size != shard.bytes:
        raise DataError(
            f"shard {path} has {path.stat().st_size} bytes but the manifest says {shard.bytes}: "
            f"it is truncated or was replaced; {REMEDY}"
        )
    return Located(str(path), shard)


def _bare_remote(location: str, downloads: Downloads) -> tuple[list[Located], Manifest]:
    path = downloads.fetch(location)
    try:
        return _bare(location, path)
    except DataError:
        path.unlink(missing_ok=True)  # nobody knew what was to come: the next run shall ask again
        raise


def _bare(location: str, path: Path) -> tuple[list[Located], Manifest]:
    scanned = IndexedShard(path)
    if scanned.kind not in ("pixels", "pictures"):
        raise DataError(
            f"{location}: {scanned.kind} without a {MANIFEST} cannot be checked against the policy; name the folder"
        )
    # Of the name a fingerprint is made; a URL or a command may end in anything.
    name = re.sub(r"[^\w.-]", "_", Path(location).name, flags=re.ASCII)[-200:].lstrip(".") or "_"
    info = ShardInfo(name, len(scanned.keys), path.stat().st_size)
    return [Located(location, info)], Manifest(scanned.kind, (info,))
