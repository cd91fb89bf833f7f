"""One process at a time writes to a folder."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_modules.errors import ConfigError, DataError
from lightning_modules.files import resolved_path
from lightning_modules.folder_lock import locked_folder

# Holds the lock in a process that forks another one, as loaders do, until it is killed.
HOLDS = """
import os, sys, time
from pathlib import Path
from lightning_modules.folder_lock import locked_folder
with locked_folder(Path(sys.argv[1]), ""):
    if os.fork() == 0:
        time.sleep(20)
        os._exit(0)
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", HOLDS, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_second_process_is_refused_until_the_first_is_killed(tmp_path, holder):
    message = f"run is being written to by process {holder.pid} on .*; wait for it"
    with pytest.raises(ConfigError, match=message), locked_folder(tmp_path / "run", "wait for it"):
        raise AssertionError("nobody else is here")
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    with locked_folder(tmp_path / "run", "wait for it"):  # though a process that it has forked is alive
        pass


def test_nothing_is_left(tmp_path):
    with locked_folder(tmp_path / "a" / "b", ""):
        pass
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "old").mkdir()
    with locked_folder(tmp_path / "old", ""):
        pass
    with locked_folder(tmp_path / "new", ""):
        (tmp_path / "new" / "file").touch()
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "new", "old"]


def test_where_there_are_no_locks_it_is_told(tmp_path, monkeypatch, caplog):
    def none(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", none)
    with locked_folder(tmp_path, ""):
        pass
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path}: this file system has no locks; see to it that nothing else writes there"
    ]


def test_a_folder_that_cannot_be_written_to(tmp_path):
    (tmp_path / "file").touch()
    message = "cannot write to .*file/run: Not a directory; choose another folder"
    with pytest.raises(DataError, match=message), locked_folder(tmp_path / "file" / "run", ""):
        pass


def test_many_processes_hold_it_one_after_another(tmp_path):
    """Each deletes the file at its end; a process that waited with the deleted one open must not hold that."""
    script = """
import sys, time
from pathlib import Path
from lightning_modules.errors import ConfigError
from lightning_modules.folder_lock import locked_folder
folder, entered = Path(sys.argv[1]), 0
end = time.monotonic() + 1.0
while time.monotonic() < end:
    try:
        with locked_folder(folder, ""):
            (folder / "inside").touch(exist_ok=False)
            (folder / "inside").unlink()
            entered += 1
    except ConfigError:
        pass
print(entered)
"""
    (tmp_path / "run").mkdir()
    command = [sys.executable, "-c", script, str(tmp_path / "run")]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    outputs = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert all(int(output) > 0 for output in outputs)


def test_a_path_is_one(tmp_path, monkeypatch):
    (tmp_path / "elsewhere" / "inner").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere" / "inner")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for spelled in ("~/runs/x", "runs/x", "./runs/y/../x", str(tmp_path / "runs" / "x")):
        assert resolved_path(spelled) == Path("runs/x")
    assert resolved_path("link/../x") == Path("elsewhere/x")
    monkeypatch.chdir(tmp_path / "link")
    assert resolved_path("../x") == tmp_path / "elsewhere" / "x"
    assert resolved_path("x") == Path("x")
