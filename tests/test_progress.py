"""How far long work is: what a log and a terminal show, and what a run says at its end."""

import io
import re

import pytest
import torch
from tiny_world import make, pairs, trainer

from callbacks.run_progress import RunProgress, trained_share
from experiments.cli.closing import print_closing
from lightning_modules import progress
from lightning_modules.policies.lora import LoRA
from lightning_modules.progress import Work, tracked
from lightning_modules.references import AdapterOff


class Clock:
    """Stands still until a test moves it."""

    def __init__(self) -> None:
        self.seconds = 100.0

    def monotonic(self) -> float:
        return self.seconds


@pytest.fixture
def clock(monkeypatch):
    found = Clock()
    monkeypatch.setattr(progress, "time", found)
    return found


def lines(capsys):
    return capsys.readouterr().err.splitlines()


def test_a_log_gets_a_line_per_interval_and_asks_for_details_only_then(clock, capsys):
    asked = []

    def details():
        asked.append(clock.seconds)
        return "loss 0.5"

    with Work("step", 100) as work:
        for _ in range(70):
            clock.seconds += 1
            work.advance(details=details)
    assert lines(capsys) == [
        "step 30 of 100, 0:00:30 so far, 0:01:10 left, loss 0.5",
        "step 60 of 100, 0:01:00 so far, 0:00:40 left, loss 0.5",
    ]
    assert asked == [130.0, 160.0]


def test_the_first_line_comes_with_the_first_part_where_it_is_asked_for(clock, capsys):
    with Work("step", 4, first_line=True) as work:
        for _ in range(2):
            clock.seconds += 2
            work.advance()
    assert lines(capsys) == ["step 1 of 4, 0:00:02 so far, 0:00:06 left"]


def test_items_are_counted_when_they_are_done(clock, capsys):
    for n in tracked([3, 4, 5], "piece"):
        clock.seconds += n
    assert lines(capsys) == ["piece 1 of 3, 0:00:03 so far, 0:00:06 left"]
    for _ in tracked([31, 31], "piece"):
        clock.seconds += 31
    assert [line.split(",")[0] for line in lines(capsys)] == ["piece 1 of 2", "piece 2 of 2"]


def test_what_an_earlier_start_did_counts_as_done_but_not_for_the_speed(clock, capsys):
    work = Work("step", 100, done=80, first_line=True)
    clock.seconds += 10
    work.advance(10)
    assert lines(capsys) == ["step 90 of 100, 0:00:10 so far, 0:00:10 left"]


def test_without_a_total_nothing_is_promised(clock, capsys):
    work = Work("step", None, first_line=True)
    clock.seconds += 10
    work.advance()
    assert lines(capsys) == ["step 1, 0:00:10 so far"]


def test_what_is_not_shown_prints_nothing(clock, capsys):
    work = Work("step", 2, shown=False, first_line=True)
    clock.seconds += 100
    work.advance()
    work.close()
    assert lines(capsys) == []
    assert work.done == 1


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_one_bar_of_the_whole_run(monkeypatch, clock):
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    with Work("step", 200, done=50, keep=True) as work:
        clock.seconds += 60
        work.advance(100, lambda: "loss 0.5")
        work._bar.refresh()
        Work.write("a line beside it")
    shown = terminal.getvalue()
    assert "step 50/200" in shown
    assert "step 150/200" in shown
    assert "loss 0.5" in shown
    assert "a line beside it\n" in shown


def told_by(tmp_path, pipelines, capsys, batches=6, **options):
    module = make(pipelines, LoRA(), AdapterOff())
    capsys.readouterr()
    with_bar = trainer(tmp_path, RunProgress(), enable_progress_bar=True, log_every_n_steps=1, **options)
    with_bar.fit(module, pairs(batches))
    return [line for line in lines(capsys) if line.startswith(("step", "validation", "trains"))]


def test_a_run_counts_its_optimizer_steps(tmp_path, pipelines, capsys, monkeypatch):
    monkeypatch.setattr(progress, "INTERVAL", 0.0)
    told = told_by(tmp_path, pipelines, capsys, max_steps=5, accumulate_grad_batches=2)  # two epochs
    assert told[0].startswith("trains ")
    assert [line.split(",")[0] for line in told[1:]] == [f"step {n} of 5" for n in range(1, 6)]
    assert re.search(r", [\d.e+]+ pairs/s, loss [\d.]+, accuracy [\d.]+$", told[1])


def test_steps_of_epochs_are_counted_together(tmp_path, pipelines, capsys):
    (_, first) = told_by(tmp_path, pipelines, capsys, max_epochs=2)
    assert first.startswith("step 1 of 12,")


def test_pairs_per_second_are_those_of_all_batches(tmp_path, pipelines, capsys, monkeypatch, clock):
    def half_a_second(*args):
        clock.seconds += 0.5

    monkeypatch.setattr(RunProgress, "on_train_batch_start", half_a_second)
    (_, first) = told_by(tmp_path, pipelines, capsys, max_steps=2, accumulate_grad_batches=3)
    assert first.startswith("step 1 of 2, 0:00:02 so far, 0:00:02 left, 4 pairs/s, loss")  # 3 batches of 2 in 1.5 s


def test_other_ranks_print_nothing(capsys):
    bar = RunProgress()
    bar.disable()
    bar.print("word")
    bar._begin("step", 5, first_line=True)
    bar._running[-1].advance()
    assert lines(capsys) == ["word"]


def test_of_all_numbers_the_trained_ones_are_told():
    module = torch.nn.Sequential(torch.nn.Linear(1000, 999), torch.nn.Linear(1000, 3000))
    module[0].requires_grad_(False)
    assert trained_share(module) == "trains 3 million of 4 million numbers"


def test_a_run_folder_tells_where_its_results_are(tmp_path, capsys):
    for name in ("export/step=0000010/unet", "export/step=0000020", "samples", "checkpoints"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "export/step=0000010/unet/config.json").write_text('{"_class_name": "UNet2DConditionModel"}')
    (tmp_path / "csv/version_1").mkdir(parents=True)
    (tmp_path / "csv/version_1/metrics.csv").touch()
    (tmp_path / "events.out.tfevents.1.host").touch()
    for name in ("samples/step=0000010.png", "samples/step=0000020.png", "checkpoints/last.ckpt", "win_rate.json"):
        (tmp_path / name).touch()
    print_closing(tmp_path, 20, 100)
    told = capsys.readouterr().out
    assert told.startswith(f"{tmp_path}: step 20 of 100\n")
    assert f'pipe.load_lora_weights("{tmp_path}/export/step=0000020")' in told
    assert f"tensorboard --logdir {tmp_path}\n" in told
    for name in ("samples/step=0000020.png", "win_rate.json", "checkpoints/last.ckpt", "csv/version_1/metrics.csv"):
        assert f"{tmp_path}/{name}" in told
    (tmp_path / "export/step=0000020").rmdir()
    print_closing(tmp_path, 20, -1)
    told = capsys.readouterr().out
    assert told.startswith(f"{tmp_path}: step 20\n")
    assert (
        f'pipe.unet = UNet2DConditionModel.from_pretrained("{tmp_path}/export/step=0000010", subfolder="unet")' in told
    )


def test_an_empty_run_folder_promises_nothing(tmp_path, capsys):
    print_closing(tmp_path, 0, 5)
    assert capsys.readouterr().out.splitlines() == [f"{tmp_path}: step 0 of 5"]
