"""The cost of a training, counted on real networks of tiny size, against counts by hand."""

import json

import pytest
import torch
from lightning.pytorch import LightningDataModule, Trainer, seed_everything
from torch.utils.data import DataLoader

from callbacks.clock import EVALUATION, Stopwatch
from callbacks.cost import Cost
from callbacks.resume.checkpointing import RunCheckpoint
from callbacks.resume.exact_resume import ExactResume
from callbacks.win_rate import WinRate
from datamodules.pools.folder import read_manifest
from datamodules.step_pool import StepPoolDataModule
from lightning_modules.alignment import AlignmentModule
from lightning_modules.batches import PreferencePairs
from lightning_modules.objectives import DPO, SFT, SPO
from lightning_modules.policies.adaptation import FullFineTuning
from lightning_modules.policies.lora import LoRA
from lightning_modules.policies.stable_diffusion import StableDiffusion
from lightning_modules.references import AdapterOff, FrozenCopy
from lightning_modules.rewards.base import RewardModel
from lightning_modules.sampling.pictures import Sampler, initial_noise
from lightning_modules.sampling.step_sampler import StepSampler
from lightning_modules.sampling.step_scorers import RandomScorer

B = 3  # pairs a batch


class Brightness(RewardModel):
    name = "brightness"

    def score(self, images, prompts):
        return images.mean(dim=(1, 2, 3))


def make(pipelines, adaptation=None, reference=None, objective=None):
    seed_everything(3, verbose=False)
    policy = StableDiffusion(str(pipelines / "tiny-sd15"), adaptation or LoRA())
    optimizer = lambda parameters: torch.optim.AdamW(parameters, lr=0.01)  # noqa: E731
    return AlignmentModule(policy, objective or DPO(), reference, optimizer)


def pairs(batches=4):
    def batch(n):
        images = torch.rand(2 * B, 3, 16, 16, generator=torch.Generator().manual_seed(n)) * 2 - 1
        ids = torch.tensor([16.0, 16, 0, 0, 16, 16]).expand(B, 6)
        return PreferencePairs(images[:B], images[B:], ("a",) * B, ids, ids, torch.arange(n * B, (n + 1) * B))

    return DataLoader([batch(n) for n in range(batches)], batch_size=None)


def trainer(folder, *callbacks, **options):
    defaults = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False,
                "enable_model_summary": False, "default_root_dir": folder, "callbacks": list(callbacks)}  # fmt: skip
    return Trainer(**(defaults | options))


def costs(folder):
    return json.loads((folder / "cost.json").read_text())


@pytest.mark.parametrize(
    ("adaptation", "reference", "objective", "rows", "pictures"),
    [
        (LoRA(), AdapterOff(), DPO(), 4 * B, 2 * B),  # policy and reference, chosen and rejected
        (FullFineTuning(), FrozenCopy(), DPO(), 4 * B, 2 * B),
        (FullFineTuning(), None, SFT(), B, B),
        (LoRA(), AdapterOff(), SFT(), B, B),  # has a reference to be judged against, and doesn't train with it
    ],
    ids=["dpo-lora", "dpo-copy", "sft", "sft-judged"],
)
def test_a_step_costs_what_it_says(tmp_path, pipelines, adaptation, reference, objective, rows, pictures):
    judge = WinRate(["one", "two"], [Brightness()], sampler=Sampler(steps=2, guidance_scale=2.0), every_n_steps=1)
    # The judge stands on either side: what it draws is not training, whoever comes first.
    for number, callbacks in enumerate(([judge, Cost()], [Cost(), judge])):
        module = make(pipelines, adaptation, reference, objective)
        folder = tmp_path / str(number)
        trainer(folder, *callbacks, max_steps=2).fit(module, pairs(), pairs(1))
        (entry,) = costs(folder)
        assert (entry["step"], entry["pairs"]) == (2, 2 * B)
        assert entry["training_denoiser_rows"] == 2 * rows
        assert entry["data_pictures"] == 2 * pictures
        assert entry["sampling_denoiser_rows"] == entry["drawn_pictures"] == 0
        assert entry["cpu_seconds"] > 0
        assert entry["wall_seconds"] > 0
        assert entry["process_memory_bytes"] > 1e6
        assert entry["device_memory_bytes"] == 0
        assert not module.policy.denoiser._forward_pre_hooks


class OnPolicy(LightningDataModule):
    """Draws two guided pictures for every epoch, as a pool does."""

    def train_dataloader(self):
        module = self.trainer.lightning_module
        noise, generators = initial_noise(module.policy, [(1,), (2,)])
        sampler = Sampler(steps=5, guidance_scale=3.0)
        sampler.generate(module.policy, module.policy.predict_noise, ["a", "b"], noise, generators)
        return pairs(2)


def test_pools_count_as_sampling(tmp_path, pipelines):
    module = make(pipelines, reference=AdapterOff())
    run = trainer(tmp_path, Cost(every_n_steps=2), max_epochs=2, reload_dataloaders_every_n_epochs=1)
    run.fit(module, datamodule=OnPolicy())
    first, second = costs(tmp_path)
    assert (first["step"], second["step"]) == (2, 4)
    # two pictures, five steps, twice for guidance, every epoch
    assert first["sampling_denoiser_rows"] == 2 * 5 * 2
    assert second["sampling_denoiser_rows"] == 2 * (2 * 5 * 2)
    assert second["drawn_pictures"] == 2 * 2
    assert second["training_denoiser_rows"] == 4 * 4 * B


def test_a_step_pool_costs_what_its_manifest_says(tmp_path, pipelines):
    sampler = StepSampler(steps=3, branch_from_step=1, candidates=2, threshold=0.0)
    data = StepPoolDataModule(
        sampler, prompts=["a", "b", "c"], scorer=RandomScorer(), prompts_per_batch=2, batch_size=2, seed=7
    )
    module = make(pipelines, reference=AdapterOff(), objective=SPO())
    run = trainer(tmp_path, Cost(), max_epochs=1, reload_dataloaders_every_n_epochs=1)
    run.fit(module, datamodule=data)
    (pool,) = (tmp_path / "pools").iterdir()
    entry = costs(tmp_path)[-1]
    assert entry["sampling_denoiser_rows"] == read_manifest(pool).statistics["unet_evaluations"] > 0
    # A pair shares its x_t: one row through policy and reference each, guidance doubles both.
    assert entry["training_denoiser_rows"] == 4 * entry["pairs"] > 0
    assert entry["data_pictures"] == entry["drawn_pictures"] == 0  # chance needs no pictures


@pytest.mark.filterwarnings("ignore:.*your dataloader is not resumable")  # counts don't depend on what it gives
def test_counts_go_on_where_a_checkpoint_stands(tmp_path, pipelines):
    def fit(folder, steps, checkpoint=None):
        callbacks = [Cost(every_n_steps=1), RunCheckpoint(every_n_steps=2), ExactResume()]
        options = {"max_steps": steps, "accumulate_grad_batches": 2, "enable_checkpointing": True}
        run = trainer(folder, *callbacks, **options)
        run.fit(make(pipelines, reference=AdapterOff()), pairs(8), ckpt_path=checkpoint, weights_only=True)
        return costs(folder)

    whole = fit(tmp_path / "whole", 4)
    fit(tmp_path / "parts", 2)
    resumed = fit(tmp_path / "parts", 4, str(tmp_path / "parts" / "checkpoints" / "last.ckpt"))
    counted = ("step", "pairs", "data_pictures", "training_denoiser_rows")
    assert [[entry[name] for name in counted] for entry in resumed] == [
        [entry[name] for name in counted] for entry in whole
    ]
    assert [entry["pairs"] for entry in whole] == [2 * B, 4 * B, 6 * B, 8 * B]
    seconds = [entry["cpu_seconds"] for entry in resumed]
    assert seconds == sorted(seconds)


def test_it_is_logged(tmp_path, pipelines):
    run = trainer(tmp_path, Cost(), max_steps=1)
    run.fit(make(pipelines, reference=AdapterOff()), pairs(1))
    assert run.callback_metrics["cost/training_denoiser_rows"] == 4 * B


def test_a_nested_stretch_of_time_is_counted_once():
    watch = Stopwatch()
    with watch.running():
        with watch.running():
            sum(range(10000))
        inner = watch.total
        assert watch.is_running
    assert inner.wall == 0
    assert watch.total.wall > 0
    assert not watch.is_running
    assert not EVALUATION.is_running
