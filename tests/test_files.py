"""Files and folders appear complete or not at all, and there is one way to write them."""

import os
import re
import signal
from pathlib import Path

import pytest

from lightning_modules.errors import DataError
from lightning_modules.files import atomic_file, atomic_folder, clear_unfinished, packaged

ROOT = Path(__file__).parents[1]


def entries(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_appears_when_its_block_ends(tmp_path):
    with atomic_file(tmp_path / "new" / "x") as file:
        file.write(b"content")
        assert [name for name in entries(tmp_path / "new") if not re.fullmatch(r"\.x-unfinished-\w+", name)] == []
    assert (tmp_path / "new" / "x").read_bytes() == b"content"
    assert entries(tmp_path / "new") == ["x"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, RuntimeError])
def test_a_block_that_fails_leaves_what_was_there(tmp_path, error):
    (tmp_path / "x").write_bytes(b"former")

    def write_half():
        with atomic_file(tmp_path / "x") as file:
            file.write(b"half")
            raise error

    with pytest.raises(error):
        write_half()
    assert (tmp_path / "x").read_bytes() == b"former"
    assert entries(tmp_path) == ["x"]


def test_a_new_folder_appears_at_once_and_an_existing_one_keeps_its_other_entries(tmp_path):
    folder = tmp_path / "out"
    with atomic_folder(folder) as new:
        (new / "unet").mkdir()
        (new / "unet" / "a").write_text("1")
        (new / "unet" / "b").write_text("1")
        (new / "file").write_text("1")
        assert not folder.exists()
    assert entries(folder) == ["file", "unet"]
    (folder / "mine").write_text("mine")
    with atomic_folder(folder) as new:
        (new / "unet").mkdir()
        (new / "unet" / "a").write_text("2")
        (new / "file").write_text("2")
    assert entries(folder) == ["file", "mine", "unet"]
    assert entries(folder / "unet") == ["a"]
    assert (folder / "unet" / "a").read_text() == (folder / "file").read_text() == "2"
    assert entries(tmp_path) == ["out"]


def test_a_folder_whose_block_fails_leaves_what_was_there(tmp_path):
    def write_half():
        with atomic_folder(tmp_path / "out") as new:
            (new / "x").write_text("half")
            raise ValueError("half")

    with pytest.raises(ValueError, match="half"):
        write_half()
    assert entries(tmp_path) == []


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    message = "cannot write .*file/out: .*; choose another folder"
    with pytest.raises(DataError, match=message), atomic_folder(tmp_path / "file" / "out"):
        pass


def test_what_a_killed_writer_left_is_cleared_by_the_next_whatever_its_number(tmp_path):
    child = os.fork()
    if child == 0:
        with atomic_folder(tmp_path / "step=0001"):
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    (tmp_path / ".other-unfinished-1").touch()
    assert len(entries(tmp_path)) == 2
    with atomic_folder(tmp_path / "step=0002"):
        pass
    assert entries(tmp_path) == [".other-unfinished-1", "step=0002"]
    clear_unfinished(tmp_path)
    assert entries(tmp_path) == ["step=0002"]


def test_the_name_of_a_file_is_on_the_disk_too(tmp_path, monkeypatch):
    """After a rename the folder is flushed, without which a loss of power takes the name back."""
    calls = []
    fsync, replace = os.fsync, Path.replace

    def flushed(descriptor):
        calls.append("folder" if Path(f"/proc/self/fd/{descriptor}").resolve() == tmp_path.resolve() else "file")
        fsync(descriptor)

    def renamed(self, target):
        calls.append("rename")
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(Path, "replace", renamed)
    with atomic_file(tmp_path / "x") as file:
        file.write(b"1")
    assert calls == ["file", "rename", "folder"]


def test_a_name_is_looked_for_from_the_working_folder_first_then_in_the_package(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = "embedded/prompts/shapes_test.txt"
    assert packaged(name) == ROOT / "experiments" / name
    (tmp_path / "embedded" / "prompts").mkdir(parents=True)
    (tmp_path / name).touch()
    assert packaged(name) == Path(name)
    assert packaged("nowhere/at/all") == Path("nowhere/at/all")


def test_nothing_else_writes_atomically():
    """One habit: no other rename, flush, temporary name or clean-up of one in the packages."""
    words = [r"os\.(replace|rename|fsync)\b", r"\.rename\(", "mkdtemp", "NamedTemporary", r"\.(tmp|part|new)\""]
    habit = re.compile("|".join([*words, r"\.replace\(\w+\)"]))
    # The page's record is appended to, choice by choice, and never renamed.
    exempt = (ROOT / "lightning_modules" / "files.py", ROOT / "experiments" / "labelling" / "choices.py")
    found = [
        f"{file.relative_to(ROOT)}:{number}: {line.strip()}"
        for package in ("lightning_modules", "datamodules", "callbacks", "experiments")
        for file in sorted((ROOT / package).rglob("*.py"))
        for number, line in enumerate(file.read_text().splitlines(), start=1)
        if habit.search(line) and file not in exempt
    ]
    assert found == []
