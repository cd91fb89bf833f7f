"""Two processes that share out the denoiser learn, draw, export and go on as two do that hold it whole."""

from __future__ import annotations

import json
import signal
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from diffusers import FluxTransformer2DModel, StableDiffusion3Pipeline, StableDiffusionPipeline, UNet2DConditionModel
from kill_harness import Harness, Order
from lightning.pytorch import LightningModule
from lightning.pytorch.plugins.precision import MixedPrecision
from pairs_data import write_shards
from safetensors.torch import load_file
from test_kills import SPO, differences, final, losses
from test_loss_guard import batches, state
from tiny_world import make, trainer
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers.optimization import Adafactor

from callbacks.loss_guard import LossGuard
from lightning_modules.errors import ConfigError
from lightning_modules.policies.adaptation import FullFineTuning
from lightning_modules.policies.lora import LoRA
from lightning_modules.references import AdapterOff, FrozenCopy
from lightning_modules.weights.averaging import ExponentialMovingAverage
from lightning_modules.weights.sharding import (
    FullyShardedStrategy,
    gathered_weights,
    own_class,
    unsharded,
    whole_tensor,
)

STEPS = 4
QUICK = {"class_path": "Sampler", "init_args": {"steps": 2, "guidance_scale": 2.0}}
LORA = {
    "adaptation": {"class_path": "LoRA", "init_args": {"rank": 3}},  # of which no two processes have equal parts
    "reference": {"class_path": "AdapterOff"},
}
FULL = {"adaptation": {"class_path": "FullFineTuning"}, "reference": {"class_path": "FrozenCopy"}}
BASES: dict[str, dict[str, Any]] = {  # a policy's class, its pipeline and further arguments
    "StableDiffusion": {"pretrained": "tiny-sd15"},
    "StableDiffusion3": {"pretrained": "tiny-sd3", "t5_tokens": 16},
    "Flux": {"pretrained": "tiny-flux", "t5_tokens": 16},
}


def tree(
    pipelines: Path, shards: Path, adaptation: Any, reference: Any, base: str = "StableDiffusion"
) -> dict[str, Any]:
    """Settings of a run of DPO on pictures."""
    policy = BASES[base] | {"pretrained": str(pipelines / BASES[base]["pretrained"]), "adaptation": adaptation}
    return {
        "seed_everything": 7,
        "trainer": {
            "accelerator": "cpu",
            "max_steps": STEPS,
            "log_every_n_steps": 1,
            "limit_val_batches": 1,
            "val_check_interval": 2,
            "num_sanity_val_steps": 1,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "gradient_clip_val": 0.05,
            "callbacks": [
                {"class_path": "RunCheckpoint", "init_args": {"every_n_steps": 2}},
                {"class_path": "ExportPolicy", "init_args": {"keep": -1}},
                {"class_path": "Cost"},
                {"class_path": "sharding_probe.Held"},
            ],
        },
        "model": {
            "class_path": "AlignmentModule",
            "init_args": {
                "policy": {"class_path": base, "init_args": policy},
                "objective": {"class_path": "DPO", "init_args": {"beta": 100.0}},
                "reference": reference,
                # An epsilon of the gradients' size: rounding is not to decide on directions.
                "optimizer": {"class_path": "AdamW", "init_args": {"lr": 1e-2, "eps": 1e-3}},
                "caption_dropout": 0.3,
                "seed": 7,
            },
        },
        "data": {
            "class_path": "PreferencePairsDataModule",
            "init_args": {
                "shards": str(shards), "val_shards": str(shards), "batch_size": 1, "resolution": 32, "seed": 7,
            },
        },
    }  # fmt: skip


def pictures(pipelines: Path) -> list[dict[str, Any]]:
    """Callbacks that draw, in two processes two pictures and one."""
    drawn = {"prompts": ["one", "two", "three"], "sampler": QUICK, "batch_size": 1}
    score = {
        "class_path": "PickScore",
        "init_args": {"pretrained": str(pipelines / "tiny-pickscore"), "processor": None},
    }
    return [
        {"class_path": "WinRate", "init_args": {**drawn, "rewards": [score], "test_prompts": drawn["prompts"]}},
        {"class_path": "SampleGrid", "init_args": {**drawn, "every_n_steps": 2}},
    ]


@dataclass(frozen=True)
class World:
    """Where runs are made, by a server that has imported everything."""

    harness: Harness
    folder: Path
    pipelines: Path
    shards: Path

    def order(self, name: str, settings: dict[str, Any], strategy: str, *words: str) -> Order:
        """A run in two processes that hold one pair a batch each, or in one (``auto``) that holds both."""
        ranks = 1 if strategy == "auto" else 2
        data = settings["data"]["init_args"]
        data = data | {"batch_size": 2 // ranks}
        settings = settings | {
            "trainer": settings["trainer"] | {"strategy": strategy, "devices": ranks},
            "data": settings["data"] | {"init_args": data},
        }
        config = self.folder / f"{name}.yaml"
        config.write_text(yaml.safe_dump(settings))
        words = ("--config", str(config), "--run_dir", str(self.folder / name), *words)
        return Order(words, str(self.folder / f"{name}.log"), str(self.folder / name), ranks=ranks)

    def run(self, order: Order) -> Path:
        outcome = self.harness.run(order)
        assert list(outcome.codes) == [0] * order.ranks, f"{outcome}\n{Path(order.log).read_text()[-6000:]}"
        return Path(order.run_dir)

    def train(self, name: str, settings: dict[str, Any], strategy: str, *words: str) -> Path:
        return self.run(self.order(name, settings, strategy, *words))


@pytest.fixture(scope="module")
def world(tmp_path_factory, pipelines, harness):
    folder = tmp_path_factory.mktemp("sharding")
    return World(harness, folder, pipelines, write_shards(folder / "shards", [7, 6]))


@pytest.fixture(scope="module")
def lora(world):
    """LoRA with AdapterOff and pictures, in one process, in two, and in two that share out the UNet."""
    settings = tree(world.pipelines, world.shards, **LORA)
    settings["trainer"]["callbacks"] += pictures(world.pipelines)
    return {name: world.train(f"lora-{name}", settings, name) for name in ("auto", "ddp", "fsdp2")}


@pytest.fixture(scope="module")
def full_settings(world):
    settings = tree(world.pipelines, world.shards, **FULL)
    settings["trainer"]["accumulate_grad_batches"] = 2
    settings["model"]["init_args"]["policy"]["init_args"]["gradient_checkpointing"] = True
    return settings


@pytest.fixture(scope="module")
def full(world, full_settings):
    """Full fine-tuning with FrozenCopy, accumulation and gradient checkpointing, likewise."""
    return {name: world.train(f"full-{name}", full_settings, name) for name in ("ddp", "fsdp2")}


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = final(run_dir)["state_dict"]
    return found


def assert_close(run_dir: Path, other: Path) -> None:
    """Weights, moments and losses differ by rounding alone."""
    one, two = final(run_dir), final(other)
    assert one["state_dict"].keys() == two["state_dict"].keys()
    assert one["global_step"] == two["global_step"] == STEPS
    torch.testing.assert_close(one["state_dict"], two["state_dict"], rtol=0, atol=2e-6)
    torch.testing.assert_close(one["optimizer_states"], two["optimizer_states"], rtol=1e-3, atol=1e-6)
    assert list(losses(run_dir).values()) == pytest.approx(list(losses(other).values()), rel=1e-4)


@pytest.mark.parametrize("other", ["auto", "ddp"])
def test_lora_learns_what_unsharded_processes_learn(lora, other):
    assert_close(lora["fsdp2"], lora[other])
    assert max(value.abs().max() for name, value in weights(lora["fsdp2"]).items() if "lora_B" in name) > 1e-3


def test_full_fine_tuning_learns_what_unsharded_processes_learn(full):
    assert_close(full["fsdp2"], full["ddp"])


def test_each_process_holds_its_part(lora, full):
    assert_each_holds_its_part(lora["fsdp2"], networks=1)
    moments = assert_each_holds_its_part(full["fsdp2"], networks=2)["moments"]
    unsharded = json.loads((full["ddp"] / "held-1.json").read_text())
    assert unsharded["moments"] == moments | {"here": moments["all"], "shared": 0}


def assert_each_holds_its_part(run_dir: Path, networks: int) -> dict[str, dict[str, int]]:
    """What the first of two processes holds."""
    ranks = [json.loads((run_dir / f"held-{rank}.json").read_text()) for rank in (0, 1)]
    for what in [f"weights {n}" for n in range(networks)] + ["gradients", "moments"]:
        here, total = [rank[what]["here"] for rank in ranks], ranks[0][what]["all"]
        assert sum(here) == total
        assert max(here) < (0.51 if what.startswith("weights") else 0.6) * total  # three rows make parts of 2 and 1
        assert ranks[0][what]["shared"] == ranks[0][what]["tensors"] > 0
    return ranks[0]


def test_processes_draw_and_judge_though_not_equally_often(lora):
    """Three prompts for two processes: one draws twice, with no one to gather weights with."""
    one, two = (json.loads((lora[name] / "win_rate.json").read_text()) for name in ("auto", "fsdp2"))
    assert [entry["step"] for entry in one] == [entry["step"] for entry in two[:2]] == [2, STEPS]
    assert two[1]["policy"]["pickscore"]["mean"] == pytest.approx(one[1]["policy"]["pickscore"]["mean"], abs=1e-3)
    assert two[1]["reference"]["pickscore"] == pytest.approx(one[1]["reference"]["pickscore"], abs=1e-4)
    drawn = [sorted(path.name for path in (lora[name] / "samples").iterdir()) for name in ("auto", "fsdp2")]
    assert drawn[0] == drawn[1] != []


def test_a_checkpoint_is_tested(world, lora):
    """Jobs other than fit share out nothing."""
    config, log = world.folder / "lora-fsdp2.yaml", world.folder / "test.log"
    words = ["test", "--config", str(config), "--run_dir", str(lora["fsdp2"])]
    world.run(Order(words, str(log), str(lora["fsdp2"]), ranks=2))
    judged = json.loads((lora["fsdp2"] / "win_rate.json").read_text())
    assert [(entry["split"], entry["step"]) for entry in judged] == [("val", 2), ("val", STEPS), ("test", STEPS)]
    means = [entry["policy"]["pickscore"]["mean"] for entry in judged]
    assert means[2] == pytest.approx(means[1], abs=1e-4)  # the prompts are the same


def test_costs_are_counted_as_without_sharding(lora):
    one, two = (json.loads((lora[name] / "cost.json").read_text())[-1] for name in ("auto", "fsdp2"))
    for name in ("pairs", "data_pictures", "training_denoiser_rows", "sampling_denoiser_rows"):
        assert two[name] == one[name]


def test_plain_diffusers_reads_the_exports(lora, full, pipelines):
    exports = [lora[name] / "export" / f"step={STEPS:07d}" for name in ("auto", "fsdp2")]
    one, two = (load_file(folder / "pytorch_lora_weights.safetensors") for folder in exports)
    torch.testing.assert_close(one, two, rtol=0, atol=2e-6)
    pipeline = StableDiffusionPipeline.from_pretrained(pipelines / "tiny-sd15", safety_checker=None)
    pipeline.load_lora_weights(exports[1])
    unet = UNet2DConditionModel.from_pretrained(full["fsdp2"] / "export" / f"step={STEPS:07d}" / "unet")
    expected = weights(full["fsdp2"])
    assert all(torch.equal(value, expected[f"policy.unet.{name}"]) for name, value in unet.state_dict().items())


# ------------------------------------------------------------------------------------------- going on


def assert_same(run_dir: Path, whole: Path) -> None:
    assert differences(final(run_dir), final(whole)) == []


def middle(run_dir: Path) -> str:
    return str(run_dir / "checkpoints" / "step=0000002.ckpt")


def test_a_checkpoint_is_that_of_unsharded_processes(full):
    one, two = (torch.load(full[name] / "checkpoints" / "last.ckpt", weights_only=True) for name in ("ddp", "fsdp2"))
    assert one.keys() == two.keys()
    assert one["optimizer_states"][0]["param_groups"] == two["optimizer_states"][0]["param_groups"]
    assert {name: value.shape for name, value in one["state_dict"].items()} == {
        name: value.shape for name, value in two["state_dict"].items()
    }


def test_a_run_goes_on_exactly_from_its_checkpoint(world, full, full_settings):
    went_on = world.train("full-on", full_settings, "fsdp2", "--ckpt_path", middle(full["fsdp2"]))
    assert_same(went_on, full["fsdp2"])


def test_a_run_stopped_by_a_signal_goes_on_exactly(world, lora):
    settings = tree(world.pipelines, world.shards, **LORA)
    order = world.order("lora-cut", settings, "fsdp2", "--resume=auto", "--trainer.callbacks+=kill_probe.Probe")
    outcome = world.harness.run(replace(order, where="step", moment=(2, 1, 0), signal=int(signal.SIGTERM)))
    assert (list(outcome.codes), outcome.hung) == ([143, 143], False), Path(order.log).read_text()[-4000:]
    assert_same(world.run(order), lora["fsdp2"])


def test_a_run_goes_on_in_one_process_and_back(world, lora):
    settings = tree(world.pipelines, world.shards, **LORA)
    alone = world.train("lora-alone", settings, "auto", "--ckpt_path", middle(lora["fsdp2"]))
    again = world.train("lora-again", settings, "fsdp2", "--ckpt_path", middle(lora["auto"]))
    for run_dir in (alone, again):
        assert_close_weights(run_dir, lora["ddp"])


def assert_close_weights(run_dir: Path, other: Path) -> None:
    torch.testing.assert_close(weights(run_dir), weights(other), rtol=0, atol=2e-6)


# ------------------------------------------------------------------------------------------- flow models


def flow_settings(world: World, base: str) -> dict[str, Any]:
    """A LoRA on SD3, all of FLUX; nothing is validated."""
    trained = LORA if base == "StableDiffusion3" else FULL
    settings = tree(world.pipelines, world.shards, **trained, base=base)
    settings["trainer"] |= {"limit_val_batches": 0, "num_sanity_val_steps": 0}
    return settings


@pytest.fixture(scope="module")
def flows(world):
    """In one process, and in two that share out the transformer."""
    return {
        base: {name: world.train(f"{base}-{name}", flow_settings(world, base), name) for name in ("auto", "fsdp2")}
        for base in ("StableDiffusion3", "Flux")
    }


@pytest.mark.parametrize("base", ["StableDiffusion3", "Flux"])
def test_a_flow_model_learns_what_one_process_learns(flows, base):
    assert_close(flows[base]["fsdp2"], flows[base]["auto"])
    assert_each_holds_its_part(flows[base]["fsdp2"], networks=1 if base == "StableDiffusion3" else 2)


def test_a_flow_models_run_goes_on_in_one_process(world, flows):
    sd3 = flows["StableDiffusion3"]
    settings = flow_settings(world, "StableDiffusion3")
    alone = world.train("sd3-alone", settings, "auto", "--ckpt_path", middle(sd3["fsdp2"]))
    assert_close_weights(alone, sd3["auto"])


def test_plain_diffusers_reads_a_flow_models_exports(flows, pipelines):
    lora, full = (flows[base]["fsdp2"] for base in ("StableDiffusion3", "Flux"))
    pipeline = StableDiffusion3Pipeline.from_pretrained(pipelines / "tiny-sd3")
    pipeline.load_lora_weights(lora / "export" / f"step={STEPS:07d}")
    loaded = {
        name.replace(".default_0.", ".default."): value
        for name, value in pipeline.transformer.state_dict().items()
        if ".lora_" in name
    }
    torch.testing.assert_close(loaded, part(weights(lora), "policy.transformer."), rtol=0, atol=0)
    transformer = FluxTransformer2DModel.from_pretrained(full / "export" / f"step={STEPS:07d}" / "transformer")
    torch.testing.assert_close(
        dict(transformer.state_dict()), part(weights(full), "policy.transformer."), rtol=0, atol=0
    )


def part(found: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): value for name, value in found.items() if name.startswith(prefix)}


# ------------------------------------------------------------------------------------------- SPO


@pytest.fixture(scope="module")
def spo_settings(world):
    """Pools of one prompt: the second process samples nothing while the first samples."""
    settings = tree(world.pipelines, world.shards, **LORA)
    objective, data = SPO["model.init_args.objective"], SPO["data"]
    pools = {"prompts_per_pool": 1, "prompts_per_batch": 1, "keep_pools": True}
    settings["trainer"] |= {"reload_dataloaders_every_n_epochs": 1, "limit_val_batches": 0}
    settings["model"]["init_args"] |= {"objective": objective}
    settings["data"] = {**data, "init_args": {**data["init_args"], **pools}}
    return settings


@pytest.fixture(scope="module")
def spo(world, spo_settings):
    return {name: world.train(f"spo-{name}", spo_settings, name) for name in ("ddp", "fsdp2")}


def test_spo_learns_what_unsharded_processes_learn(spo):
    assert_close(spo["fsdp2"], spo["ddp"])
    first = [min(path.name for path in (spo[name] / "pools").iterdir()) for name in ("ddp", "fsdp2")]
    assert first[0] == first[1]  # the name has a hash of the weights


def test_spo_stopped_within_sampling_goes_on_exactly(world, spo, spo_settings):
    order = world.order("spo-cut", spo_settings, "fsdp2", "--resume=auto", "--trainer.callbacks+=kill_probe.Probe")
    outcome = world.harness.run(replace(order, where="sampling", moment=(2, 0, 0), signal=int(signal.SIGTERM)))
    assert (outcome.hit, outcome.hung) == ("sampling", False), Path(order.log).read_text()[-4000:]
    assert_same(world.run(order), spo["fsdp2"])


# ------------------------------------------------------------------------------------------- in this process


@pytest.fixture
def fit_alone(monkeypatch, tmp_path):
    """Fits with ``fsdp2`` in this process alone, and leaves nothing of it behind."""
    for name in ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)

    def fit(module, data, *callbacks, **options):
        running = trainer(tmp_path, *callbacks, strategy=FullyShardedStrategy(), devices=1, max_epochs=1, **options)
        running.fit(module, data)
        return running

    yield fit
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def test_a_step_left_out_leaves_no_trace(pipelines, fit_alone):
    spoiled, without = (make(pipelines, LoRA(), AdapterOff()) for _ in range(2))
    guard = LossGuard()
    one = fit_alone(spoiled, batches(0, 1, 2, spoiled=2), guard)
    two = fit_alone(without, batches(0, 2), LossGuard())
    assert (guard.skipped, one.global_step, two.global_step) == (1, 3, 2)
    assert all(torch.equal(whole_tensor(a), whole_tensor(b)) for a, b in zip(state(spoiled, one), state(without, two)))


def test_gathered_a_network_has_its_weights_in_every_pass(pipelines, fit_alone):
    module, plain = (make(pipelines, FullFineTuning(), FrozenCopy()) for _ in range(2))
    fit_alone(module, batches(0))
    unet = module.policy.unet
    assert isinstance(unet, FSDPModule)
    assert [own_class(part) for part in unet.modules()] == [type(part) for part in plain.policy.unet.modules()]
    query = (torch.zeros(1, 4, 8, 8), torch.tensor([5]), torch.zeros(1, 77, 32))
    with torch.no_grad(), gathered_weights(*module.denoisers()):
        with gathered_weights(unet):
            first = unet(*query).sample
        for network in module.denoisers():  # a pass, and the end of the inner one, leave them gathered
            network(*query)
            assert not any(isinstance(value, DTensor) for value in network.parameters())
    assert all(isinstance(value, DTensor) for network in module.denoisers() for value in network.parameters())
    with torch.no_grad():
        assert torch.equal(unet(*query).sample, first)
    assert all(isinstance(value, DTensor) for value in unet.parameters())


def test_unsharded_a_network_is_what_it_was_and_comes_back(pipelines, fit_alone):
    module, plain = (make(pipelines, LoRA(), AdapterOff()) for _ in range(2))
    fit_alone(module, batches(0))
    unet = module.policy.unet
    with unsharded(module.policy):
        found = module.policy.unet
        assert [type(part) for part in found.modules()] == [type(part) for part in plain.policy.unet.modules()]
        assert {name: value.requires_grad for name, value in found.named_parameters()} == {
            name: value.requires_grad for name, value in plain.policy.unet.named_parameters()
        }
        assert not any(isinstance(value, DTensor) or value.is_meta for value in found.state_dict().values())
        for name, value in unet.state_dict().items():
            assert torch.equal(found.state_dict()[name], whole_tensor(value))
    assert module.policy.unet is unet
    assert all(isinstance(value, DTensor) for value in unet.parameters())


class Other(LightningModule):
    """Knows no network to share out."""

    def training_step(self, batch, batch_idx):
        return None

    def configure_optimizers(self):
        return None


def with_optimizer(folder, optimizer):
    module = make(folder, LoRA(), AdapterOff())
    module.make_optimizer = optimizer
    return module


@pytest.mark.parametrize(
    ("module", "options", "message"),
    [
        (lambda folder: Other(), {}, "Other has no large network to share out; use ddp"),
        (
            lambda folder: make(folder, FullFineTuning(text_encoder=True), FrozenCopy()),
            {},
            "shares out the denoiser, and policy.text_encoder.* trains too; .* or use ddp",
        ),
        (
            lambda folder: make(folder, LoRA(), AdapterOff(), ema=ExponentialMovingAverage()),
            {},
            "model.ema averages whole weights; leave it out, or use ddp",
        ),
        (
            lambda folder: make(folder, LoRA(), AdapterOff()),
            {"plugins": MixedPrecision("16-mixed", "cpu")},
            "knows no 16-mixed; take bf16-mixed, or use ddp",
        ),
        (
            lambda folder: with_optimizer(folder, partial(Adafactor, lr=1e-3, relative_step=False)),
            {},
            "Adafactor computes with whole weights; take torch.optim.AdamW, or use ddp",
        ),
        (lambda folder: with_optimizer(folder, torch.optim.Adafactor), {}, "Adafactor computes with whole weights"),
    ],
)
def test_what_needs_whole_weights_is_refused_in_one_line(pipelines, fit_alone, module, options, message):
    with pytest.raises(ConfigError, match=message):
        fit_alone(module(pipelines), batches(0), **options)
