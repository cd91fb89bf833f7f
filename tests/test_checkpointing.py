"""Checkpoints are whole or not there, bounded in number, and a run goes on from them exactly."""

import errno
import io
import os
import random
import resource
import shutil
import signal
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback
from tiny_regression import Regression, fit, loader

from callbacks.resume.checkpoint_files import (
    AtomicCheckpointIO,
    NewestIntact,
    damage_reason,
    newest_checkpoint,
    newest_intact_checkpoint,
)
from callbacks.resume.checkpointing import AfterStep, RunCheckpoint
from callbacks.resume.exact_resume import ExactResume
from datamodules.stream.cursor import CursorDataModule, Segment
from experiments import run
from lightning_modules.errors import ConfigError, DataError

pytestmark = pytest.mark.filterwarnings("ignore:.*dataloader is not resumable:UserWarning")


def names(folder):
    return sorted(file.name for file in (folder / "checkpoints").iterdir())


def test_a_save_that_fails_leaves_the_former_checkpoint(tmp_path):
    target = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"step": 1}, target)
    with pytest.raises((AttributeError, TypeError), match="pickle"):
        AtomicCheckpointIO().save_checkpoint({"step": 2, "bad": lambda: None}, target)
    assert torch.load(target, weights_only=True) == {"step": 1}
    AtomicCheckpointIO().save_checkpoint({"step": 3}, target)
    assert torch.load(target, weights_only=True) == {"step": 3}
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]


def test_last_is_a_second_name_of_the_newest_file_or_a_copy_where_there_are_no_links(tmp_path, monkeypatch):
    fit(tmp_path / "linked", RunCheckpoint(every_n_steps=2), ExactResume(), steps=5)
    last, newest = (tmp_path / "linked" / "checkpoints" / name for name in ("last.ckpt", "step=0000005.ckpt"))
    assert last.samefile(newest)
    assert not last.is_symlink()
    newest.unlink()
    assert torch.load(last, weights_only=True)["global_step"] == 5

    def no_links(*names):
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", no_links)
    fit(tmp_path / "copied", RunCheckpoint(every_n_steps=2), ExactResume(), steps=5)
    copied = tmp_path / "copied" / "checkpoints"
    assert names(tmp_path / "copied") == ["last.ckpt", "step=0000004.ckpt", "step=0000005.ckpt"]
    assert not (copied / "last.ckpt").samefile(copied / "step=0000005.ckpt")
    assert torch.load(copied / "last.ckpt", weights_only=True)["global_step"] == 5


@contextmanager
def no_file_larger_than(size):
    """As on a full disk, writing fails in the middle, inside torch's writer."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_one_line_and_leaves_the_former_checkpoint(tmp_path, monkeypatch):
    target = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"step": 1}, target)
    message = "cannot write .*last.ckpt: {}; .*; the older checkpoints are intact; then resume with --resume auto"
    with no_file_larger_than(100_000), pytest.raises(DataError, match=message.format("File too large")):
        AtomicCheckpointIO().save_checkpoint({"step": 2, "weights": torch.zeros(100_000)}, target)

    def full(file):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DataError, match=message.format("No space left on device")):
        AtomicCheckpointIO().save_checkpoint({"step": 2}, target)
    assert torch.load(target, weights_only=True) == {"step": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]


class FillsTheDisk(Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == 3:
            _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))


def test_a_disk_that_fills_up_ends_a_run_that_goes_on_later(tmp_path):
    with no_file_larger_than(resource.RLIM_INFINITY), pytest.raises(DataError, match="cannot write .*ckpt"):
        fit(tmp_path, FillsTheDisk(), RunCheckpoint(every_n_steps=2, keep=2), steps=6)
    assert names(tmp_path) == ["last.ckpt", "step=0000002.ckpt"]
    whole = fit(tmp_path / "whole", RunCheckpoint(), steps=6)
    newest = newest_intact_checkpoint(tmp_path / "checkpoints").checkpoint
    resumed = fit(tmp_path, RunCheckpoint(every_n_steps=2, keep=2), steps=6, ckpt_path=newest)
    assert torch.equal(whole.net.weight, resumed.net.weight)


def test_a_killed_writer_leaves_a_checkpoint_that_loads(tmp_path):
    target, rng = tmp_path / "last.ckpt", random.Random(0)
    AtomicCheckpointIO().save_checkpoint({"step": -1}, target)
    for _ in range(8):
        child = os.fork()
        if child == 0:
            step = 0
            while True:
                AtomicCheckpointIO().save_checkpoint({"step": step, "weights": torch.zeros(500_000)}, target)
                step += 1
        time.sleep(rng.uniform(0.01, 0.1))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        torch.load(target, weights_only=True)
        assert newest_checkpoint(tmp_path) == target


def saved(folder, name, step, saves=None):
    """A file with the part of a checkpoint that says when it was written."""
    notes = {} if saves is None else {"RunCheckpoint": {"saves": saves}}
    content = {"state_dict": {}, "loops": {}, "global_step": step, "callbacks": notes}
    AtomicCheckpointIO().save_checkpoint(content, folder / name)


def test_the_newest_checkpoint_is_the_one_that_the_run_wrote_last_whatever_file_times_say(tmp_path):
    assert newest_checkpoint(tmp_path / "nothing") is None
    saved(tmp_path, "step=1.ckpt", 1, saves=3)  # the run went back
    saved(tmp_path, "step=3.ckpt", 3, saves=2)
    saved(tmp_path, "step=9.ckpt", 9)  # of an earlier version
    (tmp_path / ".step=9.ckpt-unfinished-1").touch()
    assert newest_checkpoint(tmp_path) == tmp_path / "step=1.ckpt"
    saved(tmp_path, "last.ckpt", 1, saves=3)
    for age, name in ((30, "last.ckpt"), (20, "step=1.ckpt"), (10, "step=3.ckpt"), (0, "step=9.ckpt")):
        os.utime(tmp_path / name, ns=(10**18 - age, 10**18 - age))
    assert newest_checkpoint(tmp_path) == tmp_path / "last.ckpt"
    (tmp_path / "step=3.ckpt").write_bytes(b"PK")  # nobody knows: it is looked into, and told of, first
    assert newest_intact_checkpoint(tmp_path) == NewestIntact(
        tmp_path / "last.ckpt", {tmp_path / "step=3.ckpt": "is cut short or no checkpoint"}
    )


def test_a_run_deletes_nothing_that_it_has_just_written_when_clocks_were_ahead(tmp_path):
    fit(tmp_path, RunCheckpoint(every_n_steps=2, keep=2), steps=4)
    for file in (tmp_path / "checkpoints").iterdir():
        os.utime(file, ns=(10**19, 10**19))
    last = newest_checkpoint(tmp_path / "checkpoints")
    fit(tmp_path, RunCheckpoint(every_n_steps=2, keep=2), steps=8, ckpt_path=last)
    assert names(tmp_path) == ["last.ckpt", "step=0000006.ckpt", "step=0000008.ckpt"]
    assert step_of(newest_checkpoint(tmp_path / "checkpoints")) == 8


def step_of(file):
    return torch.load(file, weights_only=True)["global_step"]


def test_a_copied_run_resumes_from_its_newest_step(tmp_path):
    fit(tmp_path / "run", RunCheckpoint(every_n_steps=2, keep=-1), steps=6)
    (tmp_path / "copy").mkdir()
    for name in ("last.ckpt", "step=0000006.ckpt", "step=0000004.ckpt", "step=0000002.ckpt"):
        (tmp_path / "copy" / name).write_bytes((tmp_path / "run" / "checkpoints" / name).read_bytes())
        assert newest_checkpoint(tmp_path / "copy").name == "last.ckpt"


def test_keeps_the_newest_few_and_the_last_and_saves_the_end(tmp_path):
    fit(tmp_path, RunCheckpoint(every_n_steps=2, keep=2), steps=7)
    assert names(tmp_path) == ["last.ckpt", "step=0000006.ckpt", "step=0000007.ckpt"]
    assert torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 7


def test_a_resumed_run_keeps_to_the_same_files(tmp_path):
    fit(tmp_path, RunCheckpoint(every_n_steps=2, keep=2), steps=4)
    fit(
        tmp_path, RunCheckpoint(every_n_steps=2, keep=2), steps=8, ckpt_path=newest_checkpoint(tmp_path / "checkpoints")
    )
    assert names(tmp_path) == ["last.ckpt", "step=0000006.ckpt", "step=0000008.ckpt"]


def test_a_run_killed_between_the_two_files_of_its_last_step_ends_with_both(tmp_path):
    fit(tmp_path, RunCheckpoint(every_n_steps=2), ExactResume(), steps=2)
    former = (tmp_path / "checkpoints" / "last.ckpt").read_bytes()
    fit(tmp_path, RunCheckpoint(), ExactResume(), steps=4, ckpt_path=tmp_path / "checkpoints" / "last.ckpt")
    last, newest = (tmp_path / "checkpoints" / name for name in ("last.ckpt", "step=0000004.ckpt"))
    last.unlink()  # it is the newest file's second name
    last.write_bytes(former)
    assert newest_checkpoint(tmp_path / "checkpoints") == newest
    fit(tmp_path, RunCheckpoint(), ExactResume(), steps=4, ckpt_path=newest)
    assert torch.load(last, weights_only=True)["global_step"] == 4


class EvaluatesAtTheEnd(AfterStep):
    def on_train_end(self, trainer, pl_module):
        self.unsaved = True


def test_a_step_that_is_saved_again_at_the_end_is_of_the_same_epoch(tmp_path):
    """An epoch has 10 batches; at the end of a training Lightning counts the one it broke off as done."""
    fit(tmp_path, RunCheckpoint(every_n_steps=6), ExactResume(), EvaluatesAtTheEnd(), steps=6)
    saved = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["epoch"] == saved["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"] == 0


def test_another_runs_checkpoint_does_not_bring_its_list_of_files(tmp_path):
    fit(tmp_path / "a", RunCheckpoint(every_n_steps=2, keep=1), steps=2)
    start = newest_checkpoint(tmp_path / "a" / "checkpoints")
    fit(tmp_path / "b", RunCheckpoint(every_n_steps=2, keep=1), steps=4, ckpt_path=start)
    assert names(tmp_path / "a") == ["last.ckpt", "step=0000002.ckpt"]
    assert names(tmp_path / "b") == ["last.ckpt", "step=0000004.ckpt"]


class SaveAfterBatch(Callback):
    def __init__(self, batches, path):
        self.batches, self.path = batches, path

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.fit_loop.epoch_loop.batch_progress.total.processed == self.batches:
            trainer.save_checkpoint(self.path)


# Windows of 3 batches, epochs of 10: at 4 and 5 batches one is open, 6 closes one, 10 ends the epoch with a short
# one, and the epoch after begins a new one.
@pytest.mark.parametrize("batches", [4, 5, 6, 10, 12, 14])
def test_a_checkpoint_within_an_accumulation_window_resumes_exactly(tmp_path, batches):
    path = tmp_path / "middle.ckpt"
    whole = fit(tmp_path / "a", SaveAfterBatch(batches, path), ExactResume(), steps=8, accumulate=3)
    resumed = fit(tmp_path / "b", ExactResume(), steps=8, accumulate=3, ckpt_path=path)
    assert torch.equal(whole.net.weight, resumed.net.weight)


def test_without_the_rewind_it_would_not(tmp_path):
    path = tmp_path / "middle.ckpt"
    whole = fit(tmp_path / "a", SaveAfterBatch(5, path), steps=8, accumulate=3)
    resumed = fit(tmp_path / "b", steps=8, accumulate=3, ckpt_path=path)
    assert not torch.equal(whole.net.weight, resumed.net.weight)


class Positioned(CursorDataModule):
    """Data of which a checkpoint holds the position."""

    segment = Segment()

    def __init__(self):
        super().__init__(1)

    def train_dataloader(self):
        return loader(self.trainer)

    def state_dict(self):
        return {"place": 1}

    def restore(self, state):
        assert state == {"place": 1}


class OtherData(Positioned):
    """Data of another kind."""


def test_a_checkpoint_of_other_data_is_refused(tmp_path):
    options = {"max_epochs": -1, "enable_checkpointing": True, "logger": False, "enable_progress_bar": False}
    options |= {"accelerator": "cpu", "enable_model_summary": False, "default_root_dir": tmp_path}
    options |= {"use_distributed_sampler": False, "plugins": [AtomicCheckpointIO()]}

    def train(data, steps, checkpoint=None):
        running = Trainer(**options, max_steps=steps, callbacks=[RunCheckpoint(), ExactResume()])
        running.fit(Regression(), data, ckpt_path=checkpoint, weights_only=True)
        return running.global_step

    last = tmp_path / "checkpoints" / "last.ckpt"
    assert train(Positioned(), 2) == 2
    assert train(Positioned(), 4, last) == 4
    with pytest.raises(ConfigError, match="holds no position in OtherData's data: another data module wrote it"):
        train(OtherData(), 6, last)


# ------------------------------------------------------------------------------------ when, and how many


def test_saves_by_the_clock_at_the_end_of_steps(tmp_path):
    fit(tmp_path, RunCheckpoint(every_n_steps=100, keep=-1, every_n_minutes=1e-9), steps=3, accumulate=2)
    assert names(tmp_path) == ["last.ckpt", *(f"step=000000{step}.ckpt" for step in (1, 2, 3))]
    fit(tmp_path / "slow", RunCheckpoint(every_n_steps=100, keep=-1, every_n_minutes=1e9), steps=3, accumulate=2)
    assert names(tmp_path / "slow") == ["last.ckpt", "step=0000003.ckpt"]


def test_what_killed_runs_left_behind_is_cleared_away(tmp_path):
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    for name in ("step=0000001.ckpt", "step=0000900.ckpt", ".last.ckpt-unfinished-1", "best.ckpt"):
        (folder / name).write_text("old")
    fit(tmp_path, RunCheckpoint(every_n_steps=2, keep=2), steps=6)
    assert names(tmp_path) == ["best.ckpt", "last.ckpt", "step=0000004.ckpt", "step=0000006.ckpt"]


def test_a_run_that_goes_back_keeps_what_it_writes(tmp_path):
    fit(tmp_path, RunCheckpoint(every_n_steps=2, keep=2), steps=8)
    back = tmp_path / "checkpoints" / "step=0000006.ckpt"
    fit(tmp_path, RunCheckpoint(every_n_steps=1, keep=2), steps=7, ckpt_path=back)
    assert names(tmp_path) == ["last.ckpt", "step=0000007.ckpt", "step=0000008.ckpt"]
    assert torch.load(newest_checkpoint(tmp_path / "checkpoints"), weights_only=True)["global_step"] == 7


@pytest.mark.parametrize("settings", [{"every_n_steps": 0}, {"keep": -2}, {"every_n_minutes": 0.0}])
def test_settings_out_of_range(settings):
    with pytest.raises(ConfigError, match="RunCheckpoint wants every_n_steps of at least 1"):
        RunCheckpoint(**settings)


# -------------------------------------------------------------------------------------- damaged files


def flipped(content):
    """One bit of the first weight, which torch would load without a word."""
    weight = torch.load(io.BytesIO(content), weights_only=True)["state_dict"]["net.weight"]
    place = content.index(weight.numpy().tobytes())
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


DAMAGES = {
    "empty": (lambda content: b"", "is empty"),
    "half": (lambda content: content[: len(content) // 2], "is cut short"),
    "a byte short": (lambda content: content[:-1], "is cut short"),
    "garbage": (lambda content: b"garbage" * 1000, "no checkpoint"),
    "one bit": (flipped, "is damaged (checksum of"),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run with checkpoints of steps 4 and 6."""
    folder = tmp_path_factory.mktemp("whole")
    fit(folder, RunCheckpoint(every_n_steps=2, keep=2), steps=6)
    return folder / "checkpoints"


@pytest.fixture
def copied(whole, tmp_path):
    """A copy to damage."""
    return Path(shutil.copytree(whole, tmp_path / "run" / "checkpoints"))


def harm(file, how):
    file.write_bytes(DAMAGES[how][0](file.read_bytes()))


@pytest.mark.parametrize("how", DAMAGES)
def test_damage_is_found_and_the_one_before_taken(copied, how):
    assert newest_intact_checkpoint(copied).checkpoint == copied / "last.ckpt"
    harm(copied / "last.ckpt", how)
    assert DAMAGES[how][1] in damage_reason(copied / "last.ckpt")
    assert newest_intact_checkpoint(copied).checkpoint == copied / "step=0000006.ckpt"
    harm(copied / "step=0000006.ckpt", how)
    found = newest_intact_checkpoint(copied)
    assert found.checkpoint == copied / "step=0000004.ckpt"
    assert found.damaged.keys() == {copied / "last.ckpt", copied / "step=0000006.ckpt"}


def test_a_whole_file_of_another_kind_is_no_checkpoint(tmp_path):
    torch.save({"weights": torch.zeros(3)}, tmp_path / "a.ckpt")
    assert damage_reason(tmp_path / "a.ckpt") == "holds something other than a run's checkpoint"
    torch.save({"state_dict": print}, tmp_path / "b.ckpt")
    assert damage_reason(tmp_path / "b.ckpt") == "is no checkpoint that can be loaded"


# ------------------------------------------------------------------------------------ the command line

CONFIG = """
trainer:
  accelerator: cpu
  max_steps: 8
  enable_progress_bar: false
  enable_model_summary: false
  logger: false
model: {class_path: tiny_regression.Regression}
data: {class_path: tiny_regression.RegressionData}
"""


@pytest.fixture
def start(copied, tmp_path, monkeypatch):
    """Starts the command in the folder of a run of 6 steps."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    (tmp_path / "line.yaml").write_text(CONFIG)
    return lambda *words: run.main(["--config", "line.yaml", "--run_dir", "run", *words])


@pytest.mark.parametrize("word", ["--resume=auto", "--ckpt_path=last", "--resume=last"])
def test_a_damaged_newest_checkpoint_is_named_and_the_run_goes_on_from_the_one_before(start, copied, caplog, word):
    for name in ("last.ckpt", "step=0000006.ckpt"):
        harm(copied / name, "half")
    with caplog.at_level("INFO"):
        cli = start(word)
    assert cli.trainer.global_step == 8
    folder = Path("run/checkpoints")
    assert cli.checkpoint == folder / "step=0000004.ckpt"
    (line,) = [record.getMessage() for record in caplog.records if "cut short" in record.getMessage()]
    damaged = ", ".join(f"{folder / name} is cut short or no checkpoint" for name in ("last.ckpt", "step=0000006.ckpt"))
    assert line == f"{damaged}; resuming from {folder / 'step=0000004.ckpt'}"


def test_a_run_never_starts_afresh_where_all_checkpoints_are_damaged(start, copied):
    for file in copied.iterdir():
        harm(file, "empty")
    for word in ("--resume=auto", "--resume=last"):
        with pytest.raises(ConfigError, match="no checkpoint can be used: .*last.ckpt is empty, .*; bring one back"):
            start(word)
    with pytest.raises(ConfigError, match="already holds a run"):
        start()


def test_a_damaged_checkpoint_given_by_name_is_one_line(start, copied):
    harm(copied / "last.ckpt", "one bit")
    with pytest.raises(ConfigError, match="last.ckpt is damaged .checksum of .*; give another, or 'last'"):
        start("--resume", "run/checkpoints/last.ckpt")


def test_resume_and_ckpt_path_are_one_setting(start):
    with pytest.raises(ConfigError, match="--resume auto and --ckpt_path last are two words for one thing; give one"):
        start("--ckpt_path", "last", "--resume=auto")
    cli = start("--ckpt_path", "last", "--resume=last")
    assert cli.config.ckpt_path == "last"
    assert "resume" not in cli.config


@pytest.mark.parametrize(("place", "message"), [("file/run", "file is no folder"), ("locked/run", "cannot be written")])
def test_a_run_folder_that_cannot_be_written_is_told_before_anything_is_built(
    start, tmp_path, monkeypatch, place, message
):
    (tmp_path / "file").touch()
    (tmp_path / "locked").mkdir()
    (tmp_path / "locked").chmod(0o500)
    if os.getuid() == 0:  # whom no mode stops
        access = os.access
        monkeypatch.setattr(os, "access", lambda path, mode: "locked" not in str(path) and access(path, mode))

    def built(self):
        raise AssertionError("too late")

    monkeypatch.setattr(Regression, "__init__", built)
    with pytest.raises(ConfigError, match=message):
        start("--run_dir", place)
