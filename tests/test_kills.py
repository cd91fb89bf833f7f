"""Every kind of run is killed, again and again, and goes on as if nothing had happened: losses and weights bit for bit.

Each run is a process of its own (two with DDP), struck by SIGKILL and SIGTERM at seeded points: at random times, and
for certain in the middle of a step, of writing a checkpoint, of sampling a pool and of writing a shard. It is started
again with the same command in the same folder until it ends. ``pytest -m kills`` kills every kind 50 times.
"""

from __future__ import annotations

import bisect
import json
import random
import signal
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from kill_harness import Harness, Order, Outcome
from pairs_data import rows, write_parquet, write_shards
from picture_data import write_both
from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

STEPS = 16
EVERY = 2  # steps between checkpoints

# ------------------------------------------------------------------------------------------- kinds of runs


@dataclass(frozen=True)
class Kind:
    """A kind of run.

    Attributes:
        settings: by path, over those that all kinds share.
        ranks: processes.
        places: where it is struck for certain, beside the random times.
        kills: how often, but where every kind is killed 50 times; at least twice per place.
    """

    settings: dict[str, Any]
    ranks: int = 1
    places: tuple[str, ...] = ("step", "checkpoint")
    kills: int = 6


SPO = {
    "trainer.reload_dataloaders_every_n_epochs": 1,
    "model.init_args.objective": {"class_path": "SPO", "init_args": {"eta": 1.0, "guidance_scale": 2.0}},
    "data": {
        "class_path": "StepPoolDataModule",
        "init_args": {
            "prompts": ["a cat", "a dog", "the sea", "a red house", "two birds"],
            "sampler": {"steps": 4, "branch_from_step": 1, "candidates": 2, "threshold": 0.01, "guidance_scale": 2.0},
            "scorer": {"class_path": "RandomScorer"},
            "prompts_per_pool": 4,
            "prompts_per_batch": 2,
            "batch_size": 2,
            "seed": 7,
        },
    },
}

LATENT_REWARD = {
    "class_path": "LatentRewardModel",
    "init_args": {"pretrained": "tiny-lrm-sd15", "tokenizer": "tiny-sd15", "guidance_scale": 2.0},
}
LPO = SPO | {
    "data.init_args.sampler.branch_from_step": 0,
    "data.init_args.sampler.threshold": {"class_path": "AlongSigma", "init_args": {"low": 0.01, "high": 0.02}},
    "data.init_args.scorer": {"class_path": "LatentScorer", "init_args": {"model": LATENT_REWARD}},
    "model.init_args.objective.init_args.beta": 500.0,
}

# Validated at the end of every second epoch, with which a checkpoint is written, and between checkpoints.
EVALUATED = {
    "data.init_args.val_shards": "pixels",
    "trainer.limit_val_batches": 3,
    "trainer.num_sanity_val_steps": 0,
    "trainer.val_check_interval": 4,
    "trainer.check_val_every_n_epoch": None,
    "trainer.callbacks+": [
        {"class_path": "Cost"},
        {
            "class_path": "WinRate",
            "init_args": {
                "prompts": ["one", "two", "three"],
                "rewards": [
                    {"class_path": "PickScore", "init_args": {"pretrained": "tiny-pickscore", "processor": None}}
                ],
                "sampler": {"class_path": "Sampler", "init_args": {"steps": 2, "guidance_scale": 1.0}},
                "batch_size": 1,
            },
        },
        {
            "class_path": "SampleGrid",
            "init_args": {
                "prompts": ["one", "two"],
                "sampler": {"class_path": "Sampler", "init_args": {"steps": 2, "guidance_scale": 1.0}},
                "every_n_steps": 5,
                "batch_size": 1,
            },
        },
    ],
}

KINDS = {
    "SFT": Kind({"model.init_args.objective": {"class_path": "SFT"}, "model.init_args.reference": None}),
    "DPO": Kind(EVALUATED, places=("step", "checkpoint", "validation", "pictures"), kills=8),
    "DPO, 2 workers, accumulation 3": Kind(
        {
            "data.init_args.num_workers": 2,
            "trainer.accumulate_grad_batches": 3,
            "model.init_args.policy.init_args.adaptation": {"class_path": "FullFineTuning"},
            "model.init_args.reference": {"class_path": "FrozenCopy"},
            "model.init_args.objective": {
                "class_path": "AutomaticBeta",
                "init_args": {"objective": {"class_path": "DPO"}, "decay": 0.5},
            },
            "model.init_args.ema": {"class_path": "ExponentialMovingAverage", "init_args": {"decay": 0.9}},
            "model.init_args.lr_scheduler": {
                "class_path": "CosineWithWarmup",
                "init_args": {"total_steps": STEPS, "warmup_steps": 4},
            },
        }
    ),
    "DPO, cached latents": Kind({"data.init_args.shards": "latents"}),
    "KTO": Kind(
        {
            "model.init_args.objective": {"class_path": "KTO", "init_args": {"beta": 100.0}},
            "data": {
                "class_path": "SinglePicturesDataModule",
                "init_args": {
                    "liked": "liked",
                    "unliked": "unliked",
                    "positive_ratio": 0.6,
                    "batch_size": 2,
                    "resolution": 32,
                    "seed": 7,
                },
            },
        },
        kills=4,
    ),
    "DPO, fsdp2, 2 processes": Kind(
        {"trainer.devices": 2, "trainer.strategy": "fsdp2", "data.init_args.batch_size": 1}, ranks=2
    ),
    "SPO": Kind(SPO, places=("step", "checkpoint", "sampling", "shard"), kills=8),
    "flow DPO": Kind(
        {
            "model.init_args.policy": {
                "class_path": "StableDiffusion3",
                "init_args": {"pretrained": "tiny-sd3", "adaptation": {"class_path": "LoRA"}, "t5_tokens": 16},
            },
        },
        kills=4,
    ),
    "flow SPO": Kind(
        SPO
        | {
            "model.init_args.policy": {
                "class_path": "StableDiffusionAsFlow",
                "init_args": {"pretrained": "tiny-sd15", "adaptation": {"class_path": "LoRA"}},
            },
        },
        places=("step", "checkpoint", "sampling", "shard"),
        kills=8,
    ),
    "preference model": Kind(
        {
            "model": {
                "class_path": "StepAwarePreferenceModule",
                "init_args": {
                    "policy": {
                        "class_path": "StableDiffusion",
                        "init_args": {"pretrained": "tiny-sd15", "adaptation": {"class_path": "Frozen"}},
                    },
                    "preference": {
                        "class_path": "StepAwarePreferenceModel",
                        "init_args": {"pretrained": "tiny-spm", "processor": None},
                    },
                    "labels": {"class_path": "HumanLabels"},
                    "optimizer": {"class_path": "AdamW", "init_args": {"lr": 1e-3}},
                    "guidance_scale": 2.0,
                    "seed": 7,
                },
            },
        }
    ),
    "latent reward model": Kind(
        {
            "model": {
                "class_path": "StepAwarePreferenceModule",
                "init_args": {
                    "policy": {
                        "class_path": "StableDiffusion",
                        "init_args": {"pretrained": "tiny-sd15", "adaptation": {"class_path": "Frozen"}},
                    },
                    "preference": LATENT_REWARD
                    | {"init_args": {"pretrained": "tiny-sd15", "tokenizer": "tiny-sd15", "untrained": True}},
                    "labels": {"class_path": "HumanLabels"},
                    "optimizer": {"class_path": "AdamW", "init_args": {"lr": 1e-3}},
                    "sees": {"class_path": "NoisyLatents"},
                    "sampler_steps": 20,
                    "independent_noise": True,
                    "seed": 7,
                },
            },
        },
        kills=4,
    ),
    "LPO": Kind(LPO, places=("step", "checkpoint", "sampling", "shard"), kills=8),
    "SPO, 2 processes": Kind(
        SPO | {"trainer.devices": 2, "trainer.strategy": "ddp", "data.init_args.batch_size": 1},
        ranks=2,
        places=("step", "checkpoint", "sampling", "shard"),
        kills=8,
    ),
}


def settings(kind: Kind, folder: Path, pipelines: Path) -> dict[str, Any]:
    """The whole config; names of data and networks become paths."""
    tree: dict[str, Any] = {
        "seed_everything": 7,
        "trainer": {
            "accelerator": "cpu",
            "max_steps": STEPS,
            "limit_val_batches": 0,
            "log_every_n_steps": 1,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "callbacks": [{"class_path": "RunCheckpoint", "init_args": {"every_n_steps": EVERY}}],
        },
        "model": {
            "class_path": "AlignmentModule",
            "init_args": {
                "policy": {
                    "class_path": "StableDiffusion",
                    "init_args": {"pretrained": "tiny-sd15", "adaptation": {"class_path": "LoRA"}},
                },
                "objective": {"class_path": "DPO", "init_args": {"beta": 100.0}},
                "reference": {"class_path": "AdapterOff"},
                "optimizer": {"class_path": "AdamW", "init_args": {"lr": 1e-3}},
                "caption_dropout": 0.3,
                "seed": 7,
            },
        },
        "data": {
            "class_path": "PreferencePairsDataModule",
            "init_args": {"shards": "pixels", "batch_size": 2, "resolution": 32, "seed": 7},
        },
    }
    for path, value in kind.settings.items():
        *parents, last = path.split(".")
        node = tree
        for name in parents:
            node = node[name]
        if last.endswith("+"):
            node[last[:-1]] = [*node[last[:-1]], *value]
        else:
            node[last] = json.loads(json.dumps(value))  # kinds share their settings' source
    names = ("tiny-sd15", "tiny-sd3", "tiny-spm", "tiny-lrm-sd15", "tiny-pickscore")
    places = {name: str(pipelines / name) for name in names}
    places |= {name: str(folder / name) for name in ("pixels", "latents", "liked", "unliked")}
    named: dict[str, Any] = json.loads(json.dumps(tree), object_hook=lambda node: {
        key: places.get(value, value) if isinstance(value, str) else value for key, value in node.items()
    })  # fmt: skip
    return named


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, harness: Harness, pipelines: Path) -> Path:
    """A folder with pairs as pixels and as latents, and with single pictures."""
    folder = tmp_path_factory.mktemp("kills")
    write_both(folder)
    write_shards(folder / "pixels", [7, 6])
    write_parquet(folder / "rows.parquet", rows(13))
    tree = settings(KINDS["DPO"], folder, pipelines)
    (folder / "policy.yaml").write_text(yaml.safe_dump(tree))
    words = ["--input", folder / "rows.parquet", "--output", folder / "latents", "--encode-with",
             folder / "policy.yaml", "--resolution", "32", "--shard-size", "5"]  # fmt: skip
    log = folder / "latents.log"
    done = harness.run(Order([str(word) for word in words], str(log), str(folder), "experiments.prepare_pickapic"))
    assert done.codes == [0], log.read_text()
    return folder


# ------------------------------------------------------------------------------------------- what a run leaves


def losses(run_dir: Path, stage: str = "train") -> dict[int, float]:
    """The loss of every step, from all the event files of a run; a step that comes twice must be the same."""
    found: dict[int, float] = {}
    files = sorted(run_dir.glob("events.out.tfevents.*"), key=lambda file: (file.stat().st_mtime_ns, file.name))
    for file in files:
        for event in LegacyEventFileLoader(str(file)).Load():
            for value in event.summary.value:
                if value.tag == f"{stage}/loss":
                    known = found.setdefault(event.step, value.simple_value)
                    assert known == value.simple_value, f"{stage} step {event.step} comes twice, with different losses"
    return found


def final(run_dir: Path) -> dict[str, Any]:
    """What the run's last checkpoint holds: weights, optimizer, schedule, steps, the data's place.

    Not the callbacks' notes, which name folders and times, nor what Lightning counts of the epoch that a run began in.
    """
    saved: dict[str, Any] = torch.load(run_dir / "checkpoints" / "last.ckpt", weights_only=True)
    batches = saved["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]["processed"]
    left_out = {"callbacks", "loops"}
    return {name: value for name, value in saved.items() if name not in left_out} | {"batches": batches}


def evaluations(run_dir: Path) -> tuple[str | None, dict[str, bytes]]:
    """What a run's pictures were worth, and the drawn ones."""
    history = run_dir / "win_rate.json"
    drawn = {path.name: path.read_bytes() for path in run_dir.glob("samples/*")}
    return history.read_text() if history.exists() else None, drawn


def differences(one: Any, other: Any, where: str = "") -> list[str]:
    """Where two nested values are not the same, bit for bit."""
    if isinstance(one, torch.Tensor):
        same = isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
        return [] if same else [where]
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        return [place for key in one for place in differences(one[key], other[key], f"{where}/{key}")]
    if isinstance(one, list | tuple) and isinstance(other, list | tuple) and len(one) == len(other):
        return [place for n, pair in enumerate(zip(one, other)) for place in differences(*pair, f"{where}/{n}")]
    return [] if one == other else [f"{where}: {one!r} != {other!r}"]


# ------------------------------------------------------------------------------------------- chains of kills

HITS = {place: place for place in ("step", "sampling", "validation", "pictures")}
HITS |= {"checkpoint": "writing a checkpoint", "shard": "writing a shard"}


@dataclass(frozen=True)
class Killed:
    """A strike, and what became of the process."""

    order: Order
    outcome: Outcome


class Chain:
    """One kind of run, once uninterrupted and then killed many times.

    Attributes:
        killed: all strikes so far.
    """

    def __init__(self, name: str, world: Path, pipelines: Path) -> None:
        self.kind = KINDS[name]
        self.folder = world / name.replace(",", "").replace(" ", "-")
        self.folder.mkdir(exist_ok=True)
        self.config, self.timeline = self.folder / "config.yaml", self.folder / "timeline.json"
        self.config.write_text(yaml.safe_dump(settings(self.kind, world, pipelines)))
        self.killed: list[Killed] = []

    def order(self, run: str) -> Order:
        run_dir = self.folder / run
        words = ["--config", str(self.config), "--run_dir", str(run_dir), "--resume=auto",
                 "--trainer.callbacks+=kill_probe.Probe"]  # fmt: skip
        return Order(words, str(self.folder / f"{run}.log"), str(run_dir), ranks=self.kind.ranks)

    def uninterrupted(self, harness: Harness) -> Path:
        """The run as it should be. Kills are drawn from its moments and their seconds."""
        return self.finish(harness, replace(self.order("whole"), timeline=str(self.timeline)))

    def strike(self, harness: Harness, run: str, kills: int, seed: int) -> list[Path]:
        """Kill a run ``kills`` times, then let it end; another begins where one ends before it comes to a place."""
        points, runs = self.points(kills, seed), 0
        while points:
            order = replace(self.order(f"{run}-{runs}"), **points[0])
            outcome = harness.run(order)
            if outcome.hit is None:
                assert list(outcome.codes) == [0] * self.kind.ranks, (outcome, Path(order.log).read_text()[-4000:])
                assert runs < kills, f"never came to {points[0]}"
                runs += 1
            else:
                self.killed.append(Killed(order, outcome))
                points = points[1:]
        return [self.finish(harness, self.order(f"{run}-{number}")) for number in range(runs + 1)]

    def finish(self, harness: Harness, order: Order) -> Path:
        outcome = harness.run(order)
        assert list(outcome.codes) == [0] * self.kind.ranks, (outcome, Path(order.log).read_text()[-4000:])
        return Path(order.run_dir)

    def points(self, kills: int, seed: int) -> list[dict[str, Any]]:
        """Where to strike, in the order of time: at every place with either signal, and at random times."""
        draw = random.Random(f"{self.folder.name} {seed}")
        moments, seconds = zip(*json.loads(self.timeline.read_text()))
        signals = [signal.SIGKILL, signal.SIGTERM] * (kills // 2)
        wheres = ([place for place in self.kind.places for _ in range(2)] + ["time"] * kills)[:kills]
        # Until when there are places to come: of the last pool or evaluation but one, and of the last batches.
        pools = [second for moment, second in zip(moments, seconds) if moment[1] == 0 and moment[2] == 1]
        batches = [second for moment, second in zip(moments, seconds) if moment[1] == 1 and moment[2] == 0]
        points = []
        for where, number in zip(wheres, signals):
            until = {"time": seconds[-1], "step": batches[-4], "checkpoint": batches[-4]}.get(where) or pools[-2]
            at = draw.uniform(0.0 if where == "time" else seconds[1], until)
            entry = bisect.bisect_right(seconds, at) - 1
            points.append(
                {"where": where, "moment": moments[entry], "delay": at - seconds[entry], "signal": int(number),
                 "depth": draw.randrange(200 if where in ("checkpoint", "shard") else 4),
                 "skew": draw.uniform(-0.1, 0.1)}
            )  # fmt: skip
        return sorted(points, key=lambda point: (point["moment"], point["delay"]))

    def check(self, whole: Path, killed: Path) -> None:
        """Nothing tells the two runs apart but how often they were started."""
        expected, found = losses(whole), losses(killed)
        assert sorted(expected) == sorted(found)
        assert len(expected) == STEPS
        assert [step for step in expected if expected[step] != found[step]] == []
        assert differences(final(whole), final(killed)) == []
        assert losses(whole, "val") == losses(killed, "val")
        assert evaluations(whole) == evaluations(killed)
        files = [sorted(path.name for path in (run / "checkpoints").iterdir()) for run in (whole, killed)]
        assert len(files[1]) <= len(files[0]) == 3  # the newest two and last.ckpt
        assert all(name.endswith(".ckpt") for name in files[1])
        for entry in self.killed:
            assert not entry.outcome.hung, entry
            # SIGTERM: 143 from the training, -15 before it, 0 where nothing was left to do.
            codes = {signal.SIGKILL: {-9}, signal.SIGTERM: {143, -15, 0}}[signal.Signals(entry.order.signal)]
            assert self.kind.ranks > 1 or entry.outcome.codes[0] in codes, entry

    def hits(self) -> Counter[str]:
        return Counter(str(entry.outcome.hit) for entry in self.killed)

    def row(self) -> str:
        """Of a table: how often it was struck with each signal and where, and how long the slowest SIGTERM took."""
        count = Counter(signal.Signals(entry.order.signal).name for entry in self.killed)
        waits = [entry.outcome.after_signal for entry in self.killed if entry.order.signal == signal.SIGTERM]
        where = ", ".join(f"{hit} {number}" for hit, number in self.hits().most_common())
        return f"{count['SIGKILL']} | {count['SIGTERM']} | {where} | {max(waits, default=0.0):.1f} s"


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", KINDS)
def test_a_run_killed_some_times_ends_as_if_it_had_not_been(name: str, harness: Harness, world: Path, pipelines: Path):
    chain = Chain(name, world, pipelines)
    whole = chain.uninterrupted(harness)
    for killed in chain.strike(harness, "killed", kills=chain.kind.kills, seed=1):
        chain.check(whole, killed)
    assert {HITS[place] for place in chain.kind.places} <= chain.hits().keys(), chain.row()


@pytest.mark.kills
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("name", KINDS)
def test_fifty_kills(name: str, harness: Harness, world: Path, pipelines: Path, capsys: pytest.CaptureFixture[str]):
    """Five runs are killed ten times each, each by a server of its own: another seed of Python's hashes."""
    chain = Chain(name, world, pipelines)
    whole = chain.uninterrupted(harness)
    for seed in range(2, 7):
        with Harness() as fresh:
            runs = chain.strike(fresh, f"killed-{seed}", kills=10, seed=seed)
        for killed in runs:
            chain.check(whole, killed)
    with capsys.disabled():
        print(f"\n| {name} | {chain.row()} | identical |")
