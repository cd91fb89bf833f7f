"""Your own preference pairs -> shards that ``PreferencePairsDataModule`` reads.

    python -m experiments.prepare_pairs --input choices.csv --output data/pairs
    python -m experiments.prepare_pairs --input pairs.jsonl --columns chosen=good,rejected=bad --output data/pairs
    python -m experiments.prepare_pairs --input scored.parquet --pairs all --margin 0.5 --output data/pairs
    python -m experiments.prepare_pairs --input yuvalkirstain/pickapic_v2 --output data/pickapic --workers 16

Input is one of
  - a .csv, .json, .jsonl or .parquet table (a folder of parquet files, a pattern, a hub id) with a prompt and
      chosen, rejected                      the better and the worse picture
      image_0, image_1, choice              0, 1 or tie
      image_0, image_1, score_0, score_1    the higher score is the better one
      images, scores                        lists: the best against the worst, or --pairs all
      image, score                          a row per picture; those of one prompt belong together
    or in Pick-a-Pic's columns. Pictures are paths, which count from the table's folder, or in parquet bytes. Without
    a column for the prompt it is read from NAME.txt or NAME.caption beside a picture.
  - the choices.jsonl of experiments.label: each person's last choice per pair counts, skipped pairs do not
  - a folder with chosen/NAME.png, rejected/NAME.png and the prompt in NAME.txt or NAME.caption beside either
  - a .tar of NAME.chosen.png, NAME.rejected.png and NAME.json with a caption (data.shards reads it as it is, too)

The pictures' bytes pass through untouched, and go through the same checks and counts as Pick-a-Pic's: what several
people chose alike is one pair, and counted as a duplicate.
"""

from __future__ import annotations

import argparse
import hashlib
import tempfile
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from datamodules.shards.manifest import Manifest
from experiments import prepare_pickapic
from experiments.cli.command import run_command
from experiments.preparation.pair_inputs import FORMS, find_tables, is_pickapic, read_pairs
from experiments.preparation.pair_rows import FilePair, FromScores, Picture, refuse_unread
from experiments.preparation.pickapic_rows import REQUIRED
from experiments.preparation.pickapic_schema import SCHEMA
from lightning_modules.errors import ConfigError, DataError

BLOCK = 64  # pairs per row group, and in memory at once
_PICTURE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
_SCHEMA = pa.schema([(name, _PICTURE if name in ("jpg_0", "jpg_1") else SCHEMA.field(name).type) for name in REQUIRED])


def main(argv: Sequence[str] | None = None) -> Manifest:
    """Prepare shards as the command line says and return their manifest.

    Raises:
        UserError: something that the user can mend; the command line shows it as one line.
    """
    args = _parser().parse_args(argv)
    words = ["--output", str(args.output), "--shard-size", str(args.shard_size), "--split", args.split]
    words += ["--workers", str(args.workers), *(["--keep-ties"] if args.keep_ties else [])]
    for name in ("limit", "encode_with", "resolution", "dtype"):
        if getattr(args, name) is not None:
            words += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
    columns, from_scores = columns_of(args.columns), FromScores(args.pairs == "all", args.margin)
    tables = find_tables(args.input, args.split)
    if all(map(is_pickapic, tables)) and not columns:
        refuse_unread(tables[0], columns, from_scores)
        return prepare_pickapic.main(["--input", *map(str, tables), *words])
    pairs = (pair for table in tables for pair in read_pairs(table.resolve(), columns, from_scores))
    with tempfile.TemporaryDirectory(prefix="pairs-") as folder:
        file = Path(folder) / tables[0].name  # by which damaged rows are named
        if not _write_rows(file, pairs):
            raise DataError(f"--input {args.input} holds no pairs; give {FORMS}")
        return prepare_pickapic.main(["--input", str(file), *words])


def _write_rows(file: Path, pairs: Iterator[FilePair]) -> int:
    """Write pairs in Pick-a-Pic's form, files by their path; their number."""
    digest, count = hashlib.blake2b(digest_size=16), 0
    with pq.ParquetWriter(file, _SCHEMA, compression="none", use_dictionary=False, write_statistics=False) as writer:
        while block := list(islice(pairs, BLOCK)):
            rows = [_row(pair) for pair in block]
            for pair, row in zip(block, rows, strict=True):
                digest.update(repr((row, _stamp(pair.first), _stamp(pair.second))).encode())
            writer.write_table(pa.Table.from_pylist(rows, schema=_SCHEMA), row_group_size=BLOCK)
            count += len(block)
        # The footer stands for the file when a preparation is resumed: it has to change with any picture.
        writer.add_key_value_metadata({"pairs": digest.hexdigest()})
    return count


def _row(pair: FilePair) -> dict[str, Any]:
    row: dict[str, Any] = {"caption": pair.prompt, "label_0": pair.label, "label_1": 1.0 - pair.label}
    for column, picture in (("jpg_0", pair.first), ("jpg_1", pair.second)):
        is_file = isinstance(picture, Path)
        row[column] = {"bytes": None if is_file else picture, "path": str(picture) if is_file else None}
    return row


def _stamp(picture: Picture) -> tuple[int, int] | None:
    """What tells a file that has been written again; bytes stand for themselves."""
    if not isinstance(picture, Path):
        return None
    status = picture.stat()
    return status.st_size, status.st_mtime_ns


def columns_of(text: str | None) -> dict[str, str]:
    """``chosen=a,rejected=b`` as a mapping."""
    entries = [entry.partition("=") for entry in text.split(",")] if text else []
    wrong = [role for role, sign, name in entries if not (role and sign and name)]
    if wrong:
        raise ConfigError(f"--columns wants ROLE=COLUMN,..., got {text!r}")
    return {role.strip(): name.strip() for role, _, name in entries}


def _parser() -> argparse.ArgumentParser:
    description, _, details = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        prog="python -m experiments.prepare_pairs",
        description=description,
        epilog=details,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--input", required=True, metavar="IN", help="table, folder of pictures, tar file or hub id, see below")
    add("--columns", metavar="ROLE=NAME,...", help="the table's names of chosen, rejected, prompt, ...")
    add("--split", default="train", help="which files of a folder of parquet files or of a hub id (train)")
    add("--pairs", choices=("best-worst", "all"), default="best-worst", help="of pictures with scores (best-worst)")
    add("--margin", type=float, default=0.0, metavar="M", help="scores closer than that make a tie (0)")
    prepare_pickapic.add_output_options(parser)
    return parser


if __name__ == "__main__":
    run_command(main)
