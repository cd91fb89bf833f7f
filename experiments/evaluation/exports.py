"""An evaluation's pictures in the folders that other evaluators read: GenEval, T2I-CompBench, DPG-Bench, HPSv2.

Every policy gets a folder of its own in such a layout, to hand to the evaluator. The benchmarks' own files, which say
what belongs to a prompt, are the user's; nothing is written where they and the evaluation don't agree.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from experiments.evaluation.export_layouts import Target, planned
from experiments.evaluation.results import Drawn, Evaluation
from lightning_modules.errors import DataError
from lightning_modules.files import atomic_folder
from lightning_modules.progress import Work


def export(
    kind: str, evaluation: Evaluation, folder: Path, output: Path, prompt_files: Sequence[Path] = ()
) -> list[Path]:
    """Write every policy's pictures as an evaluator reads them; all of it, or nothing.

    Args:
        kind: "geneval", "t2i_compbench", "dpg" or "hpsv2".
        evaluation: what was drawn.
        folder: where its pictures lie.
        output: a new or empty folder; each policy's pictures come into a folder of it.
        prompt_files: the benchmark's own. geneval: its ``evaluation_metadata.jsonl``. t2i_compbench: the text file of
            every category, in the evaluation's order; none means one category. dpg: the folder of prompt files.
            hpsv2: the JSON list of every style, in the evaluation's order. A folder stands for its files by name.

    Returns:
        The policies' folders, in the evaluation's order: what the evaluator wants to be given.

    Raises:
        ConfigError: another kind; a number of pictures per prompt that the evaluator does not read; files missing.
        DataError: prompts and files that don't agree, a prompt that can be no file's name, a picture that is missing,
            an output that is not empty.
    """
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise DataError(f"{output} is there already; name a new or empty folder to export to")
    targets = planned(kind, evaluation.prompts, _pictures(evaluation), prompt_files)
    names = [_inside(drawn.folder) for drawn in evaluation.drawn]
    with atomic_folder(output) as new, Work(f"export ({kind})", len(names) * len(targets)) as work:
        for drawn, name in zip(evaluation.drawn, names):
            for target in targets:
                _write(target, folder, drawn, new / name / target.path)
                work.advance()
    return [output / name for name in names]


def _pictures(evaluation: Evaluation) -> int:
    counts = {len(prompt) for drawn in evaluation.drawn for column in drawn.scores.values() for prompt in column}
    if len(counts) != 1:
        raise DataError("the evaluation's policies have different numbers of pictures; they can't be exported together")
    return counts.pop()


def _inside(folder: str) -> Path:
    """A policy's folder, if it leads nowhere else: the file that names it may have been written by anybody."""
    path = Path(folder)
    if path.is_absolute() or ".." in path.parts or not path.parts:
        raise DataError(f"the evaluation says that pictures lie in {folder!r}, outside of it; it is damaged")
    return path


def _write(target: Target, folder: Path, drawn: Drawn, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    sources = [folder / drawn.picture(target.prompt, picture) for picture in target.pictures]
    try:
        if not sources:
            path.write_text(target.text, encoding="utf-8")
        elif len(sources) > 1:
            _grid(sources).save(path)
        elif path.suffix == ".jpg":  # JPEG as close to the picture as it gets: no colour is halved, scores see it
            with Image.open(sources[0]) as picture:
                picture.convert("RGB").save(path, quality=100, subsampling=0)
        else:
            shutil.copyfile(sources[0], path)
    except (FileNotFoundError, UnidentifiedImageError) as error:
        told = f"{error.filename} is missing" if isinstance(error, FileNotFoundError) else str(error)
        raise DataError(f"{told}; delete what is damaged and evaluate again: what is missing is drawn") from error


def _grid(sources: Sequence[Path]) -> Image.Image:
    """Four pictures of one size, read from left to right, then from top to bottom."""
    pictures = []
    for source in sources:
        with Image.open(source) as picture:
            pictures.append(picture.convert("RGB"))
    width, height = pictures[0].size
    grid = Image.new("RGB", (2 * width, 2 * height))
    for number, picture in enumerate(pictures):
        grid.paste(picture, (number % 2 * width, number // 2 * height))
    return grid
