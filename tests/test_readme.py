"""What README and docs tell a reader to type works, and what they link to is there."""

import re
import shlex
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from pairs_data import write_shards
from PIL import Image

from experiments import compare, encode_prompts, evaluate, label, prepare_pairs, prepare_pickapic, prepare_prompts, run
from experiments.cli.compose import find_config

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = {path.relative_to(ROOT): path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md"))}
PAGES[Path("README.md")] = README
TEXT = "\n".join(PAGES.values())


def commands(name: str) -> list[str]:
    return sorted(set(re.findall(rf"^ +python -m experiments\.{name} (.*)$", TEXT, re.MULTILINE)))


NAMED = [command for command in commands("run") if not command.startswith("[") and "my_objectives" not in command]


def test_the_readme_is_short():
    assert len(README.splitlines()) < 200


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_every_link_leads_to_a_file(page):
    links = re.findall(r"\]\(([^)#\s]+)\)", PAGES[page])
    assert [link for link in links if ":" not in link and not (ROOT / page.parent / link).exists()] == []


def test_every_page_is_linked():
    linked = {
        (ROOT / page.parent / link).resolve()
        for page in PAGES
        for link in re.findall(r"\]\(([^)#\s:]+)\)", PAGES[page])
    }
    assert [page for page in PAGES if (ROOT / page).resolve() not in linked and page != Path("README.md")] == []


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


def test_every_other_command_parses():
    for command in (prepare_pickapic, prepare_pairs, prepare_prompts, encode_prompts, compare, evaluate, label):
        named = commands(command.__name__.removeprefix("experiments."))
        assert named, command
        for words in named:
            assert command._parser().parse_args(shlex.split(words))


def test_the_objective_of_the_readme_trains(tmp_path, monkeypatch):
    """From a file outside the packages, named on the command line as the README does."""
    source = re.search(r"```python\n# my_objectives\.py\n(.*?)```", TEXT, re.DOTALL).group(1)
    (tmp_path / "my_objectives.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    command = next(command for command in commands("run") if "my_objectives" in command)
    shards = write_shards(tmp_path / "shards", [8], (32, 32))
    settings = [f"--run_dir={tmp_path / 'run'}", f"--data.shards={shards}", "--data.batch_size=4"]
    settings += ["--trainer.max_steps=1", "--trainer.callbacks=[]", "--trainer.enable_progress_bar=false"]
    cli = run.main([*shlex.split(command), *settings])
    assert type(cli.model.objective).__name__ == "ErrorMargin"
    assert cli.trainer.global_step == 1
    assert torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 1


def test_own_pairs_become_a_lora_that_plain_diffusers_loads(tmp_path, monkeypatch):
    """The README's section, from its table to the picture; fewer steps and no evaluation."""
    monkeypatch.chdir(tmp_path)
    section = README[README.index("## Train on your own pairs") : README.index("## Train as the papers")]
    table = re.search(r"((?:^    .*,.*\n)+)", section, re.MULTILINE).group(1)
    for name in re.findall(r"\w+\.png", table):
        Image.new("RGB", (40, 32), (200, 30, 10) if "good" in name else (10, 30, 200)).save(name)
    Path("choices.csv").write_text(re.sub("^    ", "", table, flags=re.MULTILINE))
    prepare, train = re.findall(r"^    python -m experiments\.(\w+ .*)$", section, re.MULTILINE)
    prepare_pairs.main(shlex.split(prepare)[1:])
    few = ["--trainer.max_steps=2", "--trainer.callbacks=[{class_path: ExportPolicy}]"]
    run.main([*shlex.split(train)[1:], *few])
    pipe = StableDiffusionPipeline.from_pretrained(ROOT / "experiments" / "embedded" / "shapes")
    pipe.load_lora_weights("runs/mine/export/step=0000002")
    assert pipe.unet.peft_config
