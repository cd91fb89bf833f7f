"""How commands end: a reader that goes away ends nothing, a disk that fails is one line, threads too."""

import errno
import os
import signal
import subprocess
import sys
import threading

import pytest

from experiments.cli.command import run_command
from lightning_modules.errors import DataError

PRINTS = """
import sys, time
from pathlib import Path
from experiments.cli.command import run_command

def main():
    for n in range(2000):
        print("line", n, flush=True)
        print("line", n, file=sys.stderr, flush=True)
    Path(sys.argv[1]).write_text("done")

run_command(main)
"""


@pytest.fixture
def restored(monkeypatch, handlers):
    """What ``run_command`` replaces comes back."""

    numbers = (signal.SIGHUP, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM)
    before = [signal.getsignal(number) for number in numbers]
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)
    yield
    for number, handler in zip(numbers, before):
        signal.signal(number, handler)


def test_a_reader_that_goes_away_ends_nothing(tmp_path):
    """``python -m experiments.run ... 2>&1 | head -1``"""
    reading, writing = os.pipe()
    process = subprocess.Popen([sys.executable, "-c", PRINTS, tmp_path / "end"], stdout=writing, stderr=writing)
    os.close(writing)
    assert os.read(reading, 4) == b"line"
    os.close(reading)
    assert process.wait(timeout=60) == 0
    assert (tmp_path / "end").read_text() == "done"


def raising(error, context=None):
    def main():
        try:
            if context is not None:
                raise context
        finally:
            raise error

    return main


@pytest.mark.usefixtures("restored")
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EROFS, errno.EDQUOT, errno.EACCES])
def test_a_disk_that_fails_is_one_line(capsys, number):
    with pytest.raises(SystemExit) as end:
        run_command(raising(OSError(number, os.strerror(number), "events")))
    assert end.value.code == 2
    assert capsys.readouterr().err == (f"error: events: {os.strerror(number)}; make room, or write to another folder\n")


@pytest.mark.usefixtures("restored")
def test_the_first_reason_is_told_where_closing_fails_too(capsys):
    with pytest.raises(SystemExit):
        run_command(raising(OSError(errno.ENOSPC, "No space left on device"), DataError("cannot write a checkpoint")))
    assert capsys.readouterr().err == "error: cannot write a checkpoint\n"


@pytest.mark.usefixtures("restored")
def test_a_bug_is_a_traceback():
    with pytest.raises(FileNotFoundError):
        run_command(raising(FileNotFoundError(errno.ENOENT, "No such file", "x"), DataError("other")))
    with pytest.raises(RuntimeError, match="a bug"):
        run_command(raising(RuntimeError("a bug"), DataError("other")))


class Fails(threading.Thread):
    def __init__(self, hands_on):
        super().__init__()
        self.exception, self.hands_on = None, hands_on

    def run(self):
        error = OSError(errno.ENOSPC, "No space left on device")
        if self.hands_on:
            self.exception = error
        raise error


@pytest.mark.usefixtures("restored")
@pytest.mark.parametrize("hands_on", [True, False])
def test_a_thread_that_hands_its_failure_on_tells_nothing(capsys, hands_on):
    def main():
        thread = Fails(hands_on)
        thread.start()
        thread.join()

    run_command(main)
    assert ("Traceback" in capsys.readouterr().err) is not hands_on
