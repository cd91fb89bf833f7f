"""On-policy step pairs: each epoch samples a pool from the policy as it then is, writes it as shards, trains on it."""

from __future__ import annotations

import logging
import re
import shutil
import socket
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal
from uuid import uuid4

import torch
from lightning import LightningDataModule
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch.utils.data import Dataset
from torch.utils.data.distributed import DistributedSampler

from datamodules.pools.folder import (
    QUANTILES,
    SHARE,
    PoolFolder,
    collate_steps,
    digest,
    fingerprint,
    open_pool,
    read_manifest,
    step_pair,
)
from datamodules.prompts import prompt_texts
from datamodules.shards.manifest import Manifest
from datamodules.shards.reader import ShardSet
from datamodules.stream.loading import Caught, PairLoader, as_it_is, ignore_signals
from datamodules.stream.order import StoredOrder
from lightning_modules.batches import StepPairs
from lightning_modules.errors import ConfigError, DataError, UserError
from lightning_modules.policies.base import DiffusionPolicy
from lightning_modules.policies.tiny_decoder import TinyDecoder
from lightning_modules.randomness import generator
from lightning_modules.sampling.step_sampler import Rollout, SeededDraws, StepSampler
from lightning_modules.sampling.step_scorers import StepScorer
from lightning_modules.weights.sharding import FullyShardedStrategy, whole

log = logging.getLogger(__name__)

LatentsDtype = Literal["float32", "float16"]
_POOL_NAME = re.compile(r"pool-\d{5}-[0-9a-f]{12}")


@dataclass(frozen=True)
class Place:
    """Which pool a run stands in, and where the run stood when that pool began.

    Attributes:
        number: of the pool, from 0.
        name: of its folder: below ``pools_dir``, or as given in ``reuse``.
        first_batch: batches that this rank had trained on before it.
        first_sample: pairs that all ranks had.
        batches: of the pool, on each rank.
        batch: pairs a batch over all ranks.
        accumulated: batches an optimizer step.
    """

    number: int
    name: str
    first_batch: int
    first_sample: int
    batches: int
    batch: int
    accumulated: int


class PoolPairs(Dataset[StepPairs]):
    """Item p is the p-th pair of a pool in training order, as a batch of one.

    Args:
        shards: the pool.
        order: a permutation of its pairs.
        first_sample: the position of item 0 in the run's stream of samples.
    """

    def __init__(self, shards: ShardSet, order: Sequence[int], first_sample: int) -> None:
        self.shards, self.order, self.first_sample = shards, order, first_sample
        self.stored = StoredOrder(shards.sizes)

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, p: int) -> StepPairs:
        return step_pair(self.shards.read(*self.stored[self.order[p]]), self.first_sample + p)


class PoolSampler(DistributedSampler[Any]):
    """One rank's positions in a pool, from wherever the run stands in it when it is iterated.

    Batch m of rank r holds the positions (m world + r) b + i, i < b. It subclasses ``DistributedSampler`` only because
    Lightning replaces every other sampler.

    Args:
        batches: of the pool, on each rank.
        batch_size: b.
        rank: r.
        world_size: how many ranks there are.
        seen: asked each time the sampler is iterated: how many batches of the pool have been trained on.
    """

    def __init__(self, batches: int, batch_size: int, rank: int, world_size: int, seen: Callable[[], int]) -> None:
        super().__init__(range(batches * batch_size * world_size), world_size, rank, shuffle=False)  # type: ignore[arg-type]  # only its length
        self.batches, self.batch_size, self.seen = batches, batch_size, seen

    def __len__(self) -> int:
        return self.batches * self.batch_size  # of the whole pool: Lightning counts what was seen itself

    def __iter__(self) -> Iterator[int]:
        for batch in range(self.seen(), self.batches):
            start = (batch * self.num_replicas + self.rank) * self.batch_size
            yield from range(start, start + self.batch_size)


class StepPoolDataModule(LightningDataModule):
    """Batches of ``StepPairs`` that the policy under training has made itself; one Lightning epoch is one pool.

    A pool is made when an epoch begins (``trainer.reload_dataloaders_every_n_epochs: 1``). The ranks share out chunks
    of prompts and write each as one shard; then all read all of them, permuted by (seed, pool number). So every rank
    has equally many batches, however many valid pairs its own prompts gave. What doesn't fill an optimizer step is
    left out and counted (``pool/dropped``).

    Everything random comes from (seed, pool number, prompt). A killed run goes on exactly: a finished pool is read
    again, of an unfinished one only the missing chunks are sampled. A pool's folder is named after its number and a
    hash of the policy's weights and of all settings that shape it, so that no other pool is taken for it.

    ``fill`` makes an array job's part of the next pool and stops. The run that comes after, with the same settings
    and without ``fill``, finds those chunks and samples what is missing. ``reuse`` trains on kept pools, off-policy.

    Logged when a pool begins: ``pool/score``, ``pool/valid_fraction``, ``pool/score_gap`` (over all comparisons, and
    by timestep as in ``pool/score_gap/t751``), quantiles of the gaps (``pool/score_gap/quantile50``), ``pool/pairs``,
    ``pool/dropped``, ``pool/unet_evaluations``, ``pool/decodes``; with a ``decoder`` also ``pool/decoder_agreement``,
    the fraction of the checked comparisons in which the policy's VAE leads to the same best and the same worst
    candidate, and ``pool/decoder_agreement_valid``, of those that both keep or both drop. All of it but
    ``pool/dropped`` stands in the pool's manifest.

    Args:
        prompts: texts, or a file of any kind that ``load_prompts`` reads; needed unless ``reuse`` is given.
        sampler: how pairs are made. eta and guidance scale must be the objective's.
        scorer: who judges the candidates; needed unless ``reuse`` is given.
        decoder: makes the pictures that are judged, in place of the policy's VAE.
        decoder_checks: how many prompts, the first of every pool, are judged behind the VAE too, to see how far the
            decoder leads to the same choices. It changes no pair, and costs these prompts' decodes by the VAE.
        batch_size: pairs a rank a batch.
        prompts_per_pool: how many prompts each pool takes; they are drawn without replacement until all were used.
            None takes all of them every time.
        prompts_per_batch: prompts that are sampled at once, which is a chunk: k times as many samples go through
            the UNet together.
        seed: of prompts, candidates and order.
        num_workers: processes that read shards, a rank.
        pools_dir: a folder for this run's pools alone, shared by all machines; None is ``pools`` in the run folder.
        keep_pools: False deletes a pool once the next one is whole and the last checkpoint doesn't stand in it.
        latents_dtype: of the stored latents. "float16" halves the disk space and moves the last step's log-ratio by
            0.6% (measured at sigma 0.0206).
        min_pairs: a pool with fewer is an error, as is one that doesn't fill an optimizer step.
        fill: [i, n]: sample every n-th chunk of the next pool from the i-th on, and train on nothing.
        reuse: folders of kept pools to train on in turn, one an epoch, in place of sampling.

    Raises:
        ConfigError: settings that contradict each other, the trainer's or the objective's.
        DataError: too few pairs, a folder that can't be written or isn't shared, damaged or missing pools.
    """

    def __init__(
        self,
        sampler: StepSampler,
        batch_size: int,
        prompts: str | list[str] | None = None,
        scorer: StepScorer | None = None,
        decoder: TinyDecoder | None = None,
        decoder_checks: int = 2,
        prompts_per_pool: int | None = None,
        prompts_per_batch: int = 4,
        seed: int = 0,
        num_workers: int = 0,
        pools_dir: str | None = None,
        keep_pools: bool = False,
        latents_dtype: LatentsDtype = "float32",
        min_pairs: int = 0,
        fill: tuple[int, int] | None = None,
        reuse: list[str] | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("batch_size", batch_size), ("prompts_per_batch", prompts_per_batch)):
            if value < 1:
                raise ConfigError(f"data.{name} must be at least 1, got {value}")
        if decoder_checks < 0:
            raise ConfigError(f"data.decoder_checks must be 0 (none) or more prompts, got {decoder_checks}")
        if prompts_per_pool is not None and prompts_per_pool < 1:
            raise ConfigError(f"data.prompts_per_pool must be at least 1, or null for all, got {prompts_per_pool}")
        if reuse is None and (prompts is None or scorer is None):
            raise ConfigError("data.prompts and data.scorer make a pool; give both, or kept pools as data.reuse")
        if reuse == [] or (reuse and fill):
            raise ConfigError("data.reuse names pools to train on: at least one, and none are made, so no data.fill")
        if fill is not None and not 0 <= fill[0] < fill[1]:
            raise ConfigError(f"data.fill is [i, n], part i of n counted from 0, got {list(fill)}")
        if prompts is not None and not len(prompts):
            raise ConfigError("data.prompts is an empty list; give texts, or a prompt file")
        self.sampler, self.scorer, self.batch_size = sampler, scorer, batch_size
        self.decoder, self.decoder_checks = decoder, 0 if decoder is None else decoder_checks
        self.prompts = [] if prompts is None else prompt_texts(prompts)
        self.prompts_per_pool, self.prompts_per_batch = prompts_per_pool, prompts_per_batch
        self.seed, self.num_workers, self.min_pairs = seed, num_workers, min_pairs
        self.pools_dir = None if pools_dir is None else Path(pools_dir)
        self.keep_pools, self.latents_dtype = keep_pools, latents_dtype
        self.fill, self.reuse = fill, reuse
        self._place: Place | None = None
        # The pools that the newest two checkpoints stand in, by step: the newest may turn out to be damaged.
        self._saved: dict[int, str] = {}
        # Called on every rank before each chunk: where a run that is told to end can leave.
        self.between_chunks: Callable[[], None] = lambda: None

    # ------------------------------------------------------------------------------------- checks

    def setup(self, stage: str) -> None:
        if stage != "fit":
            return
        if self._running.reload_dataloaders_every_n_epochs != 1:
            raise ConfigError(
                "an epoch is a pool: set trainer.reload_dataloaders_every_n_epochs to 1, got "
                f"{self._running.reload_dataloaders_every_n_epochs}"
            )
        if not isinstance(self._running.limit_train_batches, int) and self._running.limit_train_batches != 1.0:
            raise ConfigError(
                f"trainer.limit_train_batches is {self._running.limit_train_batches}; with pools give a whole number, "
                "or lower data.prompts_per_pool"
            )
        strategy = self._running.strategy
        if type(strategy) is not DDPStrategy and not isinstance(strategy, SingleDeviceStrategy | FullyShardedStrategy):
            raise ConfigError(
                f"ranks sample different prompts, so each needs whole weights, and {type(strategy).__name__} shards "
                "them; use one device or trainer.strategy=ddp or fsdp2"
            )
        self._check_against_objective("data.sampler", asdict(self.sampler))

    def _check_against_objective(self, whose: str, settings: dict[str, Any]) -> None:
        objective = getattr(self._module, "objective", None)
        for name in ("eta", "guidance_scale"):
            wanted = getattr(objective, name, None)
            if wanted is None:
                raise ConfigError(
                    f"{type(objective).__name__} has no {name}: it doesn't train on pairs of denoising steps; "
                    "use SPO, or PreferencePairsDataModule"
                )
            if settings[name] != wanted:
                raise ConfigError(
                    f"{whose} has {name} {settings[name]}, model.objective has {wanted}: the log-probabilities would "
                    "be of steps that nobody took; set both to the same"
                )

    @property
    def _running(self) -> Any:
        """The trainer, which is there before any hook is called; what is asked of it is beyond its declared types."""
        return self.trainer

    @property
    def _module(self) -> Any:
        return self._running.lightning_module

    # ------------------------------------------------------------------------------------- position

    @property
    def batches_seen(self) -> int:
        """Batches this rank has trained on since the run began: Lightning's own counter, restored on resume."""
        return int(self._running.fit_loop.epoch_loop.batch_progress.total.processed)

    def _seen(self) -> int:
        """Batches of the current pool that were trained on."""
        return 0 if self._place is None else self.batches_seen - self._place.first_batch

    def state_dict(self) -> dict[str, Any]:
        """Where the run stands: plain numbers and strings, the same on every rank."""
        place = self._place
        within = place is not None and self._seen() < place.batches
        step = self._running.global_step
        newer = {**self._saved, step: place.name if place is not None and within else ""}
        self._saved = {step: newer[step] for step in list(newer)[-2:]}
        return {"place": None if self._place is None else asdict(self._place), "seed": self.seed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """
        Raises:
            ConfigError: the checkpoint comes from a run with another seed.
        """
        if self._running.state.fn != "fit":
            return  # evaluating a checkpoint needs none of its data
        if state["seed"] != self.seed:
            raise ConfigError(
                f"the checkpoint was made with data.seed {state['seed']}, this run has {self.seed}; resume with the "
                "same, or start a new run from the exported weights"
            )
        self._place = None if state["place"] is None else Place(**state["place"])
        self._saved = {} if self._place is None else {-1: self._place.name}  # the step is not restored yet

    # ------------------------------------------------------------------------------------- loaders

    def train_dataloader(self) -> PairLoader:
        """The batches of the pool that the run stands in; makes the pool first if a new one begins.

        Derived from Lightning's restored counters alone, so that it may be called any number of times.
        """
        place = self._place
        used_up = place is not None and self._seen() >= place.batches
        if self.fill is not None:
            if place is not None and not used_up:
                raise ConfigError(f"the checkpoint stands within pool {place.number}; there is no next one to fill yet")
            self._make(0 if place is None else place.number + 1)
            return self._nothing_to_train()
        if place is None:
            place = self._begin(0)
        elif used_up:
            if self._ends_here(place):
                return self._loader(None, place)
            place = self._begin(place.number + 1)
        elif (place.batch, place.accumulated) != self._dealt():
            raise ConfigError(
                f"the checkpoint stands within a pool that was dealt as {place.batch} pairs a batch over all ranks, "
                f"{place.accumulated} batches a step, this run asks for {self._dealt()[0]} and {self._dealt()[1]}; "
                "resume with the same product of ranks and batch_size, and the same accumulation"
            )
        self._place = place
        return self._loader(self._open(place), place)

    def _ends_here(self, place: Place) -> bool:
        """After a pool's last batch: whether Lightning still has its epoch to close, or the run is over."""
        trainer = self._running
        epochs = trainer.fit_loop.epoch_progress.current
        over = 0 < (trainer.max_epochs or 0) <= place.number + 1 or 0 <= trainer.max_steps <= trainer.global_step
        return over or epochs.ready > epochs.completed

    def _nothing_to_train(self) -> PairLoader:
        self._running.should_stop = True
        return self._loader(None, Place(0, "", self.batches_seen - 1, 0, 1, 1, 1))

    def _loader(self, pairs: PoolPairs | None, place: Place) -> PairLoader:
        """What is left of a pool; without ``pairs`` nothing is."""
        rank, world = self._running.global_rank, self._running.world_size
        seen = self._seen if pairs is not None else lambda: place.batches
        return PairLoader(
            Caught(pairs if pairs is not None else _Nothing(), collate_steps),
            batch_size=self.batch_size,
            sampler=PoolSampler(place.batches, self.batch_size, rank, world, seen),
            num_workers=self.num_workers if pairs is not None else 0,
            collate_fn=as_it_is,
            pin_memory=torch.cuda.is_available(),
            drop_last=True,
            worker_init_fn=ignore_signals,
        )

    def _open(self, place: Place) -> PoolPairs:
        folder = self._folder(place)
        try:
            shards = open_pool(folder)
        except DataError as error:
            raise DataError(
                f"{error}. The checkpoint stands within the pool {folder}, which is needed to go on from it; resume "
                "from a newer checkpoint, or set data.keep_pools in the run that makes them"
            ) from error
        order = torch.randperm(len(shards), generator=generator(self.seed, "pool order", place.number)).tolist()
        return PoolPairs(shards, order, place.first_sample)

    # ------------------------------------------------------------------------------------- beginning a pool

    def _begin(self, number: int) -> Place:
        """The pool of this number, whole and with enough pairs; sampled unless it is there."""
        name = self.reuse[number % len(self.reuse)] if self.reuse else self._make(number)
        past = self._place
        first_sample = 0 if past is None else past.first_sample + past.batches * past.batch
        batch, accumulated = self._dealt()
        place = Place(number, name, self.batches_seen, first_sample, 0, batch, accumulated)
        manifest = read_manifest(self._folder(place))
        if self.reuse:
            self._check_reused(name, manifest)
        pairs = manifest.counts["pairs"]
        steps = pairs // (batch * accumulated)
        if steps == 0 or pairs < self.min_pairs:
            raise DataError(self._too_few(self._folder(place), manifest, max(self.min_pairs, batch * accumulated)))
        limit = self._running.limit_train_batches
        batches = min(steps * accumulated, limit) if type(limit) is int else steps * accumulated
        place = replace(place, batches=batches)
        # Resuming at an epoch's end, Lightning forgets that epoch's batches only if the new epoch has no more of them
        # than it had; else it would leave out as many of the new pool's.
        current = self._running.fit_loop.epoch_loop.batch_progress.current
        current.completed = max(current.completed, place.batches)
        self._log(manifest, pairs - place.batches * batch)
        if not self.reuse and not self.keep_pools:
            self._delete_others(name)
        return place

    def _dealt(self) -> tuple[int, int]:
        """Pairs a batch over all ranks, and batches an optimizer step."""
        return self.batch_size * self._running.world_size, self._running.accumulate_grad_batches

    def _folder(self, place: Place) -> Path:
        return Path(place.name) if self.reuse else self._pools() / place.name

    def _pools(self) -> Path:
        return self.pools_dir or Path(self._running.default_root_dir) / "pools"

    def _check_reused(self, name: str, manifest: Manifest) -> None:
        made_with = manifest.settings["sampler"]
        self._check_against_objective(name, made_with)
        if made_with["steps"] != self.sampler.steps:
            raise ConfigError(
                f"{name} was sampled in {made_with['steps']} steps, data.sampler.steps is {self.sampler.steps}; make "
                "them equal"
            )

    def _too_few(self, folder: Path, manifest: Manifest, needed: int) -> str:
        counts, made_with = manifest.counts, manifest.settings["sampler"]
        gaps = ", ".join(f"{manifest.statistics[f'score_gap/quantile{q}']:.4f} ({q}%)" for q in QUANTILES)
        return (
            f"the pool {folder} has {counts['pairs']} pairs of {counts['prompts']} prompts, needed are {needed}: an "
            f"optimizer step takes {self._dealt()[0]} a batch over all ranks x {self._dealt()[1]} accumulated, and "
            f"data.min_pairs is {self.min_pairs}. The threshold is {made_with['threshold']}, the score gaps' quantiles "
            f"are {gaps}; lower data.sampler.threshold, raise the scorer's scale, or take more prompts_per_pool"
        )

    def _log(self, manifest: Manifest, dropped: int) -> None:
        counts = {"pairs": float(manifest.counts["pairs"]), "dropped": float(dropped)}
        metrics = {f"pool/{name}": value for name, value in (manifest.statistics | counts).items()}
        for logger in self._running.loggers:
            logger.log_metrics(metrics, step=self._running.global_step)
        log.info("pool of %d pairs, %d dropped: %s", manifest.counts["pairs"], dropped, manifest.statistics)

    def _delete_others(self, name: str) -> None:
        """Pools that neither this run needs from here on, nor a restart from its newest checkpoint."""
        if not self._running.is_global_zero:
            return
        for folder in self._pools().iterdir():
            if _POOL_NAME.fullmatch(folder.name) and folder.name not in (name, *self._saved.values()):
                shutil.rmtree(folder, ignore_errors=True)  # what cannot be deleted is only in the way

    # ------------------------------------------------------------------------------------- making a pool

    def _make(self, number: int) -> str:
        """Sample what is missing of a pool, on all ranks together; the name of its folder."""
        with whole(self._policy.denoiser):  # each rank samples prompts of its own
            return self._make_with_whole_weights(number)

    def _make_with_whole_weights(self, number: int) -> str:
        trainer = self._running
        settings = trainer.strategy.broadcast(self._settings(number))
        # The step counts what the weights have learned; the weights themselves are in the hash.
        name = f"pool-{number:05d}-{digest({**settings, 'policy_step': 0})}"
        numbers = self._prompt_numbers(number)
        pool = PoolFolder(self._pools() / name, -(-len(numbers) // self.prompts_per_batch))
        if trainer.strategy.broadcast(pool.finished):
            return name
        self._together(pool.create)
        self._check_shared(pool)
        missing = trainer.strategy.broadcast(pool.missing())
        self._sample(pool, number, numbers, self._mine(missing))
        if self.fill is None:
            self._together(pool.wait_for_chunks)
        self._together(lambda: self._complete(pool, settings))
        if self.fill is None:
            self._together(pool.wait_for_manifest)
        return name

    def _check_shared(self, pool: PoolFolder) -> None:
        """Rank 0 leaves a file that all others look for: before hours of sampling, not after.

        Raises:
            DataError: some of them don't see it; on every rank.
        """
        trainer = self._running
        if trainer.world_size == 1:
            return
        name = trainer.strategy.broadcast(f".shared-{uuid4().hex}")
        first = trainer.is_global_zero
        try:
            self._together(lambda: pool.mark(name) if first else None)
            here = None if pool.shows(name) else f"{trainer.global_rank} on {socket.gethostname()}"
            found: list[str | None] = [None] * trainer.world_size
            torch.distributed.all_gather_object(found, here)
        finally:
            if first:
                (pool.path / name).unlink(missing_ok=True)
        apart = [rank for rank in found if rank is not None]
        if apart:
            raise DataError(
                f"the pool folder {pool.path} is not shared: what rank 0 writes there does not appear on rank "
                f"{', '.join(apart)}; {SHARE}"
            )

    def _complete(self, pool: PoolFolder, settings: dict[str, Any]) -> None:
        if self._running.is_global_zero and not pool.missing():
            pool.complete(settings)

    def _together(self, work: Callable[[], None]) -> None:
        """Every rank does it, and leaves when all have: if one fails, the others don't wait for it.

        Raises:
            UserError: this rank's failure, or that another's message tells the reason.
        """
        failure = None
        try:
            work()
        except UserError as error:
            failure = error
        fine = self._running.strategy.reduce_boolean_decision(failure is None, all=True)
        if failure is not None:
            raise failure
        if not fine:
            raise DataError("another process of this run could not make its part of the pool; its message says why")

    def _mine(self, missing: Sequence[int]) -> Sequence[int | None]:
        """This rank's chunks: dealt out of what is missing, but among jobs of an array by number.

        Equally many on every rank: None where there is one too few.
        """
        part, parts = self.fill or (0, 1)
        wanted = [chunk for chunk in missing if chunk % parts == part]
        rank, world = self._running.global_rank, self._running.world_size
        return [wanted[first + rank] if first + rank < len(wanted) else None for first in range(0, len(wanted), world)]

    def _settings(self, number: int) -> dict[str, Any]:
        """All that shapes a pool, as plain values."""
        return {
            "pool": number,
            "policy_step": self._running.global_step,
            "policy": fingerprint(self._policy),
            "scorer": f"{type(self._judge).__name__} {fingerprint(self._judge)}",
            "decoder": None if self.decoder is None else fingerprint(self.decoder),
            "sampler": asdict(self.sampler),
            "seed": self.seed,
            "prompts": digest(self.prompts),
            "prompts_per_pool": self.prompts_per_pool,
            "prompts_per_batch": self.prompts_per_batch,
            "latents_dtype": self.latents_dtype,
            "precision": str(self._running.precision),
        }

    @property
    def _policy(self) -> DiffusionPolicy:
        policy = getattr(self._module, "policy", None)
        if not isinstance(policy, DiffusionPolicy):
            raise ConfigError(f"{type(self._module).__name__} has no policy to sample from; use AlignmentModule")
        return policy

    @property
    def _judge(self) -> StepScorer:
        assert self.scorer is not None  # the constructor lets only reuse go without, which makes no pools
        return self.scorer

    def _prompt_numbers(self, number: int) -> list[int]:
        """The pool's prompts as positions in an endless stream of permutations of the file: pass x length + prompt."""
        total = len(self.prompts)
        count = self.prompts_per_pool or total
        numbers: list[int] = []
        for position in range(number * count, (number + 1) * count):
            if not numbers or position % total == 0:
                turn = position // total
                order = torch.randperm(total, generator=generator(self.seed, "prompts", turn)).tolist()
            numbers.append(turn * total + order[position % total])
        return numbers

    def _sample(self, pool: PoolFolder, number: int, numbers: Sequence[int], chunks: Sequence[int | None]) -> None:
        """Roll out the prompts of some chunks and write each; all ranks keep step, so that they can leave together."""
        trainer, sampler, policy = self._running, self.sampler, self._policy
        self._judge.to(policy.device)
        if self.decoder is not None:
            self.decoder.to(policy.device)
        transitions = policy.schedule.inference_timesteps(sampler.steps)[0].tolist()
        hidden = not (trainer.is_global_zero and trainer.progress_bar_callback is not None)
        with Tqdm(total=len(chunks), desc=f"Pool {number}", leave=False, disable=hidden) as bar:
            for chunk in chunks:
                self.between_chunks()
                self._together(partial(self._sample_chunk, pool, number, numbers, chunk, transitions, hidden))
                bar.update()

    def _sample_chunk(
        self,
        pool: PoolFolder,
        number: int,
        numbers: Sequence[int],
        chunk: int | None,
        transitions: list[int],
        hidden: bool,
    ) -> None:
        if chunk is None:
            return
        first = chunk * self.prompts_per_batch
        with self._running.precision_plugin.forward_context():
            checked = max(0, self.decoder_checks - first)
            rollout = self._roll_out(numbers[first : first + self.prompts_per_batch], number, checked, hidden)
        dtype = torch.float16 if self.latents_dtype == "float16" else torch.float32
        pool.write(chunk, first * len(transitions), rollout, transitions, dtype)

    def _roll_out(self, numbers: Sequence[int], pool: int, checked: int, hidden: bool) -> Rollout:
        texts = [self.prompts[number % len(self.prompts)] for number in numbers]
        with Tqdm(total=self.sampler.steps, desc="Steps", leave=False, disable=hidden) as bar:
            return self.sampler.sample(
                self._policy,
                self._judge,
                texts,
                SeededDraws(self.seed, pool, numbers),
                decode=self.decoder,
                after_step=lambda step: bar.update(step - bar.n),
                checked=min(checked, len(numbers)),
            )


class _Nothing(Dataset[Any]):
    """Of a pool of which nothing is left to read."""

    def __len__(self) -> int:
        return 0

    def __getitem__(self, p: int) -> Any:
        raise IndexError(p)
