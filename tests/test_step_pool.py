"""Step pools: what they hold whoever makes them, exact resuming, and one clear message where none can be made."""

import errno
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from jaxtyping import Float
from lightning.pytorch import Callback
from safetensors.torch import load
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_world import make, trained_parameters, trainer
from torch import Tensor
from torch.multiprocessing import ProcessRaisedException

from callbacks.resume.checkpoint_files import AtomicCheckpointIO, newest_checkpoint
from callbacks.resume.checkpointing import RunCheckpoint
from callbacks.resume.exact_resume import ExactResume
from datamodules.pools import folder as pool_folder
from datamodules.pools.fingerprint import fingerprint
from datamodules.pools.folder import PoolFolder, open_pool, read_manifest
from datamodules.pools.position import PoolPosition
from datamodules.pools.samples import step_pair, step_samples
from datamodules.shards.samples import Sample
from datamodules.step_pool import StepPoolDataModule, open_pairs
from datamodules.stream.loading import FaultTolerantDataset, PairLoader, identity
from datamodules.stream.order import StoredOrder
from datamodules.stream.positions import PoolSampler
from experiments import run
from experiments.cli.run_folder import resumable_checkpoint
from lightning_modules.batches import StepPairs
from lightning_modules.errors import ConfigError, DataError
from lightning_modules.objectives.dpo import DPO
from lightning_modules.objectives.spo import SPO
from lightning_modules.references import AdapterOff
from lightning_modules.sampling.comparisons import Comparisons
from lightning_modules.sampling.step_sampler import Rollout, StepSampler
from lightning_modules.sampling.step_scorers import RandomScorer

pytestmark = pytest.mark.filterwarnings("ignore:.*dataloader is not resumable:UserWarning")

PROMPTS = ["a cat", "a dog", "the sea", "a red house", "two birds"]
QUICK = {"steps": 3, "branch_from_step": 1, "candidates": 2, "threshold": 0.1, "guidance_scale": 1.0}


class Killed(Exception):
    pass


class Watched(RandomScorer):
    """Random scores; notes how often it is asked, and can die while a pool is being sampled."""

    def __init__(self, dies_at=None):
        super().__init__()
        self.asked, self.fate = [], [dies_at]

    def score(self, candidates):
        if len(self.asked) == self.fate[0]:
            raise Killed
        self.asked.append(candidates.prompts)
        return super().score(candidates)


def data(scorer=None, sampler=None, **changes):
    settings = {"prompts": PROMPTS, "prompts_per_pool": 3, "prompts_per_batch": 1, "batch_size": 2, "seed": 7}
    scorer = scorer if scorer is not None or "reuse" in changes else Watched()
    return StepPoolDataModule(StepSampler(**(QUICK | (sampler or {}))), scorer=scorer, **(settings | changes))


def pool_trainer(folder, *callbacks, **options):
    return trainer(folder, *callbacks, **({"max_epochs": 1, "reload_dataloaders_every_n_epochs": 1} | options))


def fit(pipelines, folder, pools, *callbacks, objective=None, ckpt_path=None, changed=None, **options):
    module = make(pipelines, reference=AdapterOff(), objective=objective or SPO(guidance_scale=1.0))
    for name, value in (changed or {}).items():
        setattr(module.policy, name, value(getattr(module.policy, name)))
    running = pool_trainer(folder, *callbacks, **options)
    running.fit(module, pools, ckpt_path=ckpt_path)
    return module, running


def trained(module):
    return torch.cat([parameter.detach().flatten() for parameter in trained_parameters(module.policy)])


def pools_in(folder):
    return sorted((folder / "pools").iterdir())


def content(folder):
    shards = open_pool(folder)
    order = StoredOrder(shards.sizes)
    return [step_pair(shards.read(*order[n]), n) for n in range(len(shards))]


# ------------------------------------------------------------------------------------------- content


@pytest.fixture(scope="module")
def made(tmp_path_factory, pipelines):
    """A pool of three prompts, sampled one by one, and the weights that trained on it."""
    folder = tmp_path_factory.mktemp("made")
    module, running = fit(pipelines, folder, data())
    (pool,) = pools_in(folder)
    return pool, trained(module), running


def test_a_pool_is_an_ordinary_folder_of_shards_that_tells_how_it_came_about(made):
    pool, _, running = made
    manifest = read_manifest(pool)
    pairs = content(pool)
    assert manifest.counts == {"prompts": 3, "comparisons": 6, "pairs": len(pairs)}
    assert running.global_step == len(pairs) // 2
    assert manifest.settings["sampler"] | QUICK | {"eta": 1.0} == manifest.settings["sampler"]
    assert (manifest.settings["seed"], manifest.settings["policy_step"]) == (7, 0)
    assert manifest.statistics["valid_fraction"] == pytest.approx(len(pairs) / 6)
    # The control asks for no x0-predictions: a pass for each of three steps of three prompts, without guidance.
    assert manifest.statistics["unet_evaluations"] == 3 * 3
    assert {pair.timesteps.item() for pair in pairs} <= {334, 1}
    assert all(pair.score_gap > 0.1 for pair in pairs)
    assert not list(pool.glob(".*"))


@pytest.mark.parametrize("how", ["another chunk size", "two jobs"])
def test_a_pool_holds_the_same_whoever_samples_it(made, pipelines, tmp_path, how):
    if how == "two jobs":
        for part in (0, 1):
            fit(pipelines, tmp_path, data(fill=(part, 2)))
    else:
        fit(pipelines, tmp_path, data(prompts_per_batch=3))
    (pool,) = pools_in(tmp_path)
    expected, found = content(made[0]), content(pool)
    assert [(p.prompts, p.timesteps) for p in found] == [(p.prompts, p.timesteps) for p in expected]
    for one, other in zip(found, expected):
        for name in ("latents", "chosen", "rejected", "score_gap"):
            torch.testing.assert_close(getattr(one, name), getattr(other, name), atol=1e-4, rtol=0)
    assert read_manifest(pool).statistics == pytest.approx(read_manifest(made[0]).statistics, abs=1e-4)


def test_jobs_that_fill_a_pool_train_nothing_and_the_run_finds_their_chunks(made, pipelines, tmp_path):
    module, running = fit(pipelines, tmp_path, data(fill=(0, 1)))
    assert running.global_step == 0
    scorer = Watched()
    module, _ = fit(pipelines, tmp_path, data(scorer))
    assert scorer.asked == []
    assert torch.equal(trained(module), made[1])


def test_kept_pools_train_without_sampling(made, pipelines, tmp_path):
    pool, weights, _ = made
    module, _ = fit(pipelines, tmp_path, data(reuse=[str(pool)], prompts=None))
    assert torch.equal(trained(module), weights)
    assert list(tmp_path.iterdir()) == []


def test_latents_in_half_precision_and_inner_steps(pipelines, tmp_path):
    fit(pipelines, tmp_path, data(sampler={"num_inner_step": 1}, latents_dtype="float16"))
    (pool,) = pools_in(tmp_path)
    pairs = content(pool)
    shared = [torch.equal(pair.latents, pair.rejected_latents) for pair in pairs]
    # Each comparison gives the transition that shares its x_t, then the one that doesn't.
    assert shared == [True, False] * (len(pairs) // 2)
    shards = open_pool(pool)
    assert {value.dtype for value in shards.read(0, 0).tensors("step").values()} == {torch.float16}


def test_prompts_run_through_the_file_before_any_comes_again():
    pools = data(prompts_per_pool=3)
    numbers = [n for pool in range(5) for n in pools.recipe.prompt_numbers(pool)]
    assert sorted(numbers) == list(range(15))  # three passes of five; the draws of each number are its own
    assert numbers[:5] != sorted(numbers[:5])
    assert sorted(data(prompts_per_pool=None).recipe.prompt_numbers(1)) == [5, 6, 7, 8, 9]


def test_ranks_have_equal_batches_disjoint_and_resume_where_they_were():
    one = list(PoolSampler(3, 4, 0, 1, lambda: 0))
    ranks = [list(PoolSampler(3, 2, rank, 2, lambda: 0)) for rank in (0, 1)]
    assert one == list(range(12))
    assert ranks == [[0, 1, 4, 5, 8, 9], [2, 3, 6, 7, 10, 11]]
    assert list(PoolSampler(3, 2, 1, 2, lambda: 2)) == [10, 11]


def test_a_fingerprint_follows_trained_weights_and_settings_alone(pipelines):
    policy = make(pipelines, objective=SPO(), reference=AdapterOff()).policy
    before = fingerprint(policy)
    assert fingerprint(policy.train()) == before
    with torch.no_grad():
        next(iter(trained_parameters(policy))).view(-1)[3] += 1e-6
    assert fingerprint(policy) != before
    assert fingerprint(RandomScorer(1.0)) != fingerprint(RandomScorer(2.0))


def other_betas(schedule):
    """What another ``scheduler_config.json`` of the same base makes: noisier at every timestep."""
    return replace(schedule, alphas_cumprod=schedule.alphas_cumprod**1.01)


def other_prediction(schedule):
    return replace(schedule, prediction_type="v_prediction")


@pytest.mark.parametrize("change", [other_betas, other_prediction])
def test_a_pool_of_another_noise_schedule_is_not_mistaken(made, pipelines, tmp_path, change):
    shutil.copytree(made[0].parent, tmp_path / "pools")
    same, other = Watched(), Watched()
    fit(pipelines, tmp_path, data(same, keep_pools=True))
    fit(pipelines, tmp_path, data(other, keep_pools=True), changed={"schedule": change})
    assert (len(same.asked), len(other.asked)) == (0, 6)
    assert len(pools_in(tmp_path)) == 2


def test_a_reused_pool_must_be_of_the_same_noise_schedule_and_latents(made, pipelines, tmp_path):
    reuse = {"reuse": [str(made[0])], "prompts": None}
    with pytest.raises(ConfigError, match="was sampled with another noise schedule than this run's policy has"):
        fit(pipelines, tmp_path, data(**reuse), changed={"schedule": other_betas})
    with pytest.raises(ConfigError, match=r"holds latents of shape \(4, 8, 8\), this run's policy makes \(4, 16, 16\)"):
        fit(pipelines, tmp_path, data(**reuse), changed={"image_size": lambda side: 2 * side})


def test_a_fingerprint_covers_buffers_and_tuples(pipelines):
    """A reward's normalization, for one, is in buffers."""
    network = RandomScorer()
    network.register_buffer("mean", torch.zeros(3))
    network.layers = (1, 2)
    found = {fingerprint(network)}
    network.mean[1] = 0.5
    found.add(fingerprint(network))
    network.layers = (1, 3)
    found.add(fingerprint(network))
    assert len(found) == 3


def none_compared():
    whole, none = torch.zeros(0, dtype=torch.int64), torch.zeros(0)
    return Comparisons(whole, whole, torch.zeros(0, 2), none, *[none.bool()] * 4)


def test_a_pool_stores_the_better_candidate_as_chosen_and_gives_it_back_so():
    """Written and read by hand on the other side: both could have swapped the same two."""
    values = {"latents": 0.0, "chosen": 1.0, "rejected": -1.0, "rejected_latents": 0.5}
    rows = {name: torch.full((2, 4, 2, 2), value) for name, value in values.items()}
    times = torch.tensor([9, 5])
    pairs = StepPairs(**rows, timesteps=times, next_timesteps=times - 4, prompts=("a", "b"),
                      score_gap=torch.tensor([0.25, 0.5]), indices=torch.arange(2))  # fmt: skip
    rollout = Rollout(pairs, torch.tensor([1, 0]), none_compared(), unet_evaluations=0, decodes=0)
    (first, one), (second, two) = step_samples(rollout, 10, [9, 5], torch.float32)
    assert (first, second) == (10 + 0 * 2 + 1, 10 + 1 * 2 + 0)  # by prompt, then step
    for members, caption, timestep, gap in ((one, "b", 5, 0.5), (two, "a", 9, 0.25)):
        stored = load(members["step.safetensors"])
        assert {name: value.unique().item() for name, value in stored.items()} == values
        info = json.loads(members["json"])
        assert info == {"caption": caption, "timestep": timestep, "prev_timestep": timestep - 4, "score_gap": gap}
        read = step_pair(Sample("here", "1", members), 3)
        assert {name: getattr(read, name).unique().item() for name in values} == values
        assert (read.prompts, read.timesteps.item(), read.next_timesteps.item()) == ((caption,), timestep, timestep - 4)
        assert (read.score_gap.item(), read.indices.item()) == (gap, 3)


@dataclass(frozen=True)
class WeightedPairs(StepPairs):
    """Step pairs with two fields more, which nothing in the packages knows."""

    weight: Float[Tensor, " b"] | None = None
    mask: Float[Tensor, "b c h w"] | None = None


def test_a_new_field_of_step_pairs_is_joined_moved_and_stored_without_a_word_elsewhere():
    latents, numbers = torch.zeros(1, 4, 2, 2), torch.tensor([5])

    def pair(value):
        extra = {"weight": torch.tensor([value]), "mask": latents + value}
        return WeightedPairs(
            latents, latents, latents, numbers, numbers - 1, ("a",), torch.tensor([0.5]), numbers, **extra
        )

    (batch,) = PairLoader(FaultTolerantDataset([pair(1.0), pair(2.0)]), batch_size=2, collate_fn=identity)
    assert batch.to(torch.float64).weight.tolist() == [1.0, 2.0]
    rollout = Rollout(batch, torch.tensor([0, 1]), none_compared(), unet_evaluations=0, decodes=0)
    stored = [members for _, members in step_samples(rollout, 0, [5], torch.float32)]
    read = [step_pair(Sample("here", str(n), members), n, WeightedPairs) for n, members in enumerate(stored)]
    assert [pair.weight.item() for pair in read] == [pair.mask.mean().item() for pair in read] == [1.0, 2.0]
    assert step_pair(Sample("here", "0", stored[0]), 0).prompts == ("a",)


def test_pools_of_the_same_size_are_read_in_orders_of_their_own(made):
    def order(number, seed=7):
        return list(open_pairs(made[0], seed, PoolPosition(number, "", 0, 0, 1, 1, 1)).order)

    first, second, other_seed = order(0), order(1), order(0, seed=8)
    assert sorted(first) == sorted(second) == list(range(len(content(made[0]))))
    assert first != second
    assert first != other_seed
    assert first == order(0)


def test_each_pass_through_the_prompts_has_an_order_of_its_own():
    recipe = data(prompts=[str(n) for n in range(20)], prompts_per_pool=20).recipe
    passes = [[number % 20 for number in recipe.prompt_numbers(pool)] for pool in range(2)]
    assert sorted(passes[0]) == sorted(passes[1]) == list(range(20))
    assert passes[0] != passes[1]
    assert recipe.texts([23, 4]) == ["3", "4"]


# ------------------------------------------------------------------------------------------ resuming


class DiesAfter(Callback):
    def __init__(self, step):
        self.step = step

    def on_train_batch_end(self, trainer, module, outputs, batch, index):
        if trainer.global_step == self.step:
            raise Killed


def long_run(pipelines, folder, scorer=None, dies_after=None, resume=False, every_n_steps=1, keep=1, **options):
    """Three pools of 3, 2 and 3 steps; a checkpoint after every step."""
    callbacks = [RunCheckpoint(every_n_steps, keep), ExactResume()]
    callbacks += [] if dies_after is None else [DiesAfter(dies_after)]
    checkpoint = folder / "checkpoints" / "last.ckpt"
    return fit(
        pipelines, folder, data(scorer, prompts_per_pool=5, sampler={"threshold": 0.3}), *callbacks,
        enable_checkpointing=True, plugins=[AtomicCheckpointIO()],
        ckpt_path=checkpoint if resume else None, **({"max_epochs": 3} | options),
    )  # fmt: skip


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, pipelines):
    folder = tmp_path_factory.mktemp("whole")
    scorer = Watched()
    module, running = long_run(pipelines, folder, scorer)
    return trained(module), running, scorer, folder


def test_pools_that_nothing_needs_are_deleted_and_the_last_ones_stay(uninterrupted):
    _, running, scorer, folder = uninterrupted
    assert running.current_epoch == 3
    assert len(scorer.asked) == 3 * 5 * 2
    # The second pool stays while no checkpoint stands in the third when that one is whole.
    assert [pool.name[:10] for pool in pools_in(folder)] in (["pool-00001", "pool-00002"], ["pool-00002"])


@pytest.mark.parametrize("dies_after", [1, 3, 4, 6])
def test_a_run_killed_in_training_goes_on_exactly(uninterrupted, pipelines, tmp_path, dies_after):
    """1: before any checkpoint; 3: within a pool; 4 and 6: with the last checkpoint at a pool's end."""
    with pytest.raises(Killed):
        long_run(pipelines, tmp_path, dies_after=dies_after)
    module, running = long_run(pipelines, tmp_path, resume=dies_after > 1)
    assert running.global_step == uninterrupted[1].global_step
    assert torch.equal(trained(module), uninterrupted[0])


@pytest.mark.parametrize("every_n_steps", [1, 100])
@pytest.mark.parametrize("first", [1, 2])
def test_a_finished_run_goes_on_with_more_pools(uninterrupted, pipelines, tmp_path, first, every_n_steps):
    """The checkpoint is of the last batch's end, or of the training's."""
    long_run(pipelines, tmp_path, max_epochs=first, every_n_steps=every_n_steps)
    module, running = long_run(pipelines, tmp_path, resume=True, every_n_steps=every_n_steps)
    assert running.global_step == uninterrupted[1].global_step
    assert torch.equal(trained(module), uninterrupted[0])


def test_a_run_killed_in_sampling_keeps_its_finished_chunks(uninterrupted, pipelines, tmp_path):
    scorer = Watched(dies_at=10 + 5)  # in the second pool's third prompt
    with pytest.raises(Killed):
        long_run(pipelines, tmp_path, scorer)
    second = Watched()
    module, _ = long_run(pipelines, tmp_path, second, resume=True)
    assert torch.equal(trained(module), uninterrupted[0])
    assert len(second.asked) == 3 * 5 * 2 - 10 - 4


def test_relaunching_a_finished_run_samples_nothing(uninterrupted, pipelines):
    weights, _, _, folder = uninterrupted
    before, scorer = pools_in(folder), Watched()
    module, _ = long_run(pipelines, folder, scorer, resume=True)
    assert torch.equal(trained(module), weights)
    assert scorer.asked == []
    assert pools_in(folder) == before


def test_pools_are_kept_on_request_and_a_pool_of_other_weights_is_not_mistaken(pipelines, tmp_path):
    scorer = Watched()
    fit(pipelines, tmp_path, data(scorer, keep_pools=True), max_epochs=2)
    assert [pool.name[:10] for pool in pools_in(tmp_path)] == ["pool-00000", "pool-00001"]
    # Another learning history in the same folder: pool 0 is of the same untrained weights, pool 1 is not.
    again = Watched()
    fit(pipelines, tmp_path, data(again, keep_pools=True), max_epochs=2, objective=SPO(beta=1.0, guidance_scale=1.0))
    assert len(again.asked) == len(scorer.asked) // 2
    assert len(pools_in(tmp_path)) == 3


def test_a_pool_that_a_checkpoint_needs_and_that_is_gone_is_named(pipelines, tmp_path):
    with pytest.raises(Killed):
        long_run(pipelines, tmp_path, dies_after=3)
    first, *_ = pools_in(tmp_path)
    message = rf"within the pool .*{first.name}, .*\(pools that are there: {{}}\); put it back, or give the --ckpt_path"
    other = first.with_name("pool-00007-0123456789ab")
    shutil.copytree(first, other)
    shutil.rmtree(first)
    with pytest.raises(DataError, match=message.format(other.name)):
        long_run(pipelines, tmp_path, resume=True)
    shutil.rmtree(other)
    with pytest.raises(DataError, match=message.format("none")):
        long_run(pipelines, tmp_path, resume=True)


def test_auto_goes_back_to_a_checkpoint_whose_pool_is_there(uninterrupted, pipelines, tmp_path, caplog):
    """Killed within the third pool, which is gone: the end of the second one is the newest place to resume from."""
    with pytest.raises(Killed):
        long_run(pipelines, tmp_path, dies_after=7, every_n_steps=2, keep=-1)
    newest = newest_checkpoint(tmp_path / "checkpoints")
    assert resumable_checkpoint(data(), tmp_path, newest) == newest
    gone = pools_in(tmp_path)[-1]
    shutil.rmtree(gone)
    with caplog.at_level("INFO"):
        older = resumable_checkpoint(data(), tmp_path, newest)
    assert step_of(older) < step_of(newest)
    assert f"{newest} is within the pool {gone}, which is gone" in caplog.text
    assert f"; resuming from {older}" in caplog.text
    shutil.copy(older, tmp_path / "checkpoints" / "last.ckpt")
    module, _ = long_run(pipelines, tmp_path, resume=True)
    assert torch.equal(trained(module), uninterrupted[0])
    assert resumable_checkpoint(data(), tmp_path, None) is None
    assert resumable_checkpoint(object(), tmp_path, newest) == newest


def step_of(file):
    return torch.load(file, weights_only=True)["global_step"]


def test_within_a_pool_batches_cannot_change_size(pipelines, tmp_path):
    with pytest.raises(Killed):
        long_run(pipelines, tmp_path, dies_after=3)
    with pytest.raises(ConfigError, match="2 pairs per batch over all ranks, 1 batches per step, .* for 2 and 2"):
        long_run(pipelines, tmp_path, resume=True, accumulate_grad_batches=2)


# ------------------------------------------------------------------------------------------ messages


def test_too_few_pairs_name_the_threshold_and_the_gaps(pipelines, tmp_path):
    message = r"has 0 pairs of 3 prompts, needed are 2: .* threshold is 0.999, .* 0\.\d+ \(50%\)"
    with pytest.raises(DataError, match=message):
        fit(pipelines, tmp_path, data(sampler={"threshold": 0.999}))
    with pytest.raises(DataError, match="needed are 100: .* data.min_pairs is 100"):
        fit(pipelines, tmp_path, data(min_pairs=100))


@pytest.mark.parametrize(
    ("sampler", "objective", "message"),
    [
        ({"eta": 0.5}, SPO(guidance_scale=1.0), "data.sampler has eta 0.5, model.objective has 1.0"),
        ({}, SPO(guidance_scale=3.0), "data.sampler has guidance_scale 1.0, model.objective has 3.0"),
        ({}, DPO(), "DPO has no eta: it doesn't train on pairs of denoising steps"),
    ],
)
def test_sampler_and_objective_must_agree(pipelines, tmp_path, sampler, objective, message):
    with pytest.raises(ConfigError, match=message):
        fit(pipelines, tmp_path, data(sampler=sampler), objective=objective)


def test_a_reused_pool_must_agree_with_the_objective_and_the_steps(made, pipelines, tmp_path):
    reuse = {"reuse": [str(made[0])]}
    with pytest.raises(ConfigError, match="has eta 1.0, model.objective has 0.5"):
        fit(pipelines, tmp_path, data(sampler={"eta": 0.5}, **reuse), objective=SPO(eta=0.5, guidance_scale=1.0))
    with pytest.raises(ConfigError, match="was sampled in 3 steps, data.sampler.steps is 4"):
        fit(pipelines, tmp_path, data(sampler={"steps": 4}, **reuse))


def test_an_epoch_must_be_a_pool(pipelines, tmp_path):
    with pytest.raises(ConfigError, match="set trainer.reload_dataloaders_every_n_epochs to 1, got 0"):
        fit(pipelines, tmp_path, data(), reload_dataloaders_every_n_epochs=0)
    with pytest.raises(ConfigError, match="limit_train_batches is 0.5"):
        fit(pipelines, tmp_path, data(), limit_train_batches=0.5)
    with pytest.raises(ConfigError, match="limit_train_batches 1 ends an epoch after 1 batches, within an opt"):
        fit(pipelines, tmp_path, data(batch_size=1), limit_train_batches=1, accumulate_grad_batches=2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, "data.batch_size must be at least 1, got 0"),
        ({"prompts_per_pool": 0}, "data.prompts_per_pool must be at least 1"),
        ({"prompts": None}, "data.prompts and data.scorer make a pool"),
        ({"prompts": []}, "data.prompts is an empty list"),
        ({"reuse": []}, "data.reuse names pools to train on: at least one"),
        ({"reuse": ["a"], "fill": (0, 1)}, "so no data.fill"),
        ({"fill": (2, 2)}, r"data.fill is \[i, n\], part i of n counted from 0, got \[2, 2\]"),
    ],
)
def test_settings_that_make_no_sense(changes, message):
    with pytest.raises(ConfigError, match=message):
        data(**changes)


def test_a_folder_that_cannot_be_made_is_named(pipelines, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot make the pool folder .*file/pools/pool-00000-.*data.pools_dir"):
        fit(pipelines, tmp_path, data(pools_dir=str(tmp_path / "file" / "pools")))


def test_a_full_disk_leaves_nothing_half_written(pipelines, tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DataError, match="cannot write .*00000.tar: .*No space left on device"):
        fit(pipelines, tmp_path, data())
    (pool,) = pools_in(tmp_path)
    assert list(pool.iterdir()) == []


class OnItsOwn(StepPoolDataModule):
    """Each rank in a working folder of its own, as on machines of their own; notes why it ended."""

    def train_dataloader(self):
        own = Path(self.trainer.default_root_dir) / str(self.trainer.global_rank)
        own.mkdir(parents=True)
        os.chdir(own)
        try:
            return super().train_dataloader()
        except DataError as error:
            Path("told").write_text(str(error))
            self.trainer.strategy.barrier()  # the first process to end ends the others
            raise


def test_ranks_that_do_not_share_the_folder_are_told_before_they_sample(pipelines, tmp_path, monkeypatch):
    monkeypatch.setattr(pool_folder, "VISIBLE_WITHIN_SECONDS", 0.0)
    pools = OnItsOwn(StepSampler(**QUICK), 2, PROMPTS, Watched(dies_at=0), pools_dir="pools")
    with pytest.raises(ProcessRaisedException, match="DataError"):
        fit(pipelines, tmp_path, pools, devices=2, strategy="ddp_fork")
    told = [(tmp_path / rank / "told").read_text() for rank in "01"]
    assert told[0] == told[1]
    assert re.fullmatch(
        r"the pool folder pools/pool-00000-\w+ is not shared: what rank 0 writes there does not appear on "
        rf"rank 1 on {re.escape(socket.gethostname())}; give a folder that all machines share as data.pools_dir",
        told[0],
    )
    assert not [path for rank in "01" for path in (tmp_path / rank / "pools").rglob("*") if path.is_file()]


def test_a_folder_that_machines_do_not_share_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(pool_folder, "VISIBLE_WITHIN_SECONDS", 0.0)
    pool = PoolFolder(tmp_path, 3)
    (tmp_path / "00001.json").write_text("{}")
    with pytest.raises(DataError, match="2 of 3 chunks .the first is 0. .* give a folder that all machines share"):
        pool.wait_for_chunks()
    with pytest.raises(DataError, match="manifest.json does not appear on this machine"):
        pool.wait_for_manifest()


# -------------------------------------------------------------------------------------- two processes

CONFIG = """
seed_everything: 0
trainer:
  accelerator: cpu
  strategy: {strategy}
  devices: {devices}
  max_epochs: 2
  reload_dataloaders_every_n_epochs: 1
  log_every_n_steps: 1
  enable_progress_bar: false
model:
  class_path: AlignmentModule
  init_args:
    policy: {{class_path: StableDiffusion, init_args: {{pretrained: {pipelines}/tiny-sd15, adaptation: LoRA}}}}
    objective: {{class_path: SPO, init_args: {{eta: 1.0, guidance_scale: 2.0}}}}
    reference: AdapterOff
    optimizer: {{class_path: torch.optim.SGD, init_args: {{lr: 1.0}}}}
    seed: ${{seed_everything}}
data:
  class_path: StepPoolDataModule
  init_args:
    prompts: [a cat, a dog, the sea]
    sampler:
      steps: 3
      branch_from_step: 1
      candidates: 2
      threshold: 0.3
      eta: ${{model.init_args.objective.init_args.eta}}
      guidance_scale: ${{model.init_args.objective.init_args.guidance_scale}}
    scorer: {{class_path: RandomScorer}}
    prompts_per_batch: 1
    batch_size: {batch_size}
    keep_pools: true
    seed: ${{seed_everything}}
"""


def words(folder, name, pipelines, devices, batch_size):
    strategy = "ddp" if devices > 1 else "auto"
    config = folder / f"{name}.yaml"
    config.write_text(CONFIG.format(pipelines=pipelines, strategy=strategy, devices=devices, batch_size=batch_size))
    return ["--config", str(config), "--run_dir", str(folder / name)]


def last_checkpoint(folder):
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)


def losses(folder):
    events = EventAccumulator(str(folder))
    events.Reload()
    # At the end of an epoch Lightning logs its last step again.
    return list({event.step: event.value for event in events.Scalars("train/loss")}.values())


def pairs_of_ranks(pool):
    """Chunks 0 and 2 are rank 0's, chunk 1 is rank 1's."""
    shards = [json.loads((pool / f"0000{chunk}.json").read_text())["shard"] for chunk in range(3)]
    pairs = [0 if shard is None else shard["samples"] for shard in shards]
    return pairs[0] + pairs[2], pairs[1]


def test_two_processes_that_find_unequally_many_pairs_or_none_learn_what_one_does(tmp_path, pipelines, monkeypatch):
    """Rank 1 finds no pair for the first pool and fewer than rank 0 for the second; its steps are as many."""
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # Lightning calls the parser by an older name
    run.main(words(tmp_path, "one", pipelines, devices=1, batch_size=2))
    result = subprocess.run(
        [sys.executable, "-m", "experiments.run", *words(tmp_path, "two", pipelines, devices=2, batch_size=1)],
        capture_output=True, text=True, timeout=240, check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    assert [pairs_of_ranks(pool) for pool in pools_in(tmp_path / "two")] == [(3, 0), (3, 2)]
    one, two = last_checkpoint(tmp_path / "one"), last_checkpoint(tmp_path / "two")
    assert one["global_step"] == two["global_step"] == 3 // 2 + 5 // 2
    for name, value in one["state_dict"].items():
        torch.testing.assert_close(two["state_dict"][name], value, rtol=0, atol=1e-5)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4, abs=1e-6)
    assert len(losses(tmp_path / "two")) == 3
