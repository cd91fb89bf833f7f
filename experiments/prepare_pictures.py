"""Single pictures, liked or not -> shards that ``SinglePicturesDataModule`` reads, for KTO.

    python -m experiments.prepare_pictures --input data/pickapic --output data/kto
    python -m experiments.prepare_pictures --input ratings.csv --output data/kto
    python -m experiments.prepare_pictures --input ratings.jsonl --columns image=file,liked=thumb --output data/kto

Input is one of
  - shards of pairs as prepare_pairs and prepare_pickapic make them (pictures, not latents): a folder or a tar file.
    A chosen picture is liked, a rejected one is not; ties say nothing. Each picture of a prompt is kept once. One that
    was chosen here and rejected there is as --mixed says: liked, as in Diffusion-KTO, unliked, or dropped.
  - a .csv, .json, .jsonl or .parquet table with a row per picture: image (a path, which counts from the table's folder,
    or in parquet bytes), liked (1 or 0, true or false, yes or no), prompt; without a column for the prompt it is read
    from NAME.txt or NAME.caption beside the picture.

Written are DIR/liked and DIR/unliked, a folder of shards each, and captions.json. The pictures' bytes pass through
untouched.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

from rich.console import Console

from datamodules.prompts import is_prompt
from datamodules.shards.locate import open_shards
from datamodules.shards.manifest import MANIFEST, Manifest, ShardInfo
from datamodules.shards.samples import picture_members
from datamodules.shards.writer import write_shard
from experiments.cli.command import run_command
from experiments.preparation.pair_inputs import TABLES, table_rows
from experiments.preparation.pictures import Found, Single, of_pairs, of_table
from experiments.prepare_pairs import columns_of
from experiments.prepare_pickapic import CAPTIONS, positive
from lightning_modules.errors import ConfigError, DataError
from lightning_modules.files import atomic_file, clear_unfinished, resolved_path
from lightning_modules.folder_lock import locked_folder
from lightning_modules.progress import Work
from lightning_modules.terminal import literal

SIDES = {"liked": True, "unliked": False}
Source = Callable[[Found], Iterator[tuple[Single, bool]]]
Numbered = tuple[int, Mapping[str, bytes]]
OURS = re.compile(r"\d{5}\.tar|manifest\.json|\..*-unfinished-.*")  # what a preparation leaves in either folder


def main(argv: Sequence[str] | None = None) -> dict[str, Manifest]:
    """Prepare both folders as the command line says and return their manifests.

    Raises:
        UserError: something that the user can mend; the command line shows it as one line.
    """
    args = _parser().parse_args(argv)
    columns = columns_of(args.columns)
    source, identity = _source(args.input, columns)
    job = {"input": identity, "mixed": args.mixed, "shard_size": args.shard_size, "columns": columns}
    with locked_folder(args.output, "wait for it, or choose another --output"):
        manifests = _done(args.output, job) or _prepare(source, args.output, job, args.input)
    _tell(manifests, args.output)
    return manifests


def _source(place: str, columns: Mapping[str, str]) -> tuple[Source, str]:
    """How to read the input, and what tells it from another."""
    path = resolved_path(place)
    if path.suffix.lower() in TABLES and path.is_file():
        digest = hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()
        return lambda found: of_table(path, table_rows(path), columns, found), digest
    if columns:
        raise ConfigError(f"--columns is for tables, and {place} is none; leave it out")
    shards = open_shards(place)
    if shards.kind != "pixels":
        said = {"pictures": "single pictures already: train on them", "latents": "latents; give the pairs as pictures"}
        raise DataError(f"--input {place} holds {said.get(shards.kind, 'pairs of denoising steps, not pictures')}")
    return lambda found: of_pairs(shards, found), shards.fingerprint()


def _done(folder: Path, job: Mapping[str, Any]) -> dict[str, Manifest]:
    """What an earlier run of the same command has finished.

    Raises:
        ConfigError: the folder holds something else.
    """
    written = {side: folder / side / MANIFEST for side in SIDES}
    if all(path.exists() for path in written.values()):
        manifests = {side: Manifest.read(path) for side, path in written.items()}
        if any(manifest.settings != job for manifest in manifests.values()):
            raise ConfigError(
                f"{folder} was prepared from another input or with other settings; choose another --output, or delete "
                "the folder to prepare it anew"
            )
        return manifests
    inside = [entry for side in SIDES for entry in (folder / side).glob("*") if not OURS.fullmatch(entry.name)]
    strange = inside + [entry for entry in folder.iterdir() if entry.name not in (*SIDES, CAPTIONS, ".lock")]
    if strange:
        raise ConfigError(f"--output {folder} holds {strange[0].name} and no preparation; choose another folder")
    return {}


def _prepare(source: Source, folder: Path, job: Mapping[str, Any], place: str) -> dict[str, Manifest]:
    found = Found()
    with Work("reading pictures", None) as work:
        for single, liked in source(found):
            found.vote(single, liked)
            work.advance()
    labels = found.labels(job["mixed"])
    for side, wanted in SIDES.items():
        if wanted not in labels.values():
            raise DataError(f"--input {place} holds no {side} pictures, and KTO wants liked and unliked ones")
    captions: dict[str, None] = {}
    manifests = {}
    for side, wanted in SIDES.items():
        wants = {key for key, liked in labels.items() if liked == wanted}
        shards = _write(folder / side, _samples(source, wants, wanted, captions), len(wants), job["shard_size"])
        counts = {"pictures": len(wants), **found.counts}
        manifests[side] = Manifest("pictures", shards, counts, dict(job), corrupt=tuple(found.damaged))
    with atomic_file(folder / CAPTIONS) as file:
        file.write(json.dumps([text for text in captions if is_prompt(text)], ensure_ascii=False, indent=0).encode())
    for side, manifest in manifests.items():
        manifest.write(folder / side)
    return manifests


def _write(folder: Path, samples: Iterator[Numbered], total: int, shard_size: int) -> tuple[ShardInfo, ...]:
    """Shards in place of those of a preparation that did not end."""
    folder.mkdir(exist_ok=True)
    clear_unfinished(folder)
    for left in [folder / MANIFEST, *folder.glob("*.tar")]:
        left.unlink(missing_ok=True)
    shards: list[ShardInfo] = []
    with Work(f"writing {folder.name} pictures", total) as work:
        for first in samples:
            members = chain([first], islice(samples, shard_size - 1))
            shards.append(write_shard(folder / f"{len(shards):05d}.tar", members))
            work.advance(shards[-1].samples)
    return tuple(shards)


def _samples(source: Source, wanted: set[bytes], liked: bool, captions: dict[str, None]) -> Iterator[Numbered]:
    """Each of the wanted pictures once, where it comes first; their prompts go into ``captions``."""
    left = set(wanted)
    for single, _ in source(Found()):
        if single.key in left:
            left.remove(single.key)
            captions[single.prompt] = None
            info = {"caption": single.prompt, "liked": liked}
            yield len(wanted) - len(left) - 1, picture_members(single.picture, info)


def _tell(manifests: Mapping[str, Manifest], folder: Path) -> None:
    console = Console()
    counts = manifests["liked"].counts
    sizes = ", ".join(f"{manifest.counts['pictures']} {side}" for side, manifest in manifests.items())
    console.print(literal(f"{folder}: {sizes} pictures"))
    said = {"ties_dropped": "ties left out", "damaged_dropped": "damaged ones left out",
            "mixed": f"were liked here and not there: {manifests['liked'].settings['mixed']}"}  # fmt: skip
    for name, words in said.items():
        if counts.get(name):
            console.print(literal(f"{counts[name]} {words}"))
    for name in manifests["liked"].corrupt:
        console.print(literal(f"damaged: {name}"))


def _parser() -> argparse.ArgumentParser:
    description, _, details = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        prog="python -m experiments.prepare_pictures",
        description=description,
        epilog=details,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--input", required=True, metavar="IN", help="shards of pairs, or a table, see below")
    add("--output", type=resolved_path, required=True, metavar="DIR", help="folder for both; made where needed")
    add("--columns", metavar="ROLE=NAME,...", help="the table's names of image, liked and prompt")
    add("--mixed", choices=("liked", "unliked", "drop"), default="liked", help="see above (liked)")
    add("--shard-size", type=positive, default=1000, metavar="N", help="most pictures in a shard (1000)")
    return parser


if __name__ == "__main__":
    run_command(main)
