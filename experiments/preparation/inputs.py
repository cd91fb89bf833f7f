"""The parquet files that a command line names: files, patterns, folders of published splits, hub ids."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePath

from lightning_modules.errors import DataError
from lightning_modules.files import resolved_path

# The words by which published splits are named, as Hugging Face's datasets knows them; the first of a row is its name.
SPLIT_WORDS = (
    ("train", "training"),
    ("validation", "valid", "val", "dev"),
    ("test", "testing", "eval", "evaluation"),
)
_NAMES = {word: words[0] for words in SPLIT_WORDS for word in words}
_WORD = re.compile(
    rf"(?<![A-Za-z0-9])({'|'.join(sorted(_NAMES, key=len, reverse=True))})(_unique)?(?![A-Za-z])", re.IGNORECASE
)
_SHARD = re.compile(r"(?:.*-)?(\w+)-\d+-of-\d+.*")  # NAME-00000-of-00645-HASH


def find_inputs(inputs: Sequence[str], split: str) -> list[Path]:
    """The parquet files that the command line names, in a fixed order.

    Args:
        inputs: files and patterns, which are taken as they are; folders and hub ids, of which the split is taken.
        split: "train", "validation", "test" or a name of the data set's own, such as "validation_unique".

    Raises:
        DataError: nothing there, or a folder without the split.
    """
    files: list[Path] = []
    for name in inputs:
        path = resolved_path(name)
        if path.is_dir():
            files += _of_folder(path, split)
        elif path.exists():
            files.append(path)
        elif glob.has_magic(name):
            found = sorted(glob.glob(str(path)))  # noqa: PTH207  # Path.glob takes no absolute pattern
            if not found:
                raise DataError(f"--input {name!r} matches no file; check the pattern")
            files += map(Path, found)
        elif re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not name.endswith(".parquet"):
            files += _of_hub(name, split)
        else:
            raise DataError(f"--input {name!r} does not exist; give parquet files, their folder or a hub id")
    return files


def split_name(file: PurePath) -> str | None:
    """The split that a file's path below its data set's folder names, or None.

    The file's own name counts before its folders', and an inner folder's before an outer one's:
    ``train-00000-of-00645.parquet``, ``train_0.parquet``, ``default/validation_unique/0000.parquet``.
    """
    shard = _SHARD.fullmatch(file.stem)
    if shard:
        return _NAMES.get(shard.group(1).lower(), shard.group(1))
    for part in (file.stem, *reversed(file.parent.parts)):
        words = list(_WORD.finditer(part))
        if words:
            return _NAMES[words[-1].group(1).lower()] + (words[-1].group(2) or "").lower()
    return None


def of_split(files: Sequence[PurePath], split: str, place: str) -> list[PurePath]:
    """Those of a data set's files that belong to a split; all of them if none names any.

    Args:
        files: paths below the data set's folder.
        split: the wanted split.
        place: the data set, for the message.

    Raises:
        DataError: the files name other splits, or only some of them name one.
    """
    wanted = _NAMES.get(split.lower(), split)
    splits = {file: split_name(file) for file in files}
    names = sorted({name for name in splits.values() if name is not None})
    if not names:
        if wanted != "train":
            raise DataError(f"{place} holds no split {split!r}: none of its files names one; name the files themselves")
        return list(files)
    if wanted not in names:
        raise DataError(f"{place} holds no split {split!r}, only {', '.join(names)}; choose one with --split")
    unnamed = [file for file, name in splits.items() if name is None]
    if unnamed:
        raise DataError(
            f"{place} holds {len(unnamed)} files of no split, such as {unnamed[0]}, beside those of "
            f"{', '.join(names)}; name the files themselves, as in --input 'FOLDER/*.parquet'"
        )
    return [file for file, name in splits.items() if name == wanted]


def _of_folder(folder: Path, split: str) -> list[Path]:
    found = sorted(path.relative_to(folder) for path in _below(folder) if path.suffix == ".parquet")
    if not found:
        raise DataError(f"{folder} holds no parquet files; check the path or download the data again")
    return [folder / file for file in of_split(found, split, str(folder))]


def _below(folder: Path) -> Iterator[Path]:
    """All files below a folder. Links to folders are followed, each folder once."""
    seen: set[tuple[int, int]] = set()
    for place, folders, files in os.walk(folder, followlinks=True):
        status = Path(place).stat()
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders.sort()
        yield from (Path(place, file) for file in files)


def _of_hub(repository: str, split: str) -> list[Path]:
    """A hub data set's parquet files of one split, in the hub's own cache."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        names = HfApi().list_repo_files(repository, repo_type="dataset")
        found = [PurePath(name) for name in sorted(names) if name.endswith(".parquet")]
        if not found:
            raise DataError(f"the data set {repository} holds no parquet files; give another hub id or a folder")
        files = of_split(found, split, repository)
        patterns = [glob.escape(str(file)) for file in files]
        folder = Path(snapshot_download(repository, repo_type="dataset", allow_patterns=patterns))
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise DataError(
            f"--input {repository!r} is no file or folder here, and as a hub id it cannot be downloaded "
            f"({' '.join(str(error).split())[:160]}); check the name and the network, or give a folder of parquet files"
        ) from error
    return [folder / file for file in files]
