"""On-policy step pairs: each epoch samples a pool from the policy as it then is, writes it as shards, trains on it.

Logged when a pool begins: ``pool/score``, ``pool/valid_fraction``, ``pool/score_gap`` (over all comparisons, and
by timestep as in ``pool/score_gap/t751``), quantiles of the gaps (``pool/score_gap/quantile50``), ``pool/pairs``,
``pool/dropped``, ``pool/unet_evaluations``, ``pool/decodes``; with a ``decoder`` also ``pool/decoder_agreement``,
the fraction of the checked comparisons in which the policy's VAE leads to the same best and the same worst
candidate, and ``pool/decoder_agreement_valid``, of those that both keep or both drop. All of it but
``pool/dropped`` stands in the pool's manifest.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch.utils.data import Dataset

from datamodules.pools.fingerprint import schedule_fingerprint
from datamodules.pools.folder import QUANTILES, delete_pools, finished_pools, open_pool, read_manifest
from datamodules.pools.maker import LatentsDtype, PoolMaker, PoolRecipe
from datamodules.pools.position import PoolPosition
from datamodules.pools.samples import PoolPairs, step_pair
from datamodules.prompts import prompt_texts
from datamodules.shards.manifest import MANIFEST, Manifest
from datamodules.stream.cursor import CursorDataModule, Segment
from datamodules.stream.loading import FaultTolerantDataset, PairLoader, identity, ignore_signals
from datamodules.stream.order import StoredOrder
from datamodules.stream.positions import PoolSampler
from lightning_modules.errors import ConfigError, DataError
from lightning_modules.files import resolved_path
from lightning_modules.lightning_internals import SavedProgress, epoch_is_open, expect_batches
from lightning_modules.policies.base import DiffusionPolicy
from lightning_modules.policies.tiny_decoder import TinyDecoder
from lightning_modules.randomness import generator
from lightning_modules.sampling.step_sampler import StepSampler
from lightning_modules.sampling.step_scorers import StepScorer
from lightning_modules.weights.sharding import FullyShardedStrategy

log = logging.getLogger(__name__)


class StepPoolDataModule(CursorDataModule):
    """Batches of ``StepPairs`` that the policy under training has made itself; one Lightning epoch is one pool.

    A pool is made when an epoch begins (``trainer.reload_dataloaders_every_n_epochs: 1``). The ranks share out chunks
    of prompts and write each as one shard; then all read all of them, permuted by (seed, pool number). So every rank
    has equally many batches, however many valid pairs its own prompts gave. What doesn't fill an optimizer step is
    left out and counted (``pool/dropped``).

    Everything random comes from (seed, pool number, prompt). A killed run resumes exactly: a finished pool is read
    again, of an unfinished one only the missing chunks are sampled. A pool's folder is named after its number and a
    hash of the policy's weights and of all settings that shape it, so that no other pool is taken for it.

    ``fill`` makes an array job's part of the next pool and stops. The run that comes after, with the same settings
    and without ``fill``, finds those chunks and samples what is missing. ``reuse`` trains on kept pools, off-policy.

    Args:
        prompts: texts, or a file of any kind that ``load_prompts`` reads; needed unless ``reuse`` is given.
        sampler: how pairs are made. eta and guidance scale must be the objective's.
        scorer: who judges the candidates; needed unless ``reuse`` is given.
        decoder: makes the pictures that are judged, in place of the policy's VAE.
        decoder_checks: how many prompts, the first of every pool, are judged behind the VAE too, to see how far the
            decoder leads to the same choices. It changes no pair, and costs these prompts' decodes by the VAE.
        batch_size: pairs per rank and batch.
        pairs_per_step: pairs per optimizer step over all ranks, by accumulation; None leaves it to the trainer.
        prompts_per_pool: prompts of each pool, drawn without replacement until all were used; None takes all.
        prompts_per_batch: prompts that are sampled at once, which is a chunk: k times as many samples go through
            the UNet together.
        seed: seed of prompts, candidates and order.
        num_workers: processes that read shards, a rank.
        pools_dir: a folder for this run's pools alone, shared by all machines; None is ``pools`` in the run folder.
        keep_pools: False deletes a pool once the next one is whole and the last checkpoint doesn't stand in it.
        latents_dtype: number type of the stored latents. "float16" halves the disk space and moves the last step's
            log-ratio by 0.6% (measured at sigma 0.0206).
        min_pairs: a pool with fewer is an error, as is one that doesn't fill an optimizer step.
        fill: [i, n]: sample every n-th chunk of the next pool from the i-th on, and train on nothing.
        reuse: folders of kept pools to train on in turn, one per epoch, in place of sampling.

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
        pairs_per_step: int | None = None,
    ) -> None:
        super().__init__(batch_size, pairs_per_step)
        check_settings(prompts, scorer, decoder, decoder_checks, fill, reuse)
        texts = [] if prompts is None else prompt_texts(prompts)
        self.recipe = PoolRecipe(sampler, texts, prompts_per_pool, prompts_per_batch, seed, latents_dtype)
        self.sampler, self.scorer = sampler, scorer
        self.decoder, self.decoder_checks = decoder, 0 if decoder is None else decoder_checks
        self.seed, self.num_workers, self.min_pairs = seed, num_workers, min_pairs
        self.pools_dir = None if pools_dir is None else resolved_path(pools_dir)
        self.keep_pools, self.fill, self.reuse = keep_pools, fill, reuse
        self._position: PoolPosition | None = None
        # The pools that the newest two checkpoints are in, by step: the newest may turn out to be damaged.
        self._saved: dict[int, str] = {}
        # Called on every rank before each chunk: where a run that is told to end can leave.
        self.between_chunks: Callable[[], None] = lambda: None

    # ------------------------------------------------------------------------------------- checks

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if stage == "fit":
            check_trainer(self._running)
            check_objective(self._objective, "data.sampler", asdict(self.sampler))
            check_decoder(self._running.lightning_module, self.decoder, self.decoder_checks)
        if self.scorer is not None:
            self.scorer.check(self._policy)

    @property
    def _running(self) -> Any:
        """The trainer, which is there before any hook is called; what is asked of it is beyond its declared types."""
        return self.trainer

    @property
    def _objective(self) -> Any:
        return getattr(self._running.lightning_module, "objective", None)

    @property
    def _policy(self) -> DiffusionPolicy:
        return policy_of(self._running.lightning_module)

    # ------------------------------------------------------------------------------------- position

    @property
    def segment(self) -> Segment:
        return Segment() if self._position is None else self._position.segment

    def _seen(self) -> int:
        """Batches of the current pool that were trained on."""
        return 0 if self._position is None else self.batches_seen - self._position.first_batch

    def state_dict(self) -> dict[str, Any]:
        """Where the run is: plain numbers and strings, the same on every rank."""
        position = self._position
        within = position is not None and self._seen() < position.batches
        step = self._running.global_step
        newer = {**self._saved, step: position.name if position is not None and within else ""}
        self._saved = {step: newer[step] for step in list(newer)[-2:]}
        return {"place": None if position is None else asdict(position), "seed": self.seed}

    def restore(self, state: dict[str, Any]) -> None:
        """
        Raises:
            ConfigError: the checkpoint comes from a run with another seed.
        """
        if state["seed"] != self.seed:
            raise ConfigError(
                f"the checkpoint was made with data.seed {state['seed']}, this run has {self.seed}; resume with the "
                "same, or start a new run from the exported weights"
            )
        self._position = None if state["place"] is None else PoolPosition(**state["place"])
        self._saved = {} if self._position is None else {-1: self._position.name}  # the step is not restored yet

    def missing_for(self, checkpoint: Mapping[str, Any], run_dir: Path) -> str | None:
        """What a checkpoint cannot be resumed without and is not there: the pool that it is within; else None.

        Args:
            checkpoint: What the file holds.
            run_dir: The run's folder.
        """
        place = checkpoint.get(type(self).__qualname__, {}).get("place")
        if place is None:
            return None
        position, trained = PoolPosition(**place), SavedProgress.of(checkpoint).batches_trained
        folder = resolved_path(position.name) if self.reuse else (self.pools_dir or run_dir / "pools") / position.name
        if trained - position.first_batch >= position.batches or (folder / MANIFEST).is_file():
            return None
        return f"is within the pool {folder}, which is gone"

    # ------------------------------------------------------------------------------------- loaders

    def train_dataloader(self) -> PairLoader:
        """The batches of the pool that the run is in; makes the pool first if a new one begins.

        Derived from Lightning's restored counters alone, so that it may be called any number of times.
        """
        position = self._position
        used_up = position is not None and self._seen() >= position.batches
        if self.fill is not None:
            if position is not None and not used_up:
                raise ConfigError(f"the checkpoint is within pool {position.number}; there is no next one to fill yet")
            self._make(0 if position is None else position.number + 1)
            self._running.should_stop = True
            return self._loader(None, PoolPosition.ended(self.batches_seen))
        if position is None:
            position = self._begin(0)
        elif used_up:
            if self._ends_here(position):
                return self._loader(None, position)
            position = self._begin(position.number + 1)
        elif (position.batch, position.accumulated) != (self.pairs_per_batch, self.accumulated):
            raise ConfigError(
                f"the checkpoint is within a pool that was divided into {position.batch} pairs per batch over all "
                f"ranks, {position.accumulated} batches per step, this run asks for {self.pairs_per_batch} and "
                f"{self.accumulated}; resume with the same product of ranks and batch_size, and the same accumulation"
            )
        self._position = position
        return self._loader(open_pairs(self._folder(position.name), self.seed, position), position)

    def _ends_here(self, position: PoolPosition) -> bool:
        """After a pool's last batch: whether Lightning still has its epoch to close, or the run is over."""
        trainer = self._running
        over = 0 < (trainer.max_epochs or 0) <= position.number + 1 or 0 <= trainer.max_steps <= trainer.global_step
        return over or epoch_is_open(trainer)

    def _loader(self, pairs: PoolPairs | None, position: PoolPosition) -> PairLoader:
        """What is left of a pool; without ``pairs`` nothing is."""
        seen = self._seen if pairs is not None else lambda: position.batches
        return PairLoader(
            FaultTolerantDataset(pairs if pairs is not None else _Nothing()),
            batch_size=self.batch_size,
            sampler=PoolSampler(position.batches, self.batch_size, self.rank, self.world_size, seen),
            num_workers=self.num_workers if pairs is not None else 0,
            collate_fn=identity,
            pin_memory=torch.cuda.is_available(),
            drop_last=True,
            worker_init_fn=ignore_signals,
        )

    # ------------------------------------------------------------------------------------- pools

    def _begin(self, number: int) -> PoolPosition:
        """The pool of this number, complete and with enough pairs; sampled unless it is there."""
        name = self.reuse[number % len(self.reuse)] if self.reuse else self._make(number)
        manifest = read_manifest(self._folder(name))
        per_step = self.pairs_per_batch * self.accumulated
        pairs = manifest.counts["pairs"]
        check_pairs(self._folder(name), manifest, per_step, self.pairs_per_batch, self.min_pairs)
        check_agreement(self._folder(name), manifest, self.decoder)
        if self.reuse:
            check_reused(self._policy, self._objective, self.sampler, self._folder(name))
        batches = pairs // per_step * self.accumulated
        self.check_epoch(batches)
        limit = self._running.limit_train_batches
        if type(limit) is int:
            batches = min(batches, limit)
        first_sample = 0 if self._position is None else self._position.next_sample
        position = PoolPosition(
            number, name, self.batches_seen, first_sample, batches, self.pairs_per_batch, self.accumulated
        )
        expect_batches(self._running, batches)
        log_pool(self._running, manifest, pairs - batches * self.pairs_per_batch)
        if not self.reuse and not self.keep_pools and self._running.is_global_zero:
            # What a restart from one of the newest checkpoints needs stays.
            delete_pools(self._pools(), (name, *self._saved.values()))
        return position

    def _make(self, number: int) -> str:
        """Sample what is missing of a pool, on all ranks together; the name of its folder."""
        trainer = self._running
        assert self.scorer is not None  # the constructor lets only reuse go without, which makes no pools
        maker = PoolMaker(
            self.recipe,
            self._policy,
            self.scorer,
            self.decoder,
            self.decoder_checks,
            self._pools(),
            trainer.strategy,
            self.fill,
            self.between_chunks,
            trainer.progress_bar_callback is not None,
        )
        return maker.make(number, trainer.global_step)

    def _folder(self, name: str) -> Path:
        return resolved_path(name) if self.reuse else self._pools() / name

    def _pools(self) -> Path:
        return self.pools_dir or Path(self._running.default_root_dir) / "pools"


def check_settings(
    prompts: str | list[str] | None,
    scorer: StepScorer | None,
    decoder: TinyDecoder | None,
    decoder_checks: int,
    fill: tuple[int, int] | None,
    reuse: list[str] | None,
) -> None:
    """
    Raises:
        ConfigError: they contradict each other, or are out of range.
    """
    if decoder_checks < 0:
        raise ConfigError(f"data.decoder_checks must be 0 (none) or more prompts, got {decoder_checks}")
    if decoder is not None and scorer is not None and not scorer.sees_pictures:
        raise ConfigError(f"data.decoder makes pictures, and {type(scorer).__name__} looks at none; leave it out")
    if reuse is None and (prompts is None or scorer is None):
        raise ConfigError("data.prompts and data.scorer make a pool; give both, or kept pools as data.reuse")
    if reuse == [] or (reuse and fill):
        raise ConfigError("data.reuse names pools to train on: at least one, and none are made, so no data.fill")
    if fill is not None and not 0 <= fill[0] < fill[1]:
        raise ConfigError(f"data.fill is [i, n], part i of n counted from 0, got {list(fill)}")
    if prompts is not None and not len(prompts):
        raise ConfigError("data.prompts is an empty list; give texts, or a prompt file")


def policy_of(module: Any) -> DiffusionPolicy:
    """
    Raises:
        ConfigError: the module under training has none.
    """
    policy = getattr(module, "policy", None)
    if not isinstance(policy, DiffusionPolicy):
        raise ConfigError(f"{type(module).__name__} has no policy to sample from; use AlignmentModule")
    return policy


def check_trainer(trainer: Any) -> None:
    """
    Raises:
        ConfigError: the trainer's epochs are no pools, or its ranks can't sample on their own.
    """
    if trainer.reload_dataloaders_every_n_epochs != 1:
        raise ConfigError(
            "an epoch is a pool: set trainer.reload_dataloaders_every_n_epochs to 1, got "
            f"{trainer.reload_dataloaders_every_n_epochs}"
        )
    if not isinstance(trainer.limit_train_batches, int) and trainer.limit_train_batches != 1.0:
        raise ConfigError(
            f"trainer.limit_train_batches is {trainer.limit_train_batches}; with pools give a whole number, "
            "or lower data.prompts_per_pool"
        )
    strategy = trainer.strategy
    if type(strategy) is not DDPStrategy and not isinstance(strategy, SingleDeviceStrategy | FullyShardedStrategy):
        raise ConfigError(
            f"ranks sample different prompts, so each needs the full weights, and {type(strategy).__name__} shards "
            "them; use one device or trainer.strategy=ddp or fsdp2"
        )


def check_objective(objective: Any, whose: str, settings: dict[str, Any]) -> None:
    """
    Raises:
        ConfigError: pairs sampled with ``settings`` are not what the objective takes them for.
    """
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


def check_reused(policy: DiffusionPolicy, objective: Any, sampler: StepSampler, folder: Path) -> None:
    """
    Raises:
        ConfigError: a kept pool was sampled in other steps than the objective or ``sampler`` says, or from a policy
            with another noise schedule or other latents.
    """
    settings = read_manifest(folder).settings
    made_with = settings["sampler"]
    check_objective(objective, str(folder), made_with)
    if made_with["steps"] != sampler.steps:
        raise ConfigError(
            f"{folder} was sampled in {made_with['steps']} steps, data.sampler.steps is {sampler.steps}; make them "
            "equal"
        )
    if "schedule" not in settings:
        log.warning("%s is of an earlier version and doesn't say which noise schedule it was sampled with", folder)
    elif settings["schedule"] != schedule_fingerprint(policy.schedule):
        raise ConfigError(
            f"{folder} was sampled with another noise schedule than this run's policy has: the log-probabilities would "
            "be of other steps; reuse pools of the same base model"
        )
    shards = open_pool(folder)
    side = policy.image_size // policy.downscale
    found = step_pair(shards.read(*StoredOrder(shards.sizes)[0]), 0).chosen.shape[1:]
    wanted = (policy.latent_channels, side, side)
    if found != wanted:
        raise ConfigError(
            f"{folder} holds latents of shape {tuple(found)}, this run's policy makes {wanted}; reuse pools of the "
            "same base model"
        )


def check_decoder(module: Any, decoder: TinyDecoder | None, checks: int) -> None:
    """
    Raises:
        ConfigError: it is one for other latents, or agreement is demanded of it and nothing is checked.
    """
    if decoder is None:
        return
    policy = policy_of(module)
    if (decoder.latent_channels, decoder.downscale) != (policy.latent_channels, policy.downscale):
        raise ConfigError(
            f"data.decoder reads {decoder.latent_channels} channels and makes {decoder.downscale} pixels of a latent, "
            f"the policy's latents have {policy.latent_channels} and {policy.downscale}; give the decoder of its VAE"
        )
    if decoder.least_agreement is not None and not checks:
        raise ConfigError("data.decoder.least_agreement needs data.decoder_checks: prompts judged behind the VAE too")


def check_agreement(folder: Path, manifest: Manifest, decoder: TinyDecoder | None) -> None:
    """
    Raises:
        DataError: behind the VAE too many of the checked comparisons would have gone another way.
    """
    found = manifest.statistics.get("decoder_agreement")
    least = None if decoder is None else decoder.least_agreement
    if least is not None and found is not None and found < least:
        raise DataError(
            f"the pool {folder} was judged behind a decoder that leads to the VAE's best and worst candidate in "
            f"{found:.3f} of the checked comparisons, and data.decoder.least_agreement is {least}; lower that, or "
            "judge behind the VAE: data.decoder=null"
        )


def check_pairs(folder: Path, manifest: Manifest, per_step: int, per_batch: int, least: int) -> None:
    """
    Raises:
        DataError: a pool doesn't fill an optimizer step, or has fewer pairs than ``data.min_pairs``.
    """
    if manifest.counts["pairs"] >= max(least, per_step):
        return
    raise DataError(
        f"the pool {folder} has {manifest.counts['pairs']} pairs of {manifest.counts['prompts']} prompts, needed are "
        f"{max(least, per_step)}: an optimizer step takes {per_batch} per batch over all "
        f"ranks x {per_step // per_batch} accumulated, and data.min_pairs is {least}. {what_to_change(manifest)}"
    )


def what_to_change(manifest: Manifest) -> str:
    """About a pool with too few pairs: what decided which pairs are valid, and what makes more of them so."""
    gaps = ", ".join(f"{manifest.statistics[f'score_gap/quantile{q}']:.4f} ({q}%)" for q in QUANTILES)
    return (
        f"The threshold is {manifest.settings['sampler']['threshold']}, the score gaps' quantiles are {gaps}; lower "
        "data.sampler.threshold, raise the scorer's scale, or take more prompts_per_pool"
    )


def open_pairs(folder: Path, seed: int, position: PoolPosition) -> PoolPairs:
    """The pairs of the pool that a run is in, permuted by (seed, number of the pool).

    Raises:
        DataError: the pool is gone or damaged.
    """
    try:
        shards = open_pool(folder)
    except DataError as error:
        there = ", ".join(path.name for path in finished_pools(folder.parent)) or "none"
        raise DataError(
            f"{error}. The checkpoint is within the pool {folder}, which is needed to resume from it (pools that are "
            f"there: {there}); put it back, or give the --ckpt_path of a checkpoint at a pool's end or within one that "
            "is there. data.keep_pools keeps them all"
        ) from error
    order = torch.randperm(len(shards), generator=generator(seed, "pool order", position.number)).tolist()
    return PoolPairs(shards, order, position.first_sample)


def log_pool(trainer: Any, manifest: Manifest, dropped: int) -> None:
    """Tell the loggers about the pool that begins."""
    counts = {"pairs": float(manifest.counts["pairs"]), "dropped": float(dropped)}
    metrics = {f"pool/{name}": value for name, value in (manifest.statistics | counts).items()}
    for logger in trainer.loggers:
        logger.log_metrics(metrics, step=trainer.global_step)
    log.info("pool of %d pairs, %d dropped: %s", manifest.counts["pairs"], dropped, manifest.statistics)


class _Nothing(Dataset[Any]):
    """Of a pool of which nothing is left to read."""

    def __len__(self) -> int:
        return 0

    def __getitem__(self, p: int) -> Any:
        raise IndexError(p)
