"""What the README tells a reader to type works."""

import re
import shlex
from pathlib import Path

import pytest
import torch
from pairs_data import write_shards

from experiments import prepare_pickapic, run
from experiments.cli.compose import find_config

README = (Path(__file__).parent.parent / "README.md").read_text()
COMMANDS = sorted(set(re.findall(r"^    python -m experiments\.run (.*)$", README, re.MULTILINE)))
NAMED = [command for command in COMMANDS if "[" not in command and "my_objectives" not in command]


@pytest.fixture
def begun(tmp_path, monkeypatch):
    """The folder in which a reader has started the run that later commands name."""
    (tmp_path / "runs" / "dpo" / "checkpoints").mkdir(parents=True)
    (tmp_path / "runs" / "dpo" / "checkpoints" / "last.ckpt").touch()
    (tmp_path / "runs" / "dpo" / "config.yaml").write_text(find_config("dpo_sd15").read_text())
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("command", NAMED)
def test_every_run_command_parses(capsys, begun, command):
    """Every setting exists and has the right type; nothing is built."""
    with pytest.raises(SystemExit) as exit_of:
        run.main([*shlex.split(command), "--print_config"])
    assert exit_of.value.code in (0, None)
    assert "class_path: lightning_modules." in capsys.readouterr().out


def test_every_preparation_command_parses(monkeypatch):
    commands = re.findall(r"^    python -m experiments\.prepare_pickapic (.*)$", README, re.MULTILINE)
    assert len(commands) == 2
    for command in commands:
        assert prepare_pickapic._parser().parse_args(shlex.split(command)).output


def test_the_objective_of_the_readme_trains(tmp_path, monkeypatch):
    """From a file outside the packages, named on the command line as the README does."""
    source = re.search(r"```python\n# my_objectives\.py\n(.*?)```", README, re.DOTALL).group(1)
    (tmp_path / "my_objectives.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    command = next(command for command in COMMANDS if "my_objectives" in command)
    shards = write_shards(tmp_path / "shards", [8], (32, 32))
    settings = [f"--run_dir={tmp_path / 'run'}", f"--data.shards={shards}", "--data.batch_size=4"]
    settings += ["--trainer.max_steps=1", "--trainer.callbacks=[]", "--trainer.enable_progress_bar=false"]
    cli = run.main([*shlex.split(command), *settings])
    assert type(cli.model.objective).__name__ == "ErrorMargin"
    assert cli.trainer.global_step == 1
    assert torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 1
