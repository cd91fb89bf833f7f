"""Preference pairs from shards: every rank its own samples, equal batches, an order that a restart cannot change."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from lightning import LightningDataModule
from PIL import Image, ImageOps
from torch import Tensor, nn
from torch.utils.data.distributed import DistributedSampler

from datamodules.shards import bad_samples
from datamodules.shards.bad_samples import BadSamples
from datamodules.shards.download import Downloads
from datamodules.shards.manifest import LatentsKey
from datamodules.shards.reader import ShardSet, open_shards
from datamodules.shards.samples import MAX_PICTURE_PIXELS, Sample
from datamodules.stream.loading import Caught, OrderedSamples, PairLoader, as_it_is, ignore_signals
from datamodules.stream.order import ShuffledOrder, StoredOrder
from lightning_modules.batches import Conditioning, LatentPairs, PreferencePairs
from lightning_modules.errors import ConfigError, DataError
from lightning_modules.policies.base import DiffusionPolicy
from lightning_modules.randomness import generator, rand

log = logging.getLogger(__name__)

MAX_EXAMPLES_PER_PROMPT = 1e9
# What an autoencoder's latents and a CLIP text encoder's outputs depend on besides their weights.
_CONFIG_FIELDS = ("scaling_factor", "shift_factor", "hidden_act", "num_attention_heads", "layer_norm_eps")


# ------------------------------------------------------------------------------------------- pictures


@dataclass(frozen=True)
class PairTransform:
    """Two pictures of any size -> two squares: resize the short side, crop, flip.

    Chosen and rejected share the flip and the relative position of the crop, so that neither tells them apart.

    Attributes:
        resolution: side of the squares, in pixels; smaller pictures are enlarged.
        random_crop: crop anywhere along the long side; else in its middle.
        horizontal_flip: mirror half of the pairs.
    """

    resolution: int
    random_crop: bool = False
    horizontal_flip: bool = False

    def __call__(
        self, chosen: Image.Image, rejected: Image.Image, source: torch.Generator | None
    ) -> tuple[Float[Tensor, "3 H W"], Float[Tensor, "3 H W"], Float[Tensor, " 6"], Float[Tensor, " 6"]]:
        """Both pictures in [-1, 1] and the time ids of both (see ``PreferencePairs``).

        Args:
            chosen, rejected: RGB pictures.
            source: of the flip and the crop; None for a centre crop without a flip.

        Raises:
            DataError: a picture is so narrow that resizing would make it larger than ``MAX_PICTURE_PIXELS``.
        """
        flip, across, down = (0.0, 0.5, 0.5) if source is None else rand([source] * 3).tolist()
        mirror = source is not None and self.horizontal_flip and flip < 0.5
        position = (across, down) if source is not None and self.random_crop else (0.5, 0.5)
        first, first_ids = self._square(chosen, position, mirror)
        second, second_ids = self._square(rejected, position, mirror)
        return first, second, first_ids, second_ids

    def _square(
        self, image: Image.Image, position: tuple[float, float], mirror: bool
    ) -> tuple[Float[Tensor, "3 H W"], Float[Tensor, " 6"]]:
        side, (width, height) = self.resolution, image.size
        scale = side / min(width, height)
        size = max(side, round(width * scale)), max(side, round(height * scale))
        if size[0] * size[1] > max(MAX_PICTURE_PIXELS, side * side):
            raise DataError(f"a picture of {width}x{height} px is too narrow to be resized to {side} px")
        resized = image.resize(size, Image.Resampling.BICUBIC)
        # int() rounds down: 0.5 gives the same centre crop as torchvision and never leaves the picture.
        left = int(position[0] * (resized.width - side))
        top = int(position[1] * (resized.height - side))
        square = resized.crop((left, top, left + side, top + side))
        if mirror:
            # The same pixels as flipping the resized picture and cropping there, at the mirrored offset.
            square, left = ImageOps.mirror(square), resized.width - side - left
        pixels = torch.from_numpy(np.array(square)).permute(2, 0, 1).float() / 127.5 - 1.0
        return pixels, torch.tensor([height, width, top, left, side, side], dtype=torch.float32)


# ------------------------------------------------------------------------------------------ data sets


class PixelPairs(OrderedSamples):
    """Item n of the run's stream as a batch of one; flip and crop are drawn from (seed, n).

    Raises:
        BadSampleError: a sample is damaged; the message names shard and key.
        DataError: a shard is.
    """

    def __init__(
        self, shards: ShardSet, order: ShuffledOrder | StoredOrder, transform: PairTransform, seed: int | None
    ) -> None:
        self.shards, self.order, self.transform, self.seed = shards, order, transform, seed

    def __len__(self) -> int:
        return len(self.order)

    def item(self, n: int, place: int) -> PreferencePairs:
        sample = self.shards.read(*self.order[place])
        info = sample.info()
        source = None if self.seed is None else generator(self.seed, "augmentation", n)
        images = sample.image("chosen"), sample.image("rejected")
        try:
            chosen, rejected, chosen_ids, rejected_ids = self.transform(*images, source)
        except DataError as error:
            raise sample.bad(str(error)) from error
        return PreferencePairs(
            chosen[None],
            rejected[None],
            (info["caption"],),
            chosen_ids[None],
            rejected_ids[None],
            torch.tensor([n]),
            torch.tensor([sample.number(info, "label", 0.5, 1.0)]),
            1 / torch.tensor([sample.number(info, "num_example_per_prompt", 1.0, MAX_EXAMPLES_PER_PROMPT)]),
        )


class EncodedPairs(OrderedSamples):
    """Item n of the run's stream as a batch of one, from shards of latents: crop and flip are as encoded.

    Raises:
        BadSampleError: a sample is damaged; the message names shard and key.
        DataError: a shard is.
    """

    def __init__(self, shards: ShardSet, order: ShuffledOrder | StoredOrder) -> None:
        self.shards, self.order = shards, order

    def __len__(self) -> int:
        return len(self.order)

    def item(self, n: int, place: int) -> LatentPairs:
        shard, row = self.order[place]
        sample = self.shards.read(shard, row)
        info, latents = sample.info(), sample.tensors("latents", chosen=3, rejected=3)
        if latents["chosen"].shape != latents["rejected"].shape:
            raise sample.bad("its two latents have different shapes")
        embeds = self.shards.read_embeds(shard, sample, info)
        pooled = embeds["pooled"].float()[None] if "pooled" in embeds else None
        return LatentPairs(
            latents["chosen"].float()[None],
            latents["rejected"].float()[None],
            (info["caption"],),
            _time_ids(sample, info, "chosen_time_ids"),
            _time_ids(sample, info, "rejected_time_ids"),
            torch.tensor([n]),
            Conditioning(embeds["embeds"].float()[None], pooled),
        )


def _time_ids(sample: Sample, info: dict[str, Any], name: str) -> Float[Tensor, "1 6"]:
    values = info.get(name)
    if (
        not isinstance(values, list)
        or len(values) != 6
        or not all(type(value) in (int, float) and abs(value) <= MAX_PICTURE_PIXELS for value in values)
    ):
        raise sample.bad(f"{name} must be 6 numbers of pixels, got {str(values)[:80]}")
    return torch.tensor([values], dtype=torch.float32)


def collate(pairs: Sequence[Any]) -> Any:
    """One batch from batches of one, all of one type.

    Raises:
        DataError: latents or embeddings of different shapes, which no single preparation makes.
    """
    first = pairs[0]
    if len({_shapes(pair) for pair in pairs}) > 1:
        raise DataError(
            f"samples of different shapes meet in a batch, {_shapes(first)} and others; they come from different "
            "preparations: prepare them alike"
        )

    def stacked(name: str) -> Tensor:
        return torch.cat([getattr(pair, name) for pair in pairs])

    prompts = tuple(prompt for pair in pairs for prompt in pair.prompts)
    chosen, rejected, indices = stacked("chosen"), stacked("rejected"), stacked("indices")
    chosen_ids, rejected_ids = stacked("chosen_time_ids"), stacked("rejected_time_ids")
    if isinstance(first, PreferencePairs):
        labels, weights = stacked("labels"), stacked("weights")
        return PreferencePairs(chosen, rejected, prompts, chosen_ids, rejected_ids, indices, labels, weights)
    cond = Conditioning.cat([pair.cond for pair in pairs])
    return LatentPairs(chosen, rejected, prompts, chosen_ids, rejected_ids, indices, cond)


def _shapes(pair: PreferencePairs | LatentPairs) -> tuple[tuple[int, ...], ...]:
    tensors = [pair.chosen]
    if isinstance(pair, LatentPairs) and pair.cond is not None:
        tensors += [value for value in (pair.cond.embeds, pair.cond.pooled) if value is not None]
    return tuple(tuple(value.shape) for value in tensors)


# ------------------------------------------------------------------------------------------- position


class RunSampler(DistributedSampler[Any]):
    """One rank's samples of one Lightning epoch, from wherever the run stands when it is iterated.

    Rank r's batch m' of this epoch holds the samples n = start + (m' world + r) b + i, i < b, of the run's endless
    stream. An epoch has floor(N / (b world)) batches on every rank; the samples left over open the next epoch, so
    none is dropped. It subclasses ``DistributedSampler`` only because Lightning replaces every other sampler.

    Attributes:
        position: asked each time the sampler is iterated: how many samples all ranks have seen.
    """

    def __init__(self, total: int, batch_size: int, rank: int, world_size: int, position: Callable[[], int]) -> None:
        super().__init__(range(total), world_size, rank, shuffle=False)  # type: ignore[arg-type]  # only its length
        self.batch_size, self.position = batch_size, position
        self.batches = total // (batch_size * world_size)

    def __len__(self) -> int:
        return self.batches * self.batch_size

    def __iter__(self) -> Iterator[int]:
        start = self.position() + self.rank * self.batch_size
        step = self.num_replicas * self.batch_size
        for batch in range(self.batches):
            yield from range(start + batch * step, start + batch * step + self.batch_size)


# ------------------------------------------------------------------------------------------ latents key


def latents_fingerprint(policy: DiffusionPolicy, resolution: int, crop: str, dtype: str) -> str:
    """A hash of all that cached latents and embeddings depend on: networks, resolution, crop, storage type.

    It reads the weights, not their names or the folder they came from: names change with library versions. It
    covers their data type too, for a VAE gives other latents in half precision.

    Args:
        policy: has ``vae`` and ``text_encoders``.
        resolution: side of the encoded squares, in pixels.
        crop: how they were cut out, "centre".
        dtype: what the latents are stored in, "float16" or "float32".
    """
    digest = hashlib.blake2b(repr(("latents", 1, resolution, crop, dtype)).encode(), digest_size=16)
    for module in _encoders(policy):
        config = getattr(module, "config", None)
        digest.update(repr([(name, getattr(config, name, None)) for name in _CONFIG_FIELDS]).encode())
        for parameter in module.parameters():
            data = parameter.detach().cpu().contiguous()
            digest.update(repr((tuple(data.shape), str(data.dtype))).encode())
            digest.update(data.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _encoders(policy: DiffusionPolicy) -> list[nn.Module]:
    try:
        vae, text_encoders = policy.vae, policy.text_encoders
    except AttributeError as error:
        raise ConfigError(f"{type(policy).__name__} has no VAE and text encoders to cache the outputs of") from error
    return [vae, *text_encoders]  # type: ignore[list-item,misc]  # nn.Module's attributes are Tensor | Module


def check_latents(found: LatentsKey, policy: DiffusionPolicy, resolution: int) -> None:
    """
    Raises:
        DataError: the latents were made by other networks or at another resolution than the run's.
        ConfigError: the run trains its text encoder, so that cached embeddings would go stale.
    """
    if found.resolution != resolution:
        raise DataError(
            f"the latents were encoded at {found.resolution} px, this run asks for {resolution} px; "
            f"set resolution to {found.resolution} or prepare again with --resolution {resolution}"
        )
    if any(parameter.requires_grad for module in _encoders(policy)[1:] for parameter in module.parameters()):
        raise ConfigError("this run trains its text encoder, cached prompt embeddings would go stale; use pixel shards")
    expected = latents_fingerprint(policy, resolution, found.crop, found.dtype)
    if found.hash != expected:
        raise DataError(
            f"the latents carry the hash {found.hash} but this run's VAE and text encoders give {expected}: they were "
            "encoded by other weights or in another precision; prepare again with --encode-with this run's config"
        )


# ----------------------------------------------------------------------------------------- data module


class PreferencePairsDataModule(LightningDataModule):
    """Batches of ``PreferencePairs`` from shards of pixels, or of ``LatentPairs`` from shards of latents.

    The run's samples form one endless stream: its data, flip and crop at position n depend on (seed, n) alone, not
    on ranks, batch size, workers or restarts. A checkpoint keeps the position; a resumed run goes on from there even
    with another number of ranks or another batch size.

    Args:
        shards: a prepared folder, a tar file, a brace list, a URL of these, or a list of such.
        batch_size: pairs a rank a batch.
        num_workers: processes that read and decode, a rank.
        seed: of the order, the flips and the crops.
        resolution: side of the pictures in pixels; for latents, what they must have been encoded at.
        random_crop: crop anywhere along the long side; else in the middle. Pixels only: latents are cropped and
            flipped, or not, when they are encoded.
        horizontal_flip: mirror half of the pairs. Pixels only.
        shuffle_shards: how many shards are shuffled together; more mixes better and opens more files.
        cache_dir: where remote shards are kept; needed for URLs, with room for all of them.
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
    ) -> None:
        super().__init__()
        if batch_size < 1 or resolution < 1:
            raise ConfigError(f"batch_size {batch_size} and resolution {resolution} must be at least 1")
        if not 0 <= max_bad_share < 1:
            raise ConfigError(f"data.max_bad_share is a share of the pairs from 0 to below 1, got {max_bad_share}")
        self.shards, self.val_shards = shards, val_shards
        self.batch_size, self.num_workers, self.seed = batch_size, num_workers, seed
        self.transform = PairTransform(resolution, random_crop, horizontal_flip)
        self.shuffle_shards, self.ties = shuffle_shards, ties
        self.downloads = Downloads(None if cache_dir is None else Path(cache_dir), stall_seconds, download_attempts)
        self.max_bad_share = max_bad_share
        self._bad: dict[str, BadSamples] = {}
        self.train_set: PixelPairs | EncodedPairs | None = None
        self.val_set: PixelPairs | EncodedPairs | None = None
        if val_shards is None:
            # Lightning leaves validation out only where this hook is the inherited one.
            self.val_dataloader = super().val_dataloader  # type: ignore[method-assign]
        # Where the current segment of the run began: batch number, samples seen, samples a batch over all ranks.
        self._origin = (0, 0, 0)

    def setup(self, stage: str) -> None:
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

    def _open(self, names: str | list[str], shuffled: bool) -> PixelPairs | EncodedPairs:
        # A batch straddles two windows at most; a process that opened fewer would reopen shards in turn.
        shards = open_shards(names, self.downloads, max_open=2 * self.shuffle_shards)
        if shards.has_ties and not (self.ties and shards.latents is None):
            raise DataError(f"{names} holds ties, which have no chosen picture; prepare it again without --keep-ties")
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
        total, world = len(self.train_set), self._world_size
        if total < self.batch_size * world:
            raise DataError(
                f"{self.shards} holds {total} usable pairs, one global batch needs {self.batch_size * world} "
                f"(batch_size {self.batch_size} x {world} ranks); use fewer ranks, a smaller batch_size or more data"
            )
        if self.trainer and self.samples_seen() == 0:
            # A run that begins anew counts anew, before any rank reads.
            if self.trainer.is_global_zero:
                self._bad[self.train_set.shards.fingerprint()].forget()
            self.trainer.strategy.barrier("bad samples")
        self._start_segment()
        rank = self.trainer.global_rank if self.trainer else 0
        sampler = RunSampler(total, self.batch_size, rank, world, self.samples_seen)
        return self._loader(self.train_set, sampler)

    def val_dataloader(self) -> PairLoader:
        if self.val_set is None:
            self.setup("validate")
        assert self.val_set is not None
        return self._loader(self.val_set, None)

    def _loader(self, pairs: PixelPairs | EncodedPairs, sampler: RunSampler | None) -> PairLoader:
        return PairLoader(
            Caught(pairs, collate, self._bad[pairs.shards.fingerprint()]),
            batch_size=self.batch_size,
            sampler=sampler,
            num_workers=self.num_workers,
            collate_fn=as_it_is,
            pin_memory=torch.cuda.is_available(),
            drop_last=sampler is not None,
            worker_init_fn=ignore_signals,
        )

    # ------------------------------------------------------------------------------------- cursor

    @property
    def _world_size(self) -> int:
        return self.trainer.world_size if self.trainer else 1

    @property
    def batches_seen(self) -> int:
        """Batches this rank has trained on since the run began: Lightning's own counter, restored on resume."""
        if not self.trainer:
            return 0
        total: Any = self.trainer.fit_loop.epoch_loop.batch_progress.total
        return int(total.processed)

    def samples_seen(self) -> int:
        """Samples that all ranks have trained on since the run began."""
        first_batch, first_sample, batch = self._origin
        return first_sample + (self.batches_seen - first_batch) * batch

    def _start_segment(self) -> None:
        """From here on a batch has this run's size, whatever it was before; idempotent between two batches."""
        self._origin = (self.batches_seen, self.samples_seen(), self.batch_size * self._world_size)

    def _order(self) -> dict[str, Any]:
        if self.train_set is None:
            self.setup("fit")
        assert self.train_set is not None
        data = self.train_set.shards.fingerprint()
        return {"data": data, "seed": self.seed, "shuffle_shards": self.shuffle_shards}

    def state_dict(self) -> dict[str, Any]:
        """The cursor: plain numbers and strings, the same on every rank."""
        return {
            "batches_seen": self.batches_seen,
            "samples_seen": self.samples_seen(),
            "samples_a_batch": self._origin[2],
            "order": self._order(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """
        Raises:
            DataError: the checkpoint comes from a run over other data, or in another order.
        """
        if self.trainer and self.trainer.state.fn != "fit":
            return  # evaluating a checkpoint needs none of its data
        here = self._order()
        changed = [name for name, value in state["order"].items() if here[name] != value]
        if changed:
            named = ", ".join(f"{name} {state['order'][name]} (now {here[name]})" for name in changed)
            raise DataError(
                f"the checkpoint was made with {named}, so its position means nothing for {self.shards}; resume with "
                "the same data, seed and shuffle_shards, or start a new run from the exported weights"
            )
        self._origin = (state["batches_seen"], state["samples_seen"], state["samples_a_batch"])
