"""Which file of an export holds what, by evaluator; nothing is written here."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from datamodules.prompts import load_prompts
from lightning_modules.errors import ConfigError, DataError

GRID = 4  # pictures of a prompt that DPG-Bench reads out of one, two by two
BLOCK = 10  # pictures of a prompt that T2I-CompBench's 3-in-1 score takes together
NAME_BYTES = 255  # longest file name of common file systems


@dataclass(frozen=True)
class Target:
    """One file: its path in the policy's folder, and the pictures of a prompt that it is made of.

    Attributes:
        path: seen from the policy's folder; its suffix says what it is: a copy (.png), the same as .jpg, or a text.
        prompt: whose pictures.
        pictures: one, or four for two rows of two; none for a text.
        text: content of a text.
    """

    path: str
    prompt: int
    pictures: tuple[int, ...] = ()
    text: str = ""


@dataclass(frozen=True)
class Asked:
    """What an evaluation drew: its prompts, and how many pictures of each."""

    prompts: Sequence[str]
    pictures: int


def geneval(asked: Asked, files: Sequence[Path]) -> list[Target]:
    """``00000/metadata.jsonl``, the prompt's line of the user's file, and ``00000/samples/00000.png``, ..."""
    if len(files) != 1:
        raise ConfigError(f"export geneval wants GenEval's one file, evaluation_metadata.jsonl, got {_named(files)}")
    prompts = load_prompts(files[0])
    _agree(asked, prompts, [files[0]] * len(prompts))
    lines = [line.strip() for line in files[0].read_bytes().decode("utf-8-sig").split("\n") if line.strip()]
    targets = []
    for p, line in enumerate(lines):
        if not isinstance(json.loads(line), dict):
            raise DataError(f"{files[0]}: line {p + 1} is no object; name GenEval's evaluation_metadata.jsonl")
        targets.append(Target(f"{p:05d}/metadata.jsonl", p, text=line + "\n"))
        targets += [Target(f"{p:05d}/samples/{i:05d}.png", p, (i,)) for i in range(asked.pictures)]
    return targets


def t2i_compbench(asked: Asked, files: Sequence[Path]) -> list[Target]:
    """``<category>/samples/<prompt>_<index>.png``, the index over all pictures of the category.

    A category is named as its file, without ``_val``. Without files all is one category, straight in the folder.
    """
    categories = [("", list(asked.prompts))] if not files else []
    categories += [(f"{path.stem.removesuffix('_val')}/", load_prompts(path)) for path in files]
    _agree(asked, *_joined(categories, files))
    targets: list[Target] = []
    for category, prompts in categories:
        if category.startswith("complex") and asked.pictures != BLOCK:
            raise ConfigError(
                f"T2I-CompBench's 3-in-1 score of complex prompts takes blocks of {BLOCK} pictures and the evaluation "
                f"has {asked.pictures} per prompt; evaluate with {BLOCK}, or without that category"
            )
        first = len(targets) // asked.pictures
        for n, prompt in enumerate(prompts):
            for i in range(asked.pictures):
                name = _file_name(f"{prompt}_{n * asked.pictures + i:06d}.png", prompt)
                targets.append(Target(f"{category}samples/{name}", first + n, (i,)))
    return targets


def dpg(asked: Asked, files: Sequence[Path]) -> list[Target]:
    """``<name>.png``, named as the prompt's file: the picture, or four as two rows of two.

    Prompts are found by their texts, whatever their order; of files with one text each takes a prompt, by their names.
    """
    if asked.pictures not in (1, GRID):
        raise ConfigError(f"DPG-Bench reads 1 or {GRID} pictures per prompt and the evaluation has {asked.pictures}")
    names: defaultdict[str, list[str]] = defaultdict(list)
    for path in sorted(files, reverse=True):
        names[_text(path)].append(path.stem)
    targets = []
    for p, prompt in enumerate(asked.prompts):
        found = names[prompt.strip()]
        if not found:
            raise DataError(f"no file among {_named(files)} holds prompt {p}, {prompt!r}; name DPG-Bench's prompts")
        targets.append(Target(f"{found.pop()}.png", p, tuple(range(asked.pictures))))
    left = sorted(name for several in names.values() for name in several)
    if left:
        raise DataError(
            f"{len(left)} prompt files, {left[0]}.txt for one, are no prompt of the evaluation; evaluate all of them"
        )
    return targets


def hpsv2(asked: Asked, files: Sequence[Path]) -> list[Target]:
    """``<style>/00000.jpg``: the style named as its file, the index a prompt's place in it."""
    if not files:
        raise ConfigError("export hpsv2 wants the benchmark's lists, a JSON file per style (anime.json, ...)")
    if asked.pictures != 1:
        raise ConfigError(f"HPSv2's benchmark reads 1 picture per prompt and the evaluation has {asked.pictures}")
    styles = [(path.stem, load_prompts(path)) for path in files]
    _agree(asked, *_joined(styles, files))
    places = [(style, n) for style, prompts in styles for n in range(len(prompts))]
    return [Target(f"{style}/{n:05d}.jpg", p, (0,)) for p, (style, n) in enumerate(places)]


LAYOUTS: dict[str, Callable[[Asked, Sequence[Path]], list[Target]]] = {
    "geneval": geneval,
    "t2i_compbench": t2i_compbench,
    "dpg": dpg,
    "hpsv2": hpsv2,
}


KINDS = tuple(LAYOUTS)


def planned(kind: str, prompts: Sequence[str], pictures: int, prompt_files: Sequence[Path]) -> list[Target]:
    """The files of each policy's folder; can be asked before anything is drawn.

    Args:
        kind: one of ``KINDS``.
        prompts: the evaluation's.
        pictures: of each.
        prompt_files: the benchmark's own, see ``exports.export``; a folder stands for its files by name.

    Raises:
        ConfigError: another kind; a number of pictures that the evaluator does not read; files missing.
        DataError: prompts and files that don't agree, a prompt that can be no file's name.
    """
    if kind not in LAYOUTS:
        raise ConfigError(f"export {kind!r} is not known; one of {', '.join(KINDS)}")
    return LAYOUTS[kind](Asked(prompts, pictures), [file for path in prompt_files for file in _files(path)])


def _files(path: Path) -> list[Path]:
    """The file, or a folder's files in the order of their names."""
    path = path.expanduser()
    files = sorted(one for one in path.iterdir() if one.is_file()) if path.is_dir() else [path]
    if not files:
        raise DataError(f"{path} holds no files; name the benchmark's prompt files")
    return files


def _joined(parts: Sequence[tuple[str, list[str]]], files: Sequence[Path]) -> tuple[list[str], list[Path]]:
    """All parts' prompts, and the file of each; without files the prompts are the evaluation's own."""
    where = files or [Path("the evaluation")]
    if len({name for name, _ in parts}) < len(parts):
        raise ConfigError(f"two of the prompt files have one name: {_named(files)}")
    prompts = [prompt for _, prompts in parts for prompt in prompts]
    return prompts, [path for path, (_, prompts) in zip(where, parts) for _ in prompts]


def _agree(asked: Asked, prompts: Sequence[str], files: Sequence[Path]) -> None:
    """Refuse prompts that are not the evaluation's, one by one."""
    for p, (mine, theirs, file) in enumerate(zip(asked.prompts, prompts, files)):
        if mine != theirs:
            raise DataError(f"prompt {p} of the evaluation is {mine!r} and that of {file} is {theirs!r}; {_REMEDY}")
    if len(asked.prompts) != len(prompts):
        told = ", ".join(sorted({str(file) for file in files}))
        raise DataError(f"the evaluation has {len(asked.prompts)} prompts and {told} {len(prompts)}; {_REMEDY}")


_REMEDY = "name the files that its prompts were read from, in that order"


def _file_name(name: str, prompt: str) -> str:
    """The name, if it can be one and the prompt can be read out of it: it is what stands before the first ``_``."""
    bad = [character for character in "/_\0\n" if character in prompt]
    if bad or len(name.encode()) > NAME_BYTES:
        reason = f"it holds {bad[0]!r}" if bad else f"it has more than {NAME_BYTES} bytes"
        raise DataError(f"T2I-CompBench reads prompts out of file names, and {prompt!r} can be none: {reason}")
    return name


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8-sig").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read prompt file {path}: {error}") from error


def _named(files: Sequence[Path]) -> str:
    """The files for a message, which is one line."""
    shown = ", ".join(map(str, files[:3]))
    return f"{shown}, ... ({len(files)} files)" if len(files) > 3 else shown or "none"
