"""Draws pictures by several policies from the same prompts and noise, and scores them, as a protocol says.

    python -m experiments.evaluate --policy DPO=runs/dpo_tiny --baseline base=embedded/shapes --protocol shapes \\
        --output runs/evaluation

What is drawn and scored is written as JSON, CSV, Markdown, and as a page that needs no other file.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from experiments.cli.command import run_command
from experiments.cli.packaged import packaged
from experiments.evaluation.export_layouts import KINDS, planned
from experiments.evaluation.protocols import read_protocol, with_prompts
from lightning_modules.files import resolved_path
from lightning_modules.folder_lock import locked_folder
from lightning_modules.progress import Work
from lightning_modules.terminal import literal

FILE_WIDTH = 110  # characters per line where the output is not a terminal

if TYPE_CHECKING:
    from experiments.evaluation.job import Job
    from experiments.evaluation.results import Evaluation

DETAILS = """\
A policy is a run's folder (its newest checkpoint; or name one, or an export), a folder or hub id of a diffusers
pipeline, a UNet's folder, LoRA weights, or a single .safetensors file. What is no whole model stands on the base of the
run that it was exported by, or on --base. Policies of one NAME are runs of one method; --policy and --baseline may
be given several times.

The same command again goes on where it was stopped; what it writes is the same to the last byte. --workers shares the
work out to processes, by default one per GPU; it changes no score.
"""


def main(argv: Sequence[str] | None = None) -> Evaluation:
    """Draw, score, and write ``evaluation.json`` and what people read.

    Raises:
        UserError: something that the user can mend; what is finished is kept.
    """
    options = _parser().parse_args(argv)
    protocol = read_protocol(options.protocol)
    if options.guidance:
        protocol = replace(protocol, guidance=tuple(options.guidance))
    texts = with_prompts(protocol, options.prompts, Work.write)[: options.limit]
    for kind in options.export:
        planned(kind, texts, protocol.pictures_per_prompt, options.export_prompts)  # what does not agree is told now
    from experiments.evaluation.begin import make_job  # torch and diffusers are loaded from here on
    from experiments.evaluation.protocols import check

    check(protocol)
    folder = options.output
    job = make_job(folder, protocol, texts, options.policy, options.baseline, options.base)
    for note in (note for entry in job.entries for note in entry.source.notes()):
        Work.write(note)
    with locked_folder(folder, "wait for it, or name another --output"):
        evaluation = _evaluated(job, options.workers)
        _tell(evaluation, folder)
        for kind in options.export:
            _export(kind, evaluation, folder, options.export_prompts)
    return evaluation


def _evaluated(job: Job, workers: int | None) -> Evaluation:
    from experiments.evaluation.begin import begin
    from experiments.evaluation.results import Evaluation

    described = begin(job, partial(_described, job))
    _perform_all(job, workers)
    evaluation = Evaluation({**job.protocol.settings(job.texts), "rewards": described}, list(job.texts), job.results())
    evaluation.write(job.folder)
    return evaluation


def _tell(evaluation: Evaluation, folder: Path) -> None:
    """The tables, and a page of everything."""
    from experiments.evaluation.page import write_page
    from experiments.evaluation.tables import CAPTION, tables

    console = Console(width=None if sys.stdout.isatty() else FILE_WIDTH)
    for table in tables(evaluation):
        console.print(table.for_terminal())
    console.print(CAPTION, style="dim")
    console.print(literal(f"page: {write_page(evaluation, folder)}"), soft_wrap=True)


def _export(kind: str, evaluation: Evaluation, folder: Path, prompts: Sequence[Path]) -> None:
    from experiments.evaluation.exports import export

    output = folder / "export" / kind
    if not output.exists():  # else it was written whole by an earlier start
        export(kind, evaluation, folder, output, prompts)
    Console().print(literal(f"for {kind}: {output}"), soft_wrap=True)


def _described(job: Job) -> list[dict[str, object]]:
    """Loads the judges, so that one that is missing is told before anything is drawn."""
    from experiments.evaluation.job import rewards_of

    return [reward.described() for reward in rewards_of(job)]


def _perform_all(job: Job, workers: int | None) -> None:
    from experiments.cli.workers import in_parallel
    from experiments.evaluation.job import forget, missing, perform

    todo = list(missing(job))
    pictures = job.pictures * len(job.entries) * len(job.protocol.guidance)
    done = pictures - sum(map(job.size, todo))
    processes = min(_gpus() if workers is None else workers, len(todo))
    with Work("drawing and scoring picture", pictures, done=done, first_line=True, keep=True) as work:
        if processes <= 1:
            for unit in todo:
                perform(unit, job)
                work.advance(job.size(unit), partial(str, unit.entry.label))
            return
        forget()  # each process has its own, one of them on the same device
        kept = f"finished pictures and scores stay in {job.folder}"
        preload = ("experiments.evaluation.job", "callbacks.evaluation.scores", "lightning_modules.policies.sdxl")
        for unit, _ in in_parallel(partial(perform, job=job), todo, processes, preload, kept):
            work.advance(job.size(unit), partial(str, unit.entry.label))


def _gpus() -> int:
    import torch

    return max(1, torch.cuda.device_count())


def _parser() -> argparse.ArgumentParser:
    description, _, example = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        prog="python -m experiments.evaluate",
        description=description,
        epilog=f"{example}\n{DETAILS}\nPackaged protocols: {', '.join(packaged('protocols'))}.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--policy", action="append", required=True, metavar="[NAME=]POLICY", help="see below; several are compared")
    add("--baseline", action="append", default=[], metavar="[NAME=]POLICY", help="what policies are compared with")
    add("--protocol", required=True, metavar="NAME|FILE", help="one of those below, or a file of yours")
    add("--output", type=resolved_path, required=True, metavar="DIR", help="folder for pictures, scores and page")
    add("--prompts", metavar="FILE", help="the protocol's prompts, where they don't ship")
    add("--guidance", type=_scale, nargs="+", metavar="W", help="instead of the protocol's; several make a sweep")
    add("--base", metavar="MODEL", help="pipeline or run below a UNet, LoRA weights or a single file")
    add("--export", action="append", default=[], choices=KINDS, help="also lay the pictures out for an evaluator")
    add("--export-prompts", type=Path, nargs="+", default=[], metavar="FILE", help="that evaluator's own prompt files")
    add("--limit", type=_positive, metavar="N", help="the first N prompts alone, to try it")
    add("--workers", type=_positive, metavar="N", help="processes (one per GPU)")
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not at least 1")
    return value


def _scale(text: str) -> float:
    value = float(text)
    if not (math.isfinite(value) and value >= 1):
        raise argparse.ArgumentTypeError(f"{text} is no guidance: a number from 1, which means none")
    return value


if __name__ == "__main__":
    run_command(main)
