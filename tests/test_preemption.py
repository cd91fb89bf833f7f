"""A run that gets a signal leaves a checkpoint, a requeued job and a code; it goes on as if nothing had happened."""

import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from tiny_regression import Regression, Sends, Validated, fit
from tiny_world import make, trained_parameters, trainer
from torch.multiprocessing import ProcessExitedException

from callbacks.resume.checkpoint_files import AtomicCheckpointIO, newest_checkpoint
from callbacks.resume.checkpointing import RunCheckpoint
from callbacks.resume.exact_resume import ExactResume
from callbacks.resume.preemption import Preemption
from callbacks.resume.slurm import requeue
from datamodules.step_pool import StepPoolDataModule
from lightning_modules.errors import DataError, DivergenceError
from lightning_modules.objectives.spo import SPO
from lightning_modules.references import AdapterOff
from lightning_modules.sampling.step_sampler import StepSampler
from lightning_modules.sampling.step_scorers import RandomScorer

TERM, USR1, USR2, INT, HUP = signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT, signal.SIGHUP

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*dataloader is not resumable:UserWarning"),
    pytest.mark.usefixtures("handlers"),
]


def run(folder, *callbacks, **options):
    """Windows of 3 batches, 8 steps, which end in the third epoch."""
    settings = {"steps": 8, "accumulate": 3} | options
    return fit(folder, *callbacks, Preemption(), RunCheckpoint(every_n_steps=100), ExactResume(), **settings)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return run(tmp_path_factory.mktemp("whole"))


def names(folder):
    return sorted(file.name for file in (folder / "checkpoints").glob("*"))


# ------------------------------------------------------------------------------------------- leaving


# The batch is the last one of the run that begins. 2 and 5: a step ends with it. 4 and 6: within a window. 9: the last
# of an epoch, whose window is short. 10: the first of the next.
@pytest.mark.parametrize(
    ("batch", "numbers", "code"),
    [
        (2, [TERM], 143),
        (4, [USR1], 138),
        (5, [INT], 130),
        (6, [TERM, TERM, USR1, INT], 143),
        (9, [USR1], 138),
        (10, [TERM], 143),
        (4, [HUP], 129),
        (4, [HUP, USR2], 140),
    ],
)
def test_a_signal_saves_leaves_with_its_code_and_the_run_goes_on_exactly(whole, tmp_path, capfd, batch, numbers, code):
    cut = Regression()
    with pytest.raises(SystemExit) as left:
        run(tmp_path, Sends(batch, *numbers), module=cut)
    assert left.value.code == code
    assert len(cut.losses) == batch + 1
    step = torch.load(newest_checkpoint(tmp_path / "checkpoints"), weights_only=True)["global_step"]
    assert names(tmp_path) == ["last.ckpt", f"step={step:07d}.ckpt"]
    (line,) = [line for line in capfd.readouterr().err.splitlines() if "stopped" in line]
    name = signal.Signals(code - 128).name
    last = tmp_path / "checkpoints" / "last.ckpt"
    assert line == f"stopped by {name} at step {step}, saved in {last}; resume with --ckpt_path auto"

    resumed = run(tmp_path, ckpt_path=newest_checkpoint(tmp_path / "checkpoints"))
    assert torch.equal(resumed.net.weight, whole.net.weight)
    assert resumed.losses == whole.losses[-len(resumed.losses) :]
    assert len(whole.losses) - len(resumed.losses) <= batch + 1


def test_a_second_interrupt_leaves_at_once_and_saves_nothing(tmp_path, capfd):
    cut = Regression()
    with pytest.raises(SystemExit) as left:
        run(tmp_path, Sends(6, INT, INT), module=cut)
    assert left.value.code == 130
    assert len(cut.losses) == 6
    assert names(tmp_path) == []
    assert "stopped" not in capfd.readouterr().err


def test_a_run_that_ignores_its_terminal_s_end_goes_on(whole, tmp_path):
    """``nohup`` starts a command so."""
    before = signal.signal(HUP, signal.SIG_IGN)
    try:
        assert run(tmp_path, Sends(4, HUP)).losses == whole.losses
        assert signal.getsignal(HUP) == signal.SIG_IGN
    finally:
        signal.signal(HUP, before)


def test_before_the_first_step_there_is_nothing_to_save(tmp_path, capfd):
    with pytest.raises(SystemExit):
        run(tmp_path, Sends(1, TERM))
    assert names(tmp_path) == []
    told = "stopped by SIGTERM before there was a checkpoint to write; start again with the same command"
    assert told in capfd.readouterr().err


def test_without_checkpoints_it_says_so(tmp_path, capfd):
    with pytest.raises(SystemExit) as left:
        fit(tmp_path, Sends(3, TERM), Preemption())
    assert left.value.code == 143
    assert "at step 4; nothing is saved, as trainer.enable_checkpointing is false" in capfd.readouterr().err


class SendsWhileSaving(AtomicCheckpointIO):
    def save_checkpoint(self, checkpoint, path, storage_options=None):
        os.kill(os.getpid(), TERM)
        super().save_checkpoint(checkpoint, path)
        os.kill(os.getpid(), TERM)


def test_a_signal_while_saving_does_no_harm(whole, tmp_path):
    with pytest.raises(SystemExit):
        run(tmp_path, Sends(4, TERM), plugins=[SendsWhileSaving()])
    resumed = run(tmp_path, ckpt_path=newest_checkpoint(tmp_path / "checkpoints"))
    assert torch.equal(resumed.net.weight, whole.net.weight)


# -------------------------------------------------------------------------------------------- errors


class Breaks(Regression):
    """Raises at a place of the batch that is trained on as the n-th."""

    def __init__(self, place, n):
        super().__init__()
        self.place, self.n = place, n

    def fails(self, place):
        if place == self.place and len(self.losses) == self.n + (place != "data"):
            raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")

    def train_dataloader(self):
        loader = super().train_dataloader()
        collate = loader.collate_fn

        def failing(samples):
            self.fails("data")
            return collate(samples)

        loader.collate_fn = failing
        return loader

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.fails("forward")
        return loss

    def optimizer_step(self, *args, **kwargs):
        super().optimizer_step(*args, **kwargs)
        self.fails("update")

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.fails("end")


# Windows of 3 batches: 4 is within one, 5 ends one, 9 is the last of an epoch.
@pytest.mark.parametrize("n", [4, 5, 9])
@pytest.mark.parametrize("place", ["data", "forward", "end"])
def test_an_error_that_leaves_the_state_sound_is_saved_on(whole, tmp_path, capfd, place, n):
    with pytest.raises(RuntimeError, match="killed by signal"):
        run(tmp_path, module=Breaks(place, n))
    newest = newest_checkpoint(tmp_path / "checkpoints")
    # 9: an epoch of ten batches ends with a window of one.
    step = {4: 1, 5: 2 if place == "end" else 1, 9: 4 if place == "end" else 3}[n]
    assert names(tmp_path) == ["last.ckpt", f"step={step:07d}.ckpt"]
    assert f"saved step {step} in {newest}" in capfd.readouterr().err
    resumed = run(tmp_path, ckpt_path=newest)
    assert torch.equal(resumed.net.weight, whole.net.weight)
    assert resumed.losses == whole.losses[-len(resumed.losses) :]


@pytest.mark.parametrize("n", [5, 9])
def test_an_error_in_the_middle_of_an_update_saves_nothing(tmp_path, capfd, n):
    with pytest.raises(RuntimeError, match="killed by signal"):
        run(tmp_path, module=Breaks("update", n))
    assert names(tmp_path) == []
    assert "saved step" not in capfd.readouterr().err


class Diverges(Callback):
    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == 2:
            raise DivergenceError("steps were left out")


def test_a_training_that_diverges_is_not_saved(tmp_path):
    with pytest.raises(DivergenceError):
        run(tmp_path, Diverges())
    assert names(tmp_path) == []


# ---------------------------------------------------------------------------------------- validations


class Noted(Validated):
    """Remembers every validation that came to its end: batches trained on before, and a weight."""

    def __init__(self):
        super().__init__()
        self.validations = []

    def on_validation_epoch_end(self):
        if not self.trainer.sanity_checking:
            trained = self.trainer.fit_loop.epoch_loop.batch_progress.total.processed
            self.validations.append((trained, self.net.weight[0, 0].item()))


class InValidation(Callback):
    """When a batch of the n-th validation begins, a signal comes, or the process dies."""

    def __init__(self, n, number=None, rank=None, batch=1):
        self.n, self.number, self.rank, self.batch = n, number, rank, batch

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        due = not trainer.sanity_checking and len(pl_module.validations) == self.n and batch_idx == self.batch
        if due and self.number is None:
            raise InterruptedError
        if due and self.rank in (None, trainer.global_rank):
            os.kill(os.getpid(), self.number)


def validated(folder, *callbacks, every_n_steps=100, resume=False, **options):
    newest = newest_checkpoint(folder / "checkpoints") if resume else None
    saving = [Preemption(), RunCheckpoint(every_n_steps), ExactResume()]
    return fit(folder, *callbacks, *saving, module=Noted(), ckpt_path=newest, **({"accumulate": 3} | options))


# Windows of 3 batches, the last of an epoch of 10 is short. Validations within a window, at its end, at the end of the
# epoch, of which the second is the run's end, too; then every 4 batches without regard to epochs.
VALIDATIONS = {
    "window": {"val_check_interval": 7, "steps": 8},
    "step": {"val_check_interval": 6, "steps": 8},
    "epoch": {"val_check_interval": 1.0, "steps": 8},
    "epoch, without a number of steps": {"val_check_interval": 1.0, "steps": -1, "max_epochs": 2},
    "batches": {"val_check_interval": 4, "check_val_every_n_epoch": None, "steps": 8},
}


@pytest.mark.parametrize("options", VALIDATIONS.values(), ids=VALIDATIONS)
@pytest.mark.parametrize("n", [0, 1])
@pytest.mark.parametrize("how", ["signal", "death"])
def test_a_validation_that_is_cut_short_is_made_once_when_the_run_goes_on(tmp_path, capfd, how, n, options):
    whole = validated(tmp_path / "whole", **options)
    cut = Noted()
    dies, ends = InValidation(n, TERM if how == "signal" else None), SystemExit if how == "signal" else InterruptedError
    with pytest.raises(ends):
        # Where it dies there is a checkpoint of the very step, written before.
        validated(tmp_path, dies, Keeps(cut), every_n_steps=1 if how == "death" else 100, **options)
    assert ("gave up the validation after 2 of 3 batches; it is made again" in capfd.readouterr().err) == (
        how == "signal"
    )
    resumed = validated(tmp_path, resume=True, **options)
    assert cut.validations + resumed.validations == whole.validations
    assert len(cut.validations) == n
    assert torch.equal(resumed.net.weight, whole.net.weight)
    again = validated(tmp_path, resume=True, **options)
    assert (again.validations, again.losses) == ([], [])


class Keeps(Callback):
    """Hands out what the module of a run that raises has noted."""

    def __init__(self, target):
        self.target = target

    def on_validation_end(self, trainer, pl_module):
        self.target.validations = list(pl_module.validations)


class LogSteps(Callback):
    """The step that loggers are told, by batches trained on."""

    def __init__(self):
        self.seen = {}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        loop = trainer.fit_loop.epoch_loop
        self.seen[loop.batch_progress.total.processed] = loop._batches_that_stepped


# In the window after a validation, and in the first of an epoch.
@pytest.mark.parametrize("batch", [6, 7, 10])
def test_loggers_are_told_the_same_steps_after_a_rewind(tmp_path, batch):
    options = {"val_check_interval": 6, "steps": 8}
    whole, resumed = LogSteps(), LogSteps()
    validated(tmp_path / "whole", whole, **options)
    with pytest.raises(SystemExit):
        validated(tmp_path, Sends(batch, TERM), **options)
    validated(tmp_path, resumed, resume=True, **options)
    assert resumed.seen == {n: step for n, step in whole.seen.items() if n in resumed.seen}
    assert len(resumed.seen) >= 10


def test_a_validation_that_is_made_up_for_can_be_cut_short_too(tmp_path):
    whole = validated(tmp_path / "whole", val_check_interval=1.0, steps=8)
    for _ in range(2):
        with pytest.raises(SystemExit):
            validated(tmp_path, InValidation(0, USR1), val_check_interval=1.0, steps=8, resume=True)
    resumed = validated(tmp_path, val_check_interval=1.0, steps=8, resume=True)
    assert resumed.validations == whole.validations
    assert torch.equal(resumed.net.weight, whole.net.weight)


def test_a_signal_on_a_full_disk_ends_with_its_line_and_no_requeue(tmp_path, monkeypatch, scontrol):
    monkeypatch.setenv("SLURM_JOB_ID", "7")

    def full(file):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DataError, match="cannot write .*ckpt: No space left on device"):
        run(tmp_path, Sends(4, TERM))
    assert names(tmp_path) == []
    assert not scontrol.exists()


# --------------------------------------------------------------------------------------------- SLURM

SCONTROL = """#!/bin/sh
[ "$1" = show ] && echo "JobId=7 JobState=$STATE Requeue=1" && exit
echo "$@" >> "{calls}"
[ "$STATE" = BUSY ] && echo "slurm_requeue error: busy" >&2 && exit 1
exit 0
"""


@pytest.fixture
def scontrol(tmp_path, monkeypatch):
    """A stand-in that writes down what it is asked to requeue; the file it writes."""
    folder, calls = tmp_path / "bin", tmp_path / "calls"
    folder.mkdir()
    (folder / "scontrol").write_text(SCONTROL.format(calls=calls))
    (folder / "scontrol").chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("STATE", "RUNNING")
    return calls


@pytest.mark.parametrize("number", [TERM, USR1, USR2, INT, HUP])
def test_in_slurm_the_scheduler_s_signals_requeue(tmp_path, monkeypatch, scontrol, capfd, number):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    with pytest.raises(SystemExit) as left:
        run(tmp_path, Sends(4, number))
    assert left.value.code == 128 + number
    by_scheduler = number in (TERM, USR1, USR2)
    assert (scontrol.read_text() if scontrol.exists() else None) == ("requeue 7\n" if by_scheduler else None)
    assert ("requeued SLURM job 7" in capfd.readouterr().err) == by_scheduler


def test_a_task_of_an_array_is_requeued_alone(monkeypatch, scontrol):
    monkeypatch.setenv("SLURM_JOB_ID", "9")
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "7")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "2")
    requeue()
    assert scontrol.read_text() == "requeue 7_2\n"


@pytest.mark.parametrize("state", ["CANCELLED", "COMPLETING"])
def test_a_job_that_slurm_is_ending_itself_is_left_to_it(monkeypatch, scontrol, state):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("STATE", state)
    assert requeue() == f"SLURM job 7 was cancelled or preempted ({state}): not requeued by this run"
    assert not scontrol.exists()


def test_a_requeue_that_fails_says_why(monkeypatch, scontrol):
    assert requeue() is None  # outside SLURM
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("STATE", "BUSY")
    told = "could not requeue SLURM job 7: {}; submit it again with --ckpt_path auto"
    assert requeue() == told.format("slurm_requeue error: busy")
    monkeypatch.setenv("PATH", "/nowhere")
    assert requeue() == told.format("[Errno 2] No such file or directory: 'scontrol'")


# --------------------------------------------------------------------------------------------- pools


class Called(RandomScorer):
    """Gets a signal when it is asked for the n-th time, in the middle of a chunk; two questions a prompt."""

    def __init__(self, at=None):
        super().__init__()
        self.asked, self.fate = [], [at]

    def score(self, candidates):
        self.asked.append(candidates.prompts)
        if len(self.asked) == self.fate[0]:
            os.kill(os.getpid(), TERM)
        return super().score(candidates)


def pools(pipelines, folder, at=None, resume=False):
    """Two pools of five prompts, a chunk each; no checkpoint in between but for those of pools' ends."""
    scorer = Called(at)
    sampler = StepSampler(steps=3, branch_from_step=1, candidates=2, threshold=0.3, guidance_scale=1.0)
    prompts = ["a cat", "a dog", "the sea", "a red house", "two birds"]
    data = StepPoolDataModule(sampler, 2, prompts, scorer, prompts_per_batch=1, seed=7)
    module = make(pipelines, reference=AdapterOff(), objective=SPO(guidance_scale=1.0))
    running = trainer(
        folder, Preemption(), RunCheckpoint(every_n_steps=100, keep=1), ExactResume(), max_epochs=2,
        enable_checkpointing=True, plugins=[AtomicCheckpointIO()], reload_dataloaders_every_n_epochs=1,
    )  # fmt: skip
    newest = newest_checkpoint(folder / "checkpoints")
    assert (newest is not None) == resume
    running.fit(module, data, ckpt_path=newest)
    return torch.cat([parameter.detach().flatten() for parameter in trained_parameters(module.policy)]), scorer


@pytest.fixture(scope="module")
def whole_pools(tmp_path_factory, pipelines):
    return pools(pipelines, tmp_path_factory.mktemp("pools"))[0]


@pytest.mark.parametrize("pool", [0, 1])
def test_a_signal_in_sampling_keeps_finished_chunks_and_the_pools_before(whole_pools, pipelines, tmp_path, capfd, pool):
    with pytest.raises(SystemExit) as left:
        pools(pipelines, tmp_path, at=pool * 10 + 3)  # in the second chunk
    assert left.value.code == 143
    told = capfd.readouterr().err
    assert ("resume with --ckpt_path auto" if pool else "start again with the same command") in told
    assert len(list((tmp_path / "pools").glob(f"pool-{pool:05d}-*/?????.json"))) == 2  # that chunk is finished first
    weights, scorer = pools(pipelines, tmp_path, resume=pool > 0)
    assert torch.equal(weights, whole_pools)
    assert len(scorer.asked) == (2 - pool) * 10 - 4


# --------------------------------------------------------------------------------------------- ranks


def two(folder, *callbacks, **options):
    # Forked, because a fresh interpreter takes seconds to import; the processes and their exchange are the same.
    return run(folder, *callbacks, devices=2, strategy="ddp_fork", **options)


def last(folder):
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


def test_ranks_leave_a_validation_together_when_one_gets_the_signal(tmp_path, capfd):
    options = {"devices": 2, "strategy": "ddp_fork", "val_check_interval": 1.0, "steps": 4}
    validated(tmp_path / "whole", **options)
    with pytest.raises(ProcessExitedException, match="exit code 143"):
        validated(tmp_path, InValidation(0, TERM, rank=1, batch=0), **options)
    assert capfd.readouterr().err.count("gave up the validation after 1 of 2 batches") == 1
    validated(tmp_path, resume=True, **options)
    for name, value in last(tmp_path / "whole").items():
        assert torch.equal(value, last(tmp_path)[name])


SCRIPT = """
import sys
from test_preemption import Sends, TERM, run
run(sys.argv[1], Sends(4, TERM, rank=1), devices=2, strategy="ddp")
"""


def test_ranks_leave_together_when_one_gets_the_signal(tmp_path):
    """Rank 1 alone is told, in the middle of a window. Its parent, rank 0, must save, and end with its code."""
    (tmp_path / "script.py").write_text(SCRIPT)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    done = subprocess.run(
        [sys.executable, str(tmp_path / "script.py"), str(tmp_path / "cut")],
        capture_output=True, text=True, timeout=240, check=False,
        env=environment | {"PYTHONPATH": os.pathsep.join(paths)},
    )  # fmt: skip
    assert done.returncode == 143, done.stderr[-3000:]
    assert done.stderr.count("stopped by SIGTERM at step 1, saved in") == 1
    assert "Traceback" not in done.stderr
    two(tmp_path / "whole")
    two(tmp_path / "cut", ckpt_path=newest_checkpoint(tmp_path / "cut" / "checkpoints"))
    for name, value in last(tmp_path / "whole").items():
        assert torch.equal(value, last(tmp_path / "cut")[name])
