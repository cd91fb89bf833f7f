"""Two processes with half the batch each do what one does with the whole, and where one fails both end."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from kill_harness import Order
from pairs_data import write_shards
from picture_data import write_both
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from datamodules.single_pictures import SinglePicturesDataModule
from experiments import run
from lightning_modules.errors import ConfigError

CONFIG = """
seed_everything: 7
trainer:
  accelerator: cpu
  strategy: {strategy}
  devices: {devices}
  max_steps: 3
  log_every_n_steps: 1
  limit_val_batches: 0
  enable_progress_bar: false
  callbacks:
    - class_path: WinRate
      init_args:
        prompts: [one, two, three]
        rewards: [{{class_path: PickScore, init_args: {{pretrained: {pipelines}/tiny-pickscore, processor: null}}}}]
        sampler: {{class_path: Sampler, init_args: {{steps: 2}}}}
    - class_path: SampleGrid
      init_args: {{prompts: [one, two], every_n_steps: 3, sampler: {{class_path: Sampler, init_args: {{steps: 2}}}}}}
    - class_path: ExportPolicy
    - class_path: Cost
model:
  class_path: AlignmentModule
  init_args:
    policy: {{class_path: StableDiffusion, init_args: {{pretrained: {pipelines}/tiny-sd15, adaptation: LoRA}}}}
    objective: {{class_path: DPO, init_args: {{beta: 100.0}}}}
    reference: AdapterOff
    optimizer: {{class_path: torch.optim.SGD, init_args: {{lr: 1.0}}}}
    caption_dropout: 0.3
    seed: ${{seed_everything}}
data:
  class_path: PreferencePairsDataModule
  init_args: {{shards: {shards}, batch_size: {batch_size}, resolution: 64, seed: 7}}
"""

DDP = "{class_path: lightning.pytorch.strategies.DDPStrategy, init_args: {timeout: '0:20:00'}}"


def train(harness, folder, name, pipelines, shards, devices, batch_size):
    """Run the command, each rank a process, and return its checkpoint."""
    strategy = DDP if devices > 1 else "auto"
    settings = {"strategy": strategy, "devices": devices, "batch_size": batch_size}
    config = folder / f"{name}.yaml"
    config.write_text(CONFIG.format(pipelines=pipelines, shards=shards, **settings))
    words = ["--config", str(config), "--run_dir", str(folder / name)]
    log = folder / f"{name}.log"
    outcome = harness.run(Order(words, str(log), str(folder / name), ranks=devices))
    assert list(outcome.codes) == [0] * devices, log.read_text()[-3000:]
    return torch.load(folder / name / "checkpoints" / "last.ckpt", weights_only=True)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory, pipelines, harness):
    folder = tmp_path_factory.mktemp("ddp")
    shards = write_shards(folder / "shards", [7, 6])
    return (
        folder,
        train(harness, folder, "one", pipelines, shards, devices=1, batch_size=4),
        train(harness, folder, "two", pipelines, shards, devices=2, batch_size=2),
    )


def test_two_processes_learn_what_one_process_learns(checkpoints):
    _, one, two = checkpoints
    assert one["global_step"] == two["global_step"] == 3
    changed = 0.0
    for name, value in one["state_dict"].items():
        torch.testing.assert_close(two["state_dict"][name], value, rtol=0, atol=1e-5)
        changed = max(changed, value.abs().max().item() if "lora_B" in name else 0.0)
    assert changed > 1e-4  # B starts at 0


def test_two_processes_have_one_processs_losses(checkpoints):
    folder, _, _ = checkpoints
    one, two = (losses(folder / name) for name in ("one", "two"))
    assert len(one) == 3
    assert two == pytest.approx(one, rel=1e-4)


def losses(folder):
    events = EventAccumulator(str(folder))
    events.Reload()
    return list({event.step: event.value for event in events.Scalars("train/loss")}.values())


def test_two_processes_judge_and_draw_what_one_process_does(checkpoints):

    folder, _, _ = checkpoints
    one, two = (json.loads((folder / name / "win_rate.json").read_text()) for name in ("one", "two"))
    assert [entry["comparisons"]["pickscore"]["n"] for entry in one] == [3]
    assert two[-1]["policy"]["pickscore"]["mean"] == pytest.approx(one[-1]["policy"]["pickscore"]["mean"], abs=1e-3)
    pictures = [sorted(path.name for path in (folder / name / "samples").iterdir()) for name in ("one", "two")]
    assert pictures[0] == pictures[1] != []


def test_two_processes_count_what_one_process_costs(checkpoints):
    folder, _, _ = checkpoints
    one, two = (json.loads((folder / name / "cost.json").read_text())[-1] for name in ("one", "two"))
    assert one["step"] == two["step"] == 3
    # 3 steps of 4 pairs, two pictures each, through policy and reference.
    assert (one["pairs"], one["data_pictures"], one["training_denoiser_rows"]) == (12, 24, 48)
    for name in ("pairs", "data_pictures", "training_denoiser_rows", "sampling_denoiser_rows"):
        assert two[name] == one[name]


def test_two_processes_have_one_processs_losses_of_kto(tmp_path, pipelines, harness, monkeypatch):
    """Four pictures a batch, two on each of two processes, of which one has no liked one."""
    both = write_both(tmp_path)
    settings, data = CONFIG.replace("class_path: DPO", "class_path: KTO").split("data:\n")
    settings = settings[: settings.index("  callbacks:")] + settings[settings.index("model:") :]
    data = "  class_path: SinglePicturesDataModule\n  init_args: {{liked: %s, unliked: %s, positive_ratio: 0.3, "
    data += "batch_size: {batch_size}, resolution: 64, seed: 7}}\n"
    monkeypatch.setattr(f"{__name__}.CONFIG", settings + "data:\n" + data % tuple(both.values()))
    train(harness, tmp_path, "one", pipelines, None, devices=1, batch_size=4)
    train(harness, tmp_path, "two", pipelines, None, devices=2, batch_size=2)
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert len(one) == len(set(one)) == 3
    assert two == pytest.approx(one, rel=1e-5)
    module = SinglePicturesDataModule(**both, batch_size=2, positive_ratio=0.3, seed=7, resolution=64)
    module.setup("fit")
    liked = torch.tensor([module.train_set[n].liked.item() for n in range(12)]).reshape(6, 2)  # a row per rank's batch
    assert liked.any()
    assert not liked.any(dim=1).all()


@pytest.mark.parametrize(("rank", "how"), [(1, "raise"), (1, "kill"), (0, "raise"), (0, "kill")])
def test_a_process_that_fails_ends_the_other_one_though_it_waits_in_no_collective(rank, how):
    """The pipes close, and ``run`` returns, once both are gone; left alone, the other one would sleep 1000 seconds."""
    tests = Path(__file__).parent
    result = subprocess.run(
        [sys.executable, str(tests / "failing_rank.py"), str(rank), how],
        capture_output=True, text=True, timeout=280, check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(tests.parent)},
    )  # fmt: skip
    assert result.returncode == {(0, "raise"): 1}.get((rank, how), -signal.SIGKILL)
    assert (f"RuntimeError: rank {rank} cannot go on" in result.stderr) == (how == "raise")
    assert ("the run's first process" in result.stderr) == (rank == 0)


@pytest.mark.parametrize(
    ("strategy", "name"),
    [
        ("fsdp", "fsdp"),
        ("deepspeed_stage_2", "deepspeed_stage_2"),
        ("{class_path: lightning.pytorch.strategies.ModelParallelStrategy}", "ModelParallelStrategy"),
    ],
)
def test_other_strategies_that_shard_weights_are_refused_before_anything_starts(tmp_path, pipelines, strategy, name):
    config = tmp_path / "run.yaml"
    config.write_text(CONFIG.format(pipelines=pipelines, shards=tmp_path, strategy=strategy, devices=2, batch_size=1))
    with pytest.raises(ConfigError, match=f"trainer.strategy {name} is not supported: .* use ddp, or fsdp2"):
        run.main(["--config", str(config), "--run_dir", str(tmp_path / "run")])
