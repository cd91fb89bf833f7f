"""Evaluations of an interrupted run: the due one is made, no other, and its numbers are the ones of a whole run."""

import json
import os
import signal

import pytest
import torch
from tiny_regression import Sends
from tiny_world import PROMPTS, QUICK, make, pairs, trained_parameters, trainer
from torch.multiprocessing import ProcessExitedException
from torch.utils.data import DataLoader

from callbacks.resume.checkpoint_files import AtomicCheckpointIO, newest_checkpoint
from callbacks.resume.checkpointing import RunCheckpoint
from callbacks.resume.exact_resume import ExactResume
from callbacks.resume.preemption import SIGNALS, Preemption
from callbacks.sample_grid import SampleGrid
from callbacks.win_rate import WinRate
from experiments.cli.command import run_command
from lightning_modules.policies.lora import LoRA
from lightning_modules.references import AdapterOff
from lightning_modules.rewards.base import RewardModel

TERM = signal.SIGTERM

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*dataloader is not resumable:UserWarning"),
    pytest.mark.usefixtures("handlers"),
]


class Brightness(RewardModel):
    """Mean pixel value. Gets a signal, or dies, when it is asked for the n-th time."""

    name = "brightness"

    def __init__(self, n=None, how=TERM, rank=0):
        super().__init__()
        self.n, self.how, self.rank, self.asked = n, how, rank, 0

    def score(self, images, prompts):
        self.asked += 1
        if self.asked == self.n and int(os.environ.get("LOCAL_RANK", "0")) == self.rank:
            if self.how is None:
                raise InterruptedError
            os.kill(os.getpid(), self.how)
        return images.mean(dim=(1, 2, 3))


class Judge(WinRate):
    """Counts; an evaluation takes six pictures, of the reference the first time alone, each a batch of its own."""

    def __init__(self, **options):
        settings = {"prompts": PROMPTS, "rewards": [Brightness()], "sampler": QUICK, "batch_size": 1}
        super().__init__(**(settings | {"every_n_steps": 2} | options))
        self.judged = []

    def judge(self, trainer, pl_module, split):
        metrics = super().judge(trainer, pl_module, split)
        self.judged.append(trainer.global_step)
        return metrics


class Grid(SampleGrid):
    def __init__(self):
        super().__init__(PROMPTS[:2], QUICK, every_n_steps=2)
        self.drawn = []

    def draw(self, trainer, pl_module):
        path = super().draw(trainer, pl_module)
        self.drawn.append(trainer.global_step)
        return path


def fit(pipelines, folder, *callbacks, every_n_steps=100, resume=False, steps=5, **options):
    """Every step's batch is the same, so that it doesn't matter where a plain loader begins."""
    module = make(pipelines, LoRA(), AdapterOff())
    running = trainer(
        folder, Preemption(), ExactResume(), *callbacks, RunCheckpoint(every_n_steps), max_steps=steps,
        enable_checkpointing=True, plugins=[AtomicCheckpointIO()], **options,
    )  # fmt: skip
    checkpoint = newest_checkpoint(folder / "checkpoints") if resume else None
    running.fit(module, DataLoader([next(iter(pairs(1)))] * 4, batch_size=None), ckpt_path=checkpoint)
    return torch.cat([parameter.detach().flatten() for parameter in trained_parameters(module.policy)])


def history(folder):
    return json.loads((folder / "win_rate.json").read_text())


def checkpoints(folder):
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


@pytest.fixture(scope="module")
def whole(tmp_path_factory, pipelines):
    """Grids at 0, 2, 4, 5, judged at 2, 4, 5."""
    folder, grid, judge = tmp_path_factory.mktemp("whole"), Grid(), Judge()
    weights = fit(pipelines, folder, grid, judge)
    assert (grid.drawn, judge.judged) == ([0, 2, 4, 5], [2, 4, 5])
    return weights, history(folder)


# Asked once for the reference's fingerprint in every evaluation. 1..3: policy, 4: fingerprint, 5..7: reference; 8..10:
# the policy at step 4, 11: fingerprint; 12..14: the policy at the end.
@pytest.mark.parametrize(
    ("n", "step", "where", "every_n_steps"),
    [
        (5, 2, "win rate (reference) after 1 of 3", 100),
        (9, 4, "win rate (policy) after 2 of 3", 1),
        (13, 5, "win rate (policy) after 2 of 3", 1),
        (13, 5, "win rate (policy) after 2 of 3", 100),
    ],
)
def test_an_evaluation_that_is_given_up_is_made_anew(whole, pipelines, tmp_path, capfd, n, step, where, every_n_steps):
    with pytest.raises(SystemExit) as left:
        fit(pipelines, tmp_path, Grid(), Judge(rewards=[Brightness(n)]), every_n_steps=every_n_steps)
    assert left.value.code == 143
    told = [line for line in capfd.readouterr().err.splitlines() if "gave up" in line or "stopped by" in line]
    assert told[0] == f"gave up {where} pictures; it is made again when the run resumes"
    assert told[1].startswith(f"stopped by SIGTERM at step {step}, saved in")
    grid, judge = Grid(), Judge()
    weights = fit(pipelines, tmp_path, grid, judge, resume=True)
    assert judge.judged == [at for at in (2, 4, 5) if at >= step]
    assert grid.drawn == [at for at in (2, 4, 5) if at > step]  # the grid of that step was drawn before
    assert history(tmp_path) == whole[1]
    assert torch.equal(weights, whole[0])


def test_a_checkpoint_from_before_an_evaluation_leads_to_it_and_one_from_after_does_not(whole, pipelines, tmp_path):
    """The signal comes in the batch, so that the run is left before either evaluation; then the second one fails, upon
    which the run is saved: the first one is not made again."""
    grid, judge = Grid(), Judge()
    with pytest.raises(SystemExit):
        fit(pipelines, tmp_path, grid, judge, Sends(1, TERM))
    assert (grid.drawn, judge.judged, checkpoints(tmp_path)) == ([0], [], ["last.ckpt", "step=0000002.ckpt"])
    grid, judge = Grid(), Judge(rewards=[Brightness(9, how=None)])
    with pytest.raises(InterruptedError):
        fit(pipelines, tmp_path, grid, judge, resume=True, every_n_steps=3)
    names = ["last.ckpt", "step=0000003.ckpt", "step=0000004.ckpt"]
    assert (grid.drawn, judge.judged, checkpoints(tmp_path)) == ([2, 4], [2], names)
    grid, judge = Grid(), Judge()
    weights = fit(pipelines, tmp_path, grid, judge, resume=True)
    assert (grid.drawn, judge.judged) == ([5], [4, 5])
    # Once more from the end: all is done.
    fit(pipelines, tmp_path, grid, judge, resume=True)
    assert (grid.drawn, judge.judged) == ([5], [4, 5])
    assert history(tmp_path) == whole[1]
    assert torch.equal(weights, whole[0])


def test_a_step_is_judged_once_in_a_history(whole, pipelines, tmp_path):
    """Killed after the evaluation and before a checkpoint knows of it: it comes again, in its place."""
    fit(pipelines, tmp_path, Judge(), steps=1)
    kept = (tmp_path / "checkpoints" / "last.ckpt").read_bytes()
    for _ in range(2):
        (tmp_path / "checkpoints" / "last.ckpt").unlink()  # it is the newest file's second name
        (tmp_path / "checkpoints" / "last.ckpt").write_bytes(kept)
        fit(pipelines, tmp_path, Judge(), resume=True, steps=2)
    assert [(entry["split"], entry["step"]) for entry in history(tmp_path)] == [("val", 1), ("val", 2)]
    assert history(tmp_path)[1] == whole[1][0]


def test_ranks_give_up_together_though_they_have_unequally_many_pictures(whole, pipelines, tmp_path, capfd):
    """Of three pictures rank 1 has one, and gets the signal with it; rank 0 has two rounds."""
    options = {"devices": 2, "strategy": "ddp_fork"}
    with pytest.raises(ProcessExitedException, match="exit code 143"):
        fit(pipelines, tmp_path, Judge(rewards=[Brightness(1, rank=1)]), **options)
    assert capfd.readouterr().err.count("gave up win rate (policy) after 2 of 3 pictures") == 1
    fit(pipelines, tmp_path, Judge(), resume=True, **options)
    assert [entry["step"] for entry in history(tmp_path)] == [2, 4, 5]
    assert history(tmp_path)[0]["policy"]["brightness"]["mean"] == pytest.approx(
        whole[1][0]["policy"]["brightness"]["mean"], abs=1e-3
    )


def test_a_test_job_ends_at_once_and_leaves_nothing_half_written(pipelines, tmp_path):
    def main():
        module, judge = make(pipelines, LoRA(), AdapterOff()), Judge(rewards=[Brightness(2)], test_prompts=PROMPTS)
        trainer(tmp_path, judge).test(module, DataLoader([0]), verbose=False)

    former = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        with pytest.raises(SystemExit) as left:
            run_command(main)
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
    assert left.value.code == 143
    assert list(tmp_path.iterdir()) == []
