"""Two runs never share a folder, and a folder is one however it is spelled."""

import subprocess
import sys

import pytest

from experiments import prepare_feedback, run
from experiments.cli.run_lock import RANKS, is_first_process, locked_run
from lightning_modules.errors import ConfigError
from lightning_modules.folder_lock import locked_folder

CONFIG = """
trainer:
  accelerator: cpu
  max_steps: 4
  enable_progress_bar: false
  enable_model_summary: false
  logger: false
  callbacks: [{class_path: RunCheckpoint, init_args: {every_n_steps: 2}}]
model: {class_path: tiny_regression.Regression}
data: {class_path: tiny_regression.RegressionData}
"""

pytestmark = pytest.mark.filterwarnings("ignore:.*dataloader is not resumable:UserWarning")


@pytest.fixture
def start(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    for name in RANKS:
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "line.yaml").write_text(CONFIG)
    return lambda *words: run.main(["--config", "line.yaml", *words])


HOLDS = """
import sys
from pathlib import Path
from lightning_modules.folder_lock import locked_folder
with locked_folder(Path(sys.argv[1]), ""):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def held(tmp_path):
    """A process that holds the folder ``run``."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", HOLDS, str(tmp_path / "run")], text=True, **pipes) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.stdin.close()
        process.wait()


@pytest.mark.parametrize("words", [[], ["--resume=auto"]])
def test_a_second_run_in_a_folder_is_refused_in_one_line(start, tmp_path, held, words):
    message = f"^run is being written to by process {held.pid} on .*; wait for that run to end, or give"
    with pytest.raises(ConfigError, match=message):
        start("--run_dir=run", *words)
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]  # nothing was written beside it
    start("--run_dir=other", *words)


def test_the_lock_goes_with_the_run(start, tmp_path):
    cli = start("--run_dir=run")
    assert cli.trainer.global_step == 4
    assert not (tmp_path / "run" / ".lock").exists()
    with pytest.raises(ConfigError, match="already holds a run"):
        start("--run_dir=run")
    assert start("--run_dir=run", "--resume=auto", "--trainer.max_steps=6").trainer.global_step == 6
    with pytest.raises(ConfigError, match="no checkpoint in"):
        start("--run_dir=nothing", "--resume=last")
    assert not (tmp_path / "nothing").exists()


def test_only_what_writes_a_run_locks_its_folder(tmp_path, monkeypatch):
    for name in RANKS:
        monkeypatch.delenv(name, raising=False)
    for job, fills, locks in (("fit", False, True), ("test", False, True), ("fit", True, False),
                              ("validate", False, False), ("predict", False, False)):  # fmt: skip
        with locked_run(job, tmp_path, fills):
            assert (tmp_path / ".lock").exists() == locks


@pytest.mark.parametrize(
    ("environment", "first"),
    [({}, True), ({"LOCAL_RANK": "0", "NODE_RANK": "0"}, True), ({"LOCAL_RANK": "1"}, False),
     ({"LOCAL_RANK": "0", "NODE_RANK": "1"}, False), ({"RANK": "0", "LOCAL_RANK": "0"}, True),
     ({"RANK": "4", "LOCAL_RANK": "0"}, False), ({"SLURM_PROCID": "0"}, True), ({"SLURM_PROCID": "2"}, False)],
)  # fmt: skip
def test_the_first_process_of_a_run_holds_it_for_all(monkeypatch, environment, first):
    for name in RANKS:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert is_first_process() == first


def test_feedback_is_drawn_by_one_process(tmp_path, held):
    words = ["--config", "dpo_tiny", "--prompts", "p.txt", "--output", str(tmp_path / "run"), "--reward=ShapesReward"]
    with pytest.raises(ConfigError, match=f"run is being written to by process {held.pid} on .*; wait for it, or name"):
        prepare_feedback.main(words)


@pytest.mark.parametrize("spelled", ["~/runs/x", "link/../runs/x"])
def test_a_run_folder_is_one_however_it_is_spelled(start, tmp_path, monkeypatch, spelled):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "elsewhere" / "inner").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere" / "inner")
    place = tmp_path / ("home" if "~" in spelled else "elsewhere") / "runs" / "x"
    start(f"--run_dir={spelled}")
    assert (place / "checkpoints" / "last.ckpt").is_file()
    assert sorted(path.name for path in tmp_path.iterdir() if path.name not in ("home", "elsewhere")) == [
        "line.yaml", "link",
    ]  # fmt: skip
    with pytest.raises(ConfigError, match="already holds a run"):
        start(f"--run_dir={spelled}")
    assert start(f"--run_dir={spelled}", "--resume=auto", "--trainer.max_steps=6").trainer.global_step == 6
    file = f"{spelled}/checkpoints/last.ckpt"
    assert start(f"--run_dir={spelled}", f"--resume={file}", "--trainer.max_steps=8").trainer.global_step == 8
    with locked_folder(place, ""):
        pass
