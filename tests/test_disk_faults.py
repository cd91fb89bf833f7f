"""Every write, rename and fsync of a short run fails once, each in a run of its own: one line, nothing lost."""

from __future__ import annotations

import builtins
import errno
import io
import os
import signal
import threading
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from safetensors import SafetensorError
from tiny_regression import Regression, fit

from callbacks.evaluation.kept import add_entry
from callbacks.resume.checkpoint_files import damage_reason, newest_intact_checkpoint
from callbacks.resume.checkpointing import RunCheckpoint
from callbacks.resume.exact_resume import ExactResume
from callbacks.resume.preemption import Preemption
from experiments.cli.command import run_command
from lightning_modules.files import atomic_folder, remove_folder

KINDS = ("write", "rename", "fsync")
STEPS = 4

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*dataloader is not resumable:UserWarning"),
    pytest.mark.usefixtures("handlers"),
]


class Disk:
    """Counts what is asked of the disk below a folder, and lets one request fail.

    Args:
        kind: of the request that fails: "write", "rename" or "fsync".
        at: its number among those of its kind, from 1 on.
        lasting: whether all of the kind that come after it fail, too.
    """

    def __init__(self, folder: Path, kind: str, at: int, lasting: bool) -> None:
        self.folder, self.kind, self.at, self.lasting = str(folder), kind, at, lasting
        self.asked = dict.fromkeys(KINDS, 0)
        self.lock = threading.Lock()  # TensorBoard writes in a thread

    @property
    def failed(self) -> bool:
        return self.at <= self.asked[self.kind]

    def ask(self, kind: str) -> None:
        with self.lock:
            self.asked[kind] += 1
            number = self.asked[kind]
        fails = kind == self.kind and (number >= self.at if self.lasting else number == self.at)
        if fails:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    @contextmanager
    def watched(self, monkeypatch: pytest.MonkeyPatch):
        disk, opened = self, io.open
        renamed, synced, serialized = os.replace, os.fsync, safetensors.torch.serialize_file

        class File(io.FileIO):
            def write(self, data):
                disk.ask("write")
                return super().write(data)

        def open_watched(file, mode="r", *args, **options):
            if isinstance(file, int) or not set(mode) & set("wax+") or not str(file).startswith(disk.folder):
                return opened(file, mode, *args, **options)
            raw = File(file, mode.replace("t", "").replace("b", ""))
            binary = io.BufferedWriter(raw, buffer_size=1024)  # so that it asks often
            return binary if "b" in mode else io.TextIOWrapper(binary, encoding=options.get("encoding"))

        def rename(source, target):
            disk.ask("rename")
            return renamed(source, target)

        def fsync(file):
            disk.ask("fsync")
            return synced(file)

        def serialize_file(*args, **options):
            try:
                disk.ask("write")
            except OSError as error:  # as its writer in Rust tells it
                raise SafetensorError("Error while serializing: I/O error: No space left (os error 28)") from error
            return serialized(*args, **options)

        with monkeypatch.context() as patch:
            patch.setattr(io, "open", open_watched)
            patch.setattr(builtins, "open", open_watched)
            patch.setattr(os, "replace", rename)
            patch.setattr(os, "fsync", fsync)
            patch.setattr(safetensors.torch, "serialize_file", serialize_file)
            yield self


class Keeps(Callback):
    """Writes what the callbacks on a policy write, and in the same way: an export and an evaluation."""

    def on_save_checkpoint(self, trainer, pl_module, checkpoint):
        root, name = Path(trainer.default_root_dir), f"step={trainer.global_step}"
        with atomic_folder(root / "export" / name) as new:
            safetensors.torch.save_file({"weight": pl_module.net.weight.detach()}, new / "weights.safetensors")
        for old in (root / "export").iterdir():
            if old.name != name and not old.name.startswith("."):
                remove_folder(old)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        pl_module.log("loss", outputs["loss"])
        add_entry(Path(trainer.default_root_dir) / "win_rate.json", {"split": "val", "step": trainer.global_step})


def train(folder: Path) -> SimpleNamespace:
    """A run as the command makes it, resumed from its newest checkpoint; its outcome."""
    module, status = Regression(), 0

    def main() -> None:
        newest = newest_intact_checkpoint(folder / "checkpoints").checkpoint
        logger = TensorBoardLogger(folder, name="", version="")
        callbacks = (Preemption(), RunCheckpoint(every_n_steps=2, keep=1), ExactResume(), Keeps())
        fit(folder, *callbacks, module=module, steps=STEPS, ckpt_path=newest, logger=logger, log_every_n_steps=1)

    numbers = (signal.SIGHUP, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM)
    before, hook = [signal.getsignal(number) for number in numbers], threading.excepthook
    try:
        run_command(main)
    except SystemExit as end:
        status = end.code
    finally:
        threading.excepthook = hook
        for number, handler in zip(numbers, before):
            signal.signal(number, handler)
    return SimpleNamespace(status=status, module=module)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return train(tmp_path_factory.mktemp("whole")).module


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lasting", [False, True], ids=["once", "from then on"])
def test_every_failure_is_one_line_and_costs_no_checkpoint(tmp_path, monkeypatch, capfd, whole, kind, lasting):
    failures, n = 0, 0
    while True:
        n += 1
        folder = tmp_path / f"{n}"
        with Disk(folder, kind, n, lasting).watched(monkeypatch) as disk:
            outcome = train(folder)
        told = capfd.readouterr().err
        if not disk.failed:
            break
        failures += 1
        where = f"{kind} {n}:\n{told}"
        lines = [line for line in told.splitlines() if line.startswith("error: ")]
        assert "Traceback" not in told, where
        assert (outcome.status, len(lines)) == (2, 1), where
        assert "No space left on device" in lines[0], where
        files = sorted((folder / "checkpoints").glob("*.ckpt"))
        assert [damage_reason(file) for file in files] == [None] * len(files), where
        saved_after = "saved step" in told  # the disk had room again
        assert not (saved_after and lasting), where
        if "checkpoint" in lines[0] and not saved_after:
            assert ("older checkpoints are intact" in lines[0]) == bool(files), where
        resumed = train(folder)
        assert resumed.status == 0, f"{where}\n{capfd.readouterr().err}"
        assert torch.equal(resumed.module.net.weight, whole.net.weight), where
        assert not [path for path in folder.rglob("*") if "unfinished" in path.name], where
        capfd.readouterr()
    assert outcome.status == 0, told
    assert failures > 10, f"the run asks for {disk.asked}"
