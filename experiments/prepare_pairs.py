"""Your own preference pairs -> shards that ``PreferencePairsDataModule`` reads.

    python -m experiments.prepare_pairs --input choices.csv --output data/pairs
    python -m experiments.prepare_pairs --input pairs.jsonl --columns chosen=good,rejected=bad --output data/pairs
    python -m experiments.prepare_pairs --input data/choices/choices.jsonl --output data/pairs

Input is a .csv, .json or .jsonl table with the columns chosen, rejected and prompt, or image_0, image_1, choice (0, 1
or tie) and prompt; the choices.jsonl of ``experiments.label``, of which each person's last choice per pair counts and
skipped pairs do not; or a folder with chosen/NAME.png, rejected/NAME.png and the prompt in NAME.txt beside either.
Paths count from the table's folder. Parquet files in Pick-a-Pic's form: ``experiments.prepare_pickapic``.

The pictures' bytes pass through untouched, and go through the same checks and counts as Pick-a-Pic's: what several
people chose alike is one pair, and counted as a duplicate.
"""

from __future__ import annotations

import argparse
import hashlib
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console

from datamodules.shards.manifest import Manifest
from experiments import prepare_pickapic
from experiments.cli.command import run_command
from experiments.preparation.pair_tables import FilePair, read_file_pairs
from experiments.preparation.pickapic_schema import SCHEMA
from lightning_modules.errors import ConfigError, DataError
from lightning_modules.files import resolved_path

BLOCK = 64  # pairs whose pictures are in memory at once


def main(argv: Sequence[str] | None = None) -> Manifest:
    """Prepare shards as the command line says and return their manifest.

    Raises:
        UserError: something that the user can mend; the command line shows it as one line.
    """
    args = _parser().parse_args(argv)
    place = args.input
    pairs = read_file_pairs(place, _columns(args.columns))
    Console().print(f"{len(pairs)} pairs in {args.input}", markup=False, highlight=False, soft_wrap=True)
    words = ["--output", str(args.output), "--shard-size", str(args.shard_size)]
    words += ["--workers", str(args.workers), *(["--keep-ties"] if args.keep_ties else [])]
    for name in ("encode_with", "resolution", "dtype"):
        if getattr(args, name) is not None:
            words += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
    with tempfile.TemporaryDirectory(prefix="pairs-") as folder:
        file = Path(folder) / place.name  # by which damaged rows are named
        digest = hashlib.blake2b(digest_size=16)
        with pq.ParquetWriter(file, SCHEMA, compression="none") as writer:
            for first in range(0, len(pairs), BLOCK):
                rows = list(_rows(pairs[first : first + BLOCK]))
                digest.update(repr(rows).encode())
                writer.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), row_group_size=BLOCK)
            # The footer stands for the file when a preparation is resumed: it has to change with any picture.
            writer.add_key_value_metadata({"pairs": digest.hexdigest()})
        return prepare_pickapic.main(["--input", str(file), *words])


def _rows(pairs: Sequence[FilePair]) -> Iterator[dict[str, object]]:
    """In Pick-a-Pic's form."""
    for pair in pairs:
        try:
            first, second = pair.first.read_bytes(), pair.second.read_bytes()
        except OSError as error:
            raise DataError(f"cannot read {error.filename}: {error.strerror}") from error
        row = dict.fromkeys(SCHEMA.names)
        row |= {"jpg_0": first, "jpg_1": second, "caption": pair.prompt, "has_label": True}
        yield row | {"label_0": pair.label, "label_1": 1.0 - pair.label}


def _columns(text: str | None) -> dict[str, str]:
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
    add("--input", type=resolved_path, required=True, metavar="IN", help="table, choices.jsonl, or folder of pictures")
    add(
        "--output",
        type=resolved_path,
        required=True,
        metavar="DIR",
        help="folder for the shards; made where needed",
    )
    add("--columns", metavar="ROLE=NAME,...", help="the table's names of chosen, rejected, prompt, ...")
    add("--keep-ties", action="store_true", help="keep ties, label 0.5; only preference-model training can use them")
    add("--shard-size", type=int, default=1000, metavar="N", help="most pairs in a shard (1000)")
    add("--workers", type=int, default=1, metavar="N", help="processes; with --encode-with one per GPU (1)")
    add("--encode-with", metavar="CONFIG", help="store this experiment's latents and embeddings, not pictures")
    add("--resolution", type=int, metavar="PX", help="side of the encoded squares (the policy's own size)")
    add("--dtype", choices=("float16", "float32"), help="number type of stored latents and embeddings (float16)")
    return parser


if __name__ == "__main__":
    run_command(main)
