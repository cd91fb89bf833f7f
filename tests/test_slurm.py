"""The job scripts: a run that SLURM interrupts ends as if it had not been, bit for bit.

Always with stand-ins for ``srun`` and ``scontrol``; and, with ``pytest -m slurm`` as root, with a real SLURM of this
one machine, which tests/slurm/setup.sh installs and starts.
"""

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
from pairs_data import write_shards

from experiments import run
from experiments.cli.command import run_command

ROOT = Path(__file__).parents[1]
SCRIPTS = ROOT / "experiments" / "slurm"
SLURM = ROOT / "tests" / "slurm"
STOPPED = 128 + signal.SIGUSR1
PATIENCE = 600  # seconds for one process, which take 15 on a machine that does nothing else

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*dataloader is not resumable:UserWarning"),
    pytest.mark.timeout(4 * PATIENCE),
]

BASE = """
seed_everything: 7
trainer:
  accelerator: cpu
  {trainer}
  limit_val_batches: 0
  log_every_n_steps: 1
  enable_progress_bar: false
  enable_model_summary: false
  callbacks:
    - {{class_path: RunCheckpoint, init_args: {{every_n_steps: 1000}}}}
    - {{class_path: slurm_probe.LossRecord}}
model:
  class_path: AlignmentModule
  init_args:
    policy: {{class_path: StableDiffusion, init_args: {{pretrained: {pipelines}/tiny-sd15, adaptation: LoRA}}}}
    objective: {objective}
    reference: AdapterOff
    optimizer: {{class_path: AdamW, init_args: {{lr: 1.0e-3}}}}
    caption_dropout: 0.3
    seed: 7
"""

PAIRS = """
data:
  class_path: PreferencePairsDataModule
  init_args: {{shards: {shards}, batch_size: 4, resolution: 16, num_workers: 1, seed: 7}}
"""

POOLS = """
data:
  class_path: StepPoolDataModule
  init_args:
    prompts: [a cat, a dog, the sea, a red house]
    sampler: {steps: 5, branch_from_step: 1, candidates: 2, threshold: 0.01, guidance_scale: 2.0}
    scorer: RandomScorer
    prompts_per_pool: 24
    prompts_per_batch: 1
    batch_size: 4
    keep_pools: true
    seed: 7
"""


@pytest.fixture(scope="module")
def dpo(tmp_path_factory, pipelines):
    """A training on pairs, 60 batches, and the folder of its uninterrupted run."""
    home = tmp_path_factory.mktemp("dpo")
    shards = write_shards(home / "shards", [7, 6], (16, 16))
    objective = "{class_path: DPO, init_args: {beta: 100.0}}"
    base = BASE.format(pipelines=pipelines, trainer="max_steps: 60", objective=objective)
    (home / "dpo.yaml").write_text(base + PAIRS.format(shards=shards))
    return home / "dpo.yaml", run_here("--config", str(home / "dpo.yaml"), "--run_dir", str(home / "whole"))


@pytest.fixture(scope="module")
def spo(tmp_path_factory, pipelines):
    """A training on one pool of 24 chunks, and the folder of its uninterrupted run."""
    home = tmp_path_factory.mktemp("spo")
    trainer = "max_epochs: 1\n  reload_dataloaders_every_n_epochs: 1"
    objective = "{class_path: SPO, init_args: {eta: 1.0, guidance_scale: 2.0}}"
    (home / "spo.yaml").write_text(BASE.format(pipelines=pipelines, trainer=trainer, objective=objective) + POOLS)
    return home / "spo.yaml", run_here("--config", str(home / "spo.yaml"), "--run_dir", str(home / "whole"))


def run_here(*words):
    """Run the command in this process, which spares its imports; returns the run folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SLURM))
        for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
            patch.setenv(name, "0")  # what a run does to them is undone
        return run.main(words).run_dir


def ended(folder):
    """Final weights and every batch's loss."""
    checkpoint = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    return checkpoint["state_dict"], (folder / "losses.txt").read_text().split()


def assert_same(folder, whole, batches):
    (weights, losses), (expected, expected_losses) = ended(folder), ended(whole)
    assert len(expected_losses) == batches
    assert losses == expected_losses
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    assert any(value.abs().max() > 1e-3 for name, value in expected.items() if "lora_B" in name)  # B starts at 0


def wait_until(condition, tell, every=0.01):
    deadline = time.monotonic() + PATIENCE
    while not (result := condition()):
        assert time.monotonic() < deadline, f"not within {PATIENCE} s: {tell()}"
        time.sleep(every)
    return result


# ------------------------------------------------------------------------------------- with stand-ins


class Job:
    """A job whose script this process runs, with stand-ins on PATH, in the variables that sbatch sets."""

    def __init__(self, folder, script, *words, job=4711, **variables):
        self.folder, self.script, self.words = folder, script, words
        folder.mkdir()
        (folder / "scontrol").touch()
        (folder / "state").write_text("RUNNING")
        # Not what a trainer that ran before in this process has left.
        clean = {name: value for name, value in os.environ.items() if name not in ("MASTER_ADDR", "MASTER_PORT")}
        self.environment = clean | {
            "PATH": f"{SLURM / 'bin'}:{os.environ['PATH']}", "PYTHON": sys.executable, "STAND_IN": str(folder),
            "PYTHONPATH": f"{ROOT}:{SLURM}", "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive",
            "SLURM_JOB_ID": str(job), "SLURM_JOB_NAME": "train", "SLURM_JOB_NODELIST": "here", "SLURM_NODELIST": "here",
            "SLURM_NNODES": "1", "SLURM_NTASKS": "1", "SLURM_NTASKS_PER_NODE": "1", "SLURM_CPUS_PER_TASK": "1",
        } | variables  # fmt: skip
        self.starts = 0

    def run(self, strike=None):
        """Run the script; as soon as ``strike`` is true, signal the step as SLURM does. Returns its status."""
        (self.folder / "pid").unlink(missing_ok=True)
        restarts = {"SLURM_RESTART_COUNT": str(self.starts)} if self.starts else {}
        self.starts += 1
        with (self.folder / "output").open("a") as output:
            process = subprocess.Popen(
                ["bash", str(SCRIPTS / self.script), *self.words],
                env=self.environment | restarts, stdout=output, stderr=output, start_new_session=True,
            )  # fmt: skip
        try:
            if strike is not None:
                wait_until(lambda: process.poll() is not None or strike(), self.output)
                assert process.poll() is None, self.output()
                os.kill(int((self.folder / "pid").read_text()), signal.SIGUSR1)
            return process.wait(PATIENCE)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()

    def output(self):
        return (self.folder / "output").read_text()

    @property
    def requeued(self):
        return [line for line in (self.folder / "scontrol").read_text().splitlines() if line.startswith("requeue")]


def test_a_training_that_slurm_interrupts_ends_as_if_it_had_not(tmp_path, dpo):
    config, whole = dpo
    cut = tmp_path / "cut"
    job = Job(tmp_path / "job", "train.sbatch", "--config", str(config), "--run_dir", str(cut))
    losses = cut / "losses.txt"
    assert job.run(lambda: losses.exists() and losses.read_text().count("\n") >= 5) == STOPPED, job.output()
    assert job.requeued == ["requeue 4711"]
    done = losses.read_text().count("\n")
    assert 5 <= done < 60
    checkpoint = torch.load(cut / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == done

    assert job.run() == 0, job.output()
    assert job.requeued == ["requeue 4711"]
    assert_same(cut, whole, 60)
    assert re.findall(r"^job 4711, start (\d)", job.output(), re.MULTILINE) == ["1", "2"]


def test_an_array_that_slurm_interrupts_fills_the_pool_that_the_training_wants(tmp_path, spo):
    config, whole = spo
    cut = tmp_path / "cut"
    array = {"SLURM_ARRAY_JOB_ID": "4000", "SLURM_ARRAY_TASK_ID": "0", "SLURM_ARRAY_TASK_COUNT": "1",
             "SLURM_ARRAY_TASK_MIN": "0", "SLURM_ARRAY_TASK_MAX": "0"}  # fmt: skip
    job = Job(tmp_path / "job", "pool_array.sbatch", "--config", str(config), "--run_dir", str(cut), **array)
    assert job.run(lambda: len(list(cut.glob("pools/*/*.tar"))) >= 3) == STOPPED, job.output()
    assert job.requeued == ["requeue 4000_0"]
    first = {shard: shard.stat().st_mtime_ns for shard in cut.glob("pools/*/*.tar")}
    assert 3 <= len(first) < 24

    assert job.run() == 0, job.output()
    assert job.requeued == ["requeue 4000_0"]
    every = {shard: shard.stat().st_mtime_ns for shard in cut.glob("pools/*/*.tar")}
    assert len(every) == 24
    assert first.items() <= every.items()  # none was sampled again
    assert not (cut / "losses.txt").exists()  # nothing was trained

    run_here("--config", str(config), "--run_dir", str(cut), "--ckpt_path", "auto")
    assert every == {shard: shard.stat().st_mtime_ns for shard in cut.glob("pools/*/*.tar")}
    assert_same(cut, whole, len((cut / "losses.txt").read_text().split()))


def test_a_signal_that_the_script_ignores_is_ignored_until_the_training_listens():
    former = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    try:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGUSR1, signal.SIG_DFL)
        run_command(lambda: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(SystemExit):
            run_command(lambda: os.kill(os.getpid(), signal.SIGUSR1))
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


def test_an_array_must_count_from_zero(tmp_path):
    array = {"SLURM_ARRAY_JOB_ID": "4000", "SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_TASK_COUNT": "8",
             "SLURM_ARRAY_TASK_MIN": "1", "SLURM_ARRAY_TASK_MAX": "8"}  # fmt: skip
    job = Job(tmp_path / "job", "pool_array.sbatch", "--config", "spo_sd15", **array)
    assert job.run() == 2
    assert job.output() == "error: --array must be 0-(n-1), got 1-8 of 8\n"


def test_several_nodes_agree_on_an_address(tmp_path):
    """The words that each process gets, and its variables; two nodes need a real SLURM."""
    nodes = {"SLURM_JOB_NODELIST": "a7,b2", "SLURM_NNODES": "2", "SLURM_NTASKS": "8", "SLURM_NTASKS_PER_NODE": "4"}
    show = tmp_path / "show"
    show.write_text('#!/bin/bash\necho "$MASTER_ADDR $MASTER_PORT $*"\n')
    show.chmod(0o755)
    job = Job(tmp_path / "job", "train_multinode.sbatch", "--config", "a b", job=30004711, **nodes)
    job.environment |= {"PYTHON": str(show)}
    assert job.run() == 0
    words = "-m experiments.run --config a b --trainer.devices=4 --trainer.num_nodes=2 --resume auto"
    assert job.output().splitlines()[1:] == [f"a7 16711 {words}"]


@pytest.mark.parametrize("script", sorted(SCRIPTS.glob("*.sbatch")), ids=lambda path: path.name)
def test_each_script_can_be_requeued_and_warns_its_processes_before_the_limit(script):
    text = script.read_text()
    subprocess.run(["bash", "-n", str(script)], check=True)
    options = set(re.findall(r"^#SBATCH (\S+)$", text, re.MULTILINE))
    assert {"--requeue", "--open-mode=append", "--signal=USR1@120"} <= options
    # SLURM reads no option after the first command.
    assert "#SBATCH" not in text[text.index("\nset -euo") :]
    asked = dict(option.split("=", 1) for option in options if "=" in option)
    assert asked["--ntasks-per-node"] == asked["--gpus-per-node"]
    assert f"  {script.name} --config" in text or f" {script.name} --config" in text


# ------------------------------------------------------------------------------------- with a real SLURM


OVER = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")


class Cluster:
    """SLURM's commands, for the cluster whose files are in a folder."""

    def __init__(self, folder):
        self.environment = os.environ | {
            "SLURM_CONF": str(folder / "slurm.conf"), "PYTHON": sys.executable, "PYTHONPATH": f"{ROOT}:{SLURM}",
            "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "PROBE_SECONDS": "1",
        }  # fmt: skip

    def ask(self, *words, check=True):
        done = subprocess.run(words, env=self.environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0 or not check, f"{words}: {done.stderr}"
        return done.stdout.strip()

    def submit(self, output, script, *words, options=()):
        """Returns the job's id."""
        own = ["--parsable", "--cpus-per-task=1", f"--output={output}", "--time=60", *options]
        return self.ask("sbatch", *own, str(SCRIPTS / script), *words)

    def show(self, job, field):
        found = re.search(rf"\b{field}=(\S+)", self.ask("scontrol", "show", "job", "--oneliner", job))
        assert found is not None
        return found[1]

    def wait(self, condition):
        return wait_until(condition, lambda: self.ask("squeue"), every=0.5)

    def wait_for_restart(self, job):
        """Until it is back in the queue for the first time; a new start needn't wait for two minutes then."""
        self.wait(lambda: self.show(job, "Restarts") == "1" or self.show(job, "JobState") in OVER)
        assert self.show(job, "Restarts") == "1", self.show(job, "JobState")
        self.wait(lambda: self.show(job, "JobState") == "PENDING")
        self.ask("scontrol", "update", f"JobId={job}", "StartTime=now", "TimeLimit=60")

    def wait_for_end(self, job):
        return self.wait(lambda: state if (state := self.show(job, "JobState")) in OVER else None)


@pytest.fixture(scope="module")
def cluster():
    with tempfile.TemporaryDirectory(prefix="slurm-", dir="/tmp") as folder:  # a socket's path must be short
        setup = [str(SLURM / "setup.sh")]
        subprocess.run([*setup, "start", folder], check=True)
        try:
            yield Cluster(Path(folder))
        finally:
            subprocess.run([*setup, "stop", folder], check=True)


class RealJob:
    """A submitted training that has trained on some batches."""

    def __init__(self, cluster, folder, config, *options, script="train.sbatch", words=()):
        self.cluster, self.folder, self.printed = cluster, folder / "run", folder / "output"
        words = ["--config", str(config), "--run_dir", str(self.folder), *words]
        self.id = cluster.submit(self.printed, script, *words, options=options)
        cluster.wait(lambda: self.batches >= 3 or cluster.show(self.id, "JobState") in OVER)
        assert self.batches >= 3, self.output()

    @property
    def batches(self):
        losses = self.folder / "losses.txt"
        return losses.read_text().count("\n") if losses.exists() else 0

    def output(self):
        return self.printed.read_text() if self.printed.exists() else "nothing"


@pytest.mark.slurm
@pytest.mark.parametrize(("warning", "heard"), [("USR1@10", "SIGUSR1"), ("CONT@10", "SIGTERM")])
def test_time_limit_requeue_and_end_in_a_real_slurm(cluster, tmp_path, dpo, monkeypatch, warning, heard):
    """With the script's warning before the limit, and with one that says nothing, which leaves SLURM's KillWait."""
    config, whole = dpo
    monkeypatch.setitem(cluster.environment, "PROBE_SECONDS", "3")  # the limit comes within 2.5 minutes
    job = RealJob(cluster, tmp_path, config, f"--signal={warning}")
    # As a time limit of minutes, but that it doesn't matter how long the start took.
    hours, minutes, _ = (int(part) for part in cluster.show(job.id, "RunTime").split(":"))
    cluster.ask("scontrol", "update", f"JobId={job.id}", f"TimeLimit={hours * 60 + minutes + 2}")
    cluster.wait_for_restart(job.id)
    assert f"requeued SLURM job {job.id}" in job.output()
    assert f"stopped by {heard}" in job.output()
    assert 3 <= job.batches < 60
    assert cluster.wait_for_end(job.id) == "COMPLETED", job.output()
    assert_same(job.folder, whole, 60)
    assert cluster.show(job.id, "Restarts") == "1"


@pytest.mark.slurm
@pytest.mark.parametrize("partition", ["low", "patient"])
def test_preemption_requeue_and_end_in_a_real_slurm(cluster, tmp_path, dpo, partition):
    config, whole = dpo
    job = RealJob(cluster, tmp_path, config, f"--partition={partition}")
    cluster.ask("sbatch", "--partition=high", "--output=/dev/null", "--wrap=sleep 1")
    cluster.wait_for_restart(job.id)
    assert "stopped by SIGTERM" in job.output()
    # Without time to leave, SLURM has requeued the job itself before it tells it.
    told = f"requeued SLURM job {job.id}" if partition == "patient" else "not requeued by this run"
    assert told in job.output()
    assert 3 <= job.batches < 60
    assert cluster.wait_for_end(job.id) == "COMPLETED", job.output()
    assert_same(job.folder, whole, 60)


@pytest.mark.slurm
def test_a_cancelled_job_saves_and_stays_cancelled_in_a_real_slurm(cluster, tmp_path, dpo):
    config, _ = dpo
    job = RealJob(cluster, tmp_path, config)
    cluster.ask("scancel", job.id)
    assert cluster.wait_for_end(job.id) == "CANCELLED"
    assert cluster.show(job.id, "Restarts") == "0"
    assert "not requeued by this run" in job.output()
    checkpoint = torch.load(job.folder / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == job.batches


@pytest.mark.slurm
def test_a_preemption_while_python_starts_loses_nothing_in_a_real_slurm(cluster, tmp_path, monkeypatch):
    """SLURM warns a job that cannot hear yet; it must not end as failed, which nobody would start again."""
    show = tmp_path / "python"
    show.write_text("#!/bin/bash\necho started >> $0.starts\nsleep 5\n")
    show.chmod(0o755)
    monkeypatch.setitem(cluster.environment, "PYTHON", str(show))
    job = cluster.submit(tmp_path / "output", "train.sbatch", options=["--partition=patient"])
    starts = tmp_path / "python.starts"
    cluster.wait(starts.exists)
    step = f"{job}.0"
    cluster.ask("scancel", "--signal=TERM", step)
    cluster.ask("scancel", "--signal=USR1", step)
    assert cluster.wait_for_end(job) == "COMPLETED", (tmp_path / "output").read_text()


@pytest.mark.slurm
def test_an_array_fills_a_pool_and_the_training_waits_for_it_in_a_real_slurm(cluster, tmp_path, spo):
    config, whole = spo
    words = ["--config", str(config), "--run_dir", str(tmp_path / "run")]
    fill = cluster.submit(tmp_path / "fill-%a", "pool_array.sbatch", *words, options=["--array=0-1"])
    after = [f"--dependency=afterok:{fill}", "--kill-on-invalid-dep=yes"]
    job = cluster.submit(tmp_path / "train", "train.sbatch", *words, options=after)
    cluster.wait(lambda: list(tmp_path.glob("run/pools/*/*.tar")))
    cluster.ask("sbatch", "--partition=high", "--output=/dev/null", "--wrap=sleep 1")
    cluster.wait_for_restart(f"{fill}_0")
    assert cluster.wait_for_end(job) == "COMPLETED", (tmp_path / "train").read_text()
    assert "Pool" not in (tmp_path / "train").read_text()
    assert_same(tmp_path / "run", whole, len((whole / "losses.txt").read_text().split()))


@pytest.mark.slurm
def test_two_nodes_leave_together_and_go_on_exactly_in_a_real_slurm(cluster, tmp_path, dpo, monkeypatch):
    config, _ = dpo
    monkeypatch.setitem(cluster.environment, "MASTER_ADDR", "127.0.0.1")  # the nodes' names are those of no host
    options = ["--partition=pair", "--ntasks-per-node=1", "--gpus-per-node=1"]
    both = {"script": "train_multinode.sbatch", "words": ["--data.batch_size=2"]}
    (tmp_path / "whole").mkdir()
    (tmp_path / "cut").mkdir()
    whole = RealJob(cluster, tmp_path / "whole", config, *options, **both)
    assert cluster.wait_for_end(whole.id) == "COMPLETED", whole.output()
    cut = RealJob(cluster, tmp_path / "cut", config, *options, **both)
    cluster.ask("scancel", "--signal=USR1", f"{cut.id}.0")  # as SLURM does before the time limit
    cluster.wait_for_restart(cut.id)
    assert cut.output().count(f"requeued SLURM job {cut.id}") == 1
    assert 3 <= cut.batches < 60
    assert cluster.wait_for_end(cut.id) == "COMPLETED", cut.output()
    assert_same(cut.folder, whole.folder, 60)
