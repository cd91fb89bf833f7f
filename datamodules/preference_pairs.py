"""Preference pairs from shards: every rank its own samples, equal batches, an order that a restart cannot change."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Sampler
from torch.utils.data.distributed import DistributedSampler

from datamodules.pairs.latents_key import check_latents
from datamodules.pairs.samples import EncodedPairs, PairTransform, PixelPairs
from datamodules.shards import bad_samples
from datamodules.shards.bad_samples import BadSamples
from datamodules.shards.download import Downloads
from datamodules.shards.locate import open_shards
from datamodules.stream.cursor import CursorDataModule, Segment
from datamodules.stream.loading import FaultTolerantDataset, PairLoader, ShardSamples, identity, ignore_signals
from datamodules.stream.order import ShuffledOrder, StoredOrder
from datamodules.stream.positions import RunSampler
from lightning_modules.errors import ConfigError, DataError
from lightning_modules.files import resolved_path
from lightning_modules.policies.base import DiffusionPolicy

log = logging.getLogger(__name__)


class PreferencePairsDataModule(CursorDataModule):
    """Batches of ``PreferencePairs`` from shards of pixels, or of ``LatentPairs`` from shards of latents.

    The run's samples form one endless stream: its data, flip and crop at position n depend on (seed, n) alone, not
    on ranks, batch size, workers or restarts. A checkpoint keeps the position; a resumed run continues from there even
    with another number of ranks or another batch size.

    Args:
        shards: a prepared folder, a tar file, a brace list, a URL of these, or a list of such.
        batch_size: pairs per rank and batch.
        pairs_per_step: Pairs per optimizer step over all ranks; as many batches are accumulated as that takes. None
            leaves it to trainer.accumulate_grad_batches.
        num_workers: processes that read and decode, a rank.
        seed: seed of the order, the flips and the crops.
        resolution: side of the pictures in pixels; for latents, what they must have been encoded at.
        random_crop: crop anywhere along the long side; else in the middle. Pixels only: latents are cropped and
            flipped, or not, when they are encoded.
        horizontal_flip: mirror half of the pairs. Pixels only.
        shuffle_shards: how many shards are shuffled together; more mixes better and opens more files.
        cache_dir: folder where remote shards are kept; needed for URLs, with room for all of them.
        val_shards: pairs to validate on, as ``shards``: in stored order, centre crop, no flip.
        ties: whether shards may hold ties; True for a module that reads the pairs' ``labels``, as the preference
            model's does. Pixels only.
        max_bad_share: the share of the data set's pairs that may be damaged; one always may, except at 0. A damaged
            pair is named in the log and in the run folder's ``bad_samples.jsonl``, and the next whole one of the
            epoch's order stands in its place, with the draws of that place. Above the share the run ends.
        stall_seconds: a download that gives nothing for so long is broken off and tried again.
        download_attempts: how often a download is tried.

    Raises:
        DataError: shards missing or damaged, too many damaged pairs, too few pairs for one global batch, pairs that
            are ties, latents of other networks than the run's, or a checkpoint from another data set.
    """

    def __init__(
        self,
        shards: str | list[str],
        batch_size: int,
        num_workers: int = 0,
        seed: int = 0,
        resolution: int = 512,
        random_crop: bool = False,
        horizontal_flip: bool = True,
        shuffle_shards: int = 8,
        cache_dir: str | None = None,
        val_shards: str | list[str] | None = None,
        ties: bool = False,
        max_bad_share: float = 0.001,
        stall_seconds: float = 60.0,
        download_attempts: int = 3,
        pairs_per_step: int | None = None,
    ) -> None:
        super().__init__(batch_size, pairs_per_step)
        if resolution < 1:
            raise ConfigError(f"data.resolution must be at least 1, got {resolution}")
        if not 0 <= max_bad_share < 1:
            raise ConfigError(f"data.max_bad_share is a share of the pairs from 0 to below 1, got {max_bad_share}")
        self.shards, self.val_shards = shards, val_shards
        self.num_workers, self.seed = num_workers, seed
        self.transform = PairTransform(resolution, random_crop, horizontal_flip)
        self.shuffle_shards, self.ties = shuffle_shards, ties
        self.downloads = Downloads(
            None if cache_dir is None else resolved_path(cache_dir), stall_seconds, download_attempts
        )
        self.max_bad_share = max_bad_share
        self._bad: dict[str, BadSamples] = {}
        self.train_set: ShardSamples | None = None
        self.val_set: ShardSamples | None = None
        self._segment = Segment()

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if stage == "fit":
            self.train_set = self._open(self.shards, shuffled=True)
        if stage in ("fit", "validate") and self.val_shards is not None:
            self.val_set = self._open(self.val_shards, shuffled=False)

    def teardown(self, stage: str) -> None:
        for bad in self._bad.values():
            if bad.count:
                log.warning("%s", bad.summary())

    @property
    def _bad_samples_file(self) -> Path | None:
        return Path(self.trainer.default_root_dir) / bad_samples.FILE if self.trainer else None

    def _open(self, names: str | list[str], shuffled: bool) -> ShardSamples:
        # A batch straddles two windows at most; a process that opened fewer would reopen shards in turn.
        shards = open_shards(names, self.downloads, max_open=2 * self.shuffle_shards)
        if shards.has_ties and not (self.ties and shards.latents is None):
            raise DataError(f"{names} holds ties, which have no chosen picture; prepare it again without --keep-ties")
        if shards.kind == "pictures":
            raise DataError(f"{names} holds single pictures, liked or not; train on those with KTO, as kto_tiny does")
        if shards.kind == "steps":
            raise DataError(f"{names} holds pairs of denoising steps; train on those with StepPoolDataModule")
        if len(shards) == 0:
            raise DataError(f"{names} holds zero usable pairs; see the counts in its manifest.json")
        data = shards.fingerprint()
        self._bad[data] = BadSamples(str(names), data, len(shards), self.max_bad_share, self._bad_samples_file)
        order = ShuffledOrder(shards.sizes, self.seed, self.shuffle_shards) if shuffled else StoredOrder(shards.sizes)
        if shards.latents is None:
            return PixelPairs(shards, order, self.transform, self.seed if shuffled else None)
        policy = getattr(self.trainer and self.trainer.lightning_module, "policy", None)
        if isinstance(policy, DiffusionPolicy):
            check_latents(shards.latents, policy, self.transform.resolution)
        return EncodedPairs(shards, order)

    def train_dataloader(self) -> PairLoader:
        if self.train_set is None:
            self.setup("fit")
        assert self.train_set is not None
        total, needed = len(self.train_set), self.pairs_per_batch * self.accumulated
        if total < needed:
            raise DataError(
                f"{self.shards} holds {total} usable pairs, one optimizer step needs {needed} (batch_size "
                f"{self.batch_size} x {self.world_size} ranks x {self.accumulated} accumulated); set "
                f"data.batch_size and data.pairs_per_step to at most {total}, or give more data"
            )
        if self.trainer and self.samples_seen() == 0:
            # A run from scratch counts from zero, before any rank reads.
            if self.trainer.is_global_zero:
                self._bad[self.train_set.shards.fingerprint()].forget()
            self.trainer.strategy.barrier("bad samples")
        # From here on a batch has this run's size, whatever it was before; idempotent between two batches.
        self._segment = Segment(self.batches_seen, self.samples_seen(), self.pairs_per_batch)
        sampler = RunSampler(total, self.batch_size, self.rank, self.world_size, self.samples_seen, self.accumulated)
        self.check_epoch(sampler.batches)
        return self._loader(self.train_set, sampler)

    @property
    def val_dataloader(self) -> Callable[[], Any]:
        """The hook that gives validation's loader; the inherited one, by which Lightning knows that there is none."""
        return super().val_dataloader if self.val_shards is None else self._validation_loader

    def _validation_loader(self) -> PairLoader:
        if self.val_set is None:
            self.setup("validate")
        assert self.val_set is not None
        # Ranks need equally many batches, as they meet in collectives: the first pairs are read twice where they must.
        split: Sampler[int] = DistributedSampler(self.val_set, self.world_size, self.rank, shuffle=False)
        return self._loader(self.val_set, split if self.world_size > 1 else None)

    def _loader(self, pairs: ShardSamples, sampler: Sampler[int] | None) -> PairLoader:
        return PairLoader(
            FaultTolerantDataset(pairs, self._bad[pairs.shards.fingerprint()]),
            batch_size=self.batch_size,
            sampler=sampler,
            num_workers=self.num_workers,
            collate_fn=identity,
            pin_memory=torch.cuda.is_available(),
            drop_last=pairs is self.train_set,
            worker_init_fn=ignore_signals,
        )

    # ------------------------------------------------------------------------------------- position

    @property
    def segment(self) -> Segment:
        return self._segment

    def _order(self) -> dict[str, Any]:
        if self.train_set is None:
            self.setup("fit")
        assert self.train_set is not None
        data = self.train_set.shards.fingerprint()
        return {"data": data, "seed": self.seed, "shuffle_shards": self.shuffle_shards}

    def state_dict(self) -> dict[str, Any]:
        """The position: plain numbers and strings, the same on every rank."""
        return {
            "batches_seen": self.batches_seen,
            "samples_seen": self.samples_seen(),
            "samples_a_batch": self.segment.batch,
            "order": self._order(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """
        Raises:
            DataError: the checkpoint comes from a run over other data, or in another order.
        """
        here = self._order()
        changed = [name for name, value in state["order"].items() if here[name] != value]
        if changed:
            named = ", ".join(f"{name} {state['order'][name]} (now {here[name]})" for name in changed)
            raise DataError(
                f"the checkpoint was made with {named}, so its position means nothing for {self.shards}; resume with "
                "the same data, seed and shuffle_shards, or start a new run from the exported weights"
            )
        self._segment = Segment(state["batches_seen"], state["samples_seen"], state["samples_a_batch"])
