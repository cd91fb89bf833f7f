"""Prompt files of the published sets, made from what their authors publish and checked by their hash.

    python -m experiments.prepare_prompts pickapic_validation --input yuvalkirstain/pickapic_v1
    python -m experiments.prepare_prompts pickapic_test --input 'downloads/test_unique-*.parquet'
    python -m experiments.prepare_prompts spo_4k --input downloads/4k_training_prompts.json
    python -m experiments.prepare_prompts hpdv2 --input anime.json concept-art.json paintings.json photo.json

Pick-a-Pic's held-out prompts are the captions of its splits validation_unique and test_unique, each once, out of its
parquet files (of a folder or hub id the split is taken) or of a prompt file. The other sets are prompt files, joined in
the order in which they are given: text, JSON, JSON lines, TSV, or a folder of one text file per prompt.

Prompts stay as they stand. One that holds a line separator is never split: a text file is then refused, and --output
with a name that ends in .json holds it. What was read and left out is counted, and the hash says whether it is the
published set.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console

from datamodules.prompt_sets import PUBLISHED, difference, told
from datamodules.prompts import is_prompt, load_prompts, write_prompts
from experiments.cli.command import run_command
from lightning_modules.errors import ConfigError, DataError
from lightning_modules.files import resolved_path
from lightning_modules.progress import Work
from lightning_modules.terminal import literal

SPLITS = {"pickapic_validation": "validation_unique", "pickapic_test": "test_unique"}
PROMPT_FILES = (".txt", ".json", ".jsonl", ".tsv")


def main(argv: Sequence[str] | None = None) -> list[str]:
    """Read, check, write and tell; returns the prompts.

    Raises:
        UserError: an input without prompts, a prompt that the file cannot hold, a file that holds others.
    """
    options = _parser().parse_args(argv)
    name, console = options.set, Console()
    output = options.output or Path("data", "prompts", f"{name}{'.txt' if name in SPLITS else '.json'}")
    if name in SPLITS:
        prompts = _held_out(options.input, SPLITS[name], console)
    else:
        prompts = [prompt for given in options.input for prompt in load_prompts(resolved_path(given))]
    if output.exists() and load_prompts(output) != prompts:
        raise ConfigError(f"{output} holds other prompts; choose another --output, or delete it to make it anew")
    write_prompts(output, prompts)
    console.print(literal(f"{output}: {told(prompts)}"), soft_wrap=True)
    apart = difference(prompts, PUBLISHED[name])
    if apart is not None:
        console.print(literal(f"not the published set: {apart}"), soft_wrap=True)
    return prompts


def _held_out(inputs: Sequence[str], split: str, console: Console) -> list[str]:
    """The different captions of the inputs in their order; what was left out is printed."""
    read = [caption for given in inputs for caption in _captions(given, split)]
    usable = [caption for caption in read if caption is not None and is_prompt(caption)]
    prompts = list(dict.fromkeys(usable))
    if not prompts:
        raise DataError(f"no prompts in {', '.join(inputs)} ({len(read)} rows); check --input")
    left = f"{len(read) - len(usable):,} without a caption, {len(usable) - len(prompts):,} repeated"
    console.print(literal(f"{len(read):,} rows read; left out: {left}"), soft_wrap=True)
    return prompts


def _captions(given: str, split: str) -> Iterator[str | None]:
    """Of a prompt file, or of the rows of a split's parquet files."""
    if Path(given).suffix.lower() in PROMPT_FILES:
        yield from load_prompts(resolved_path(given))
        return
    from experiments.preparation.columns import check_columns  # pyarrow, which no --help should wait for
    from experiments.preparation.inputs import find_inputs
    from experiments.preparation.pickapic_rows import open_parquet

    for path in find_inputs([given], split):
        with open_parquet(path) as file:
            check_columns(path, file.schema_arrow, {"caption": "text"}, ("caption",))
            with Work(f"rows of {path.name}", file.metadata.num_rows) as work:
                for batch in file.iter_batches(columns=["caption"]):
                    yield from batch.column(0).to_pylist()
                    work.advance(batch.num_rows)


def _parser() -> argparse.ArgumentParser:
    description, _, details = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        prog="python -m experiments.prepare_prompts",
        description=description,
        epilog=details,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("set", choices=PUBLISHED, metavar="SET", help=f"which set: {', '.join(PUBLISHED)}")
    add("--input", nargs="+", required=True, metavar="IN", help="prompt files; for Pick-a-Pic parquet or a hub id, too")
    add(
        "--output",
        type=resolved_path,
        metavar="FILE",
        help=".txt or .json (data/prompts/SET.txt for Pick-a-Pic, else .json)",
    )
    return parser


if __name__ == "__main__":
    run_command(main)
