"""Single pictures, liked or not, from shards: what ``KTO`` trains on. They resume as exactly as pairs do."""

from __future__ import annotations

from typing import Any

from datamodules.preference_pairs import PreferencePairsDataModule
from datamodules.shards.bad_samples import BadSamples
from datamodules.shards.locate import open_shards
from datamodules.shards.reader import ShardSet
from datamodules.single.order import MixedOrder
from datamodules.single.samples import SinglePictures
from datamodules.stream.order import ShuffledOrder, StoredOrder
from lightning_modules.errors import DataError


def as_list(names: str | list[str]) -> list[str]:
    return [names] if isinstance(names, str) else names


class SinglePicturesDataModule(PreferencePairsDataModule):
    """Batches of ``LabelledPictures`` from shards of liked and of unliked pictures, which ``prepare_pictures`` writes.

    Where ``PreferencePairsDataModule`` says pair, read picture: one endless stream, a position that is one number,
    the same draws on any number of ranks. Both kinds are read without replacement.

    Args:
        liked, unliked: a prepared folder, a tar file, a brace list, a URL of these, or a list of such.
        batch_size: pictures per rank and batch.
        positive_ratio: which share of the stream is liked; Diffusion-KTO uses 0.8. None leaves it as it is in the
            data, so that an epoch has every picture once; otherwise one kind comes more often than the other.
        pairs_per_step: pictures per optimizer step over all ranks.
        val_shards: pictures of either kind to validate on, in stored order, centre crop, no flip.
        num_workers, seed, resolution, random_crop, horizontal_flip, shuffle_shards, cache_dir, max_bad_share,
            stall_seconds, download_attempts: as of ``PreferencePairsDataModule``.

    Raises:
        ConfigError: a ratio out of range, or a kind without pictures.
        DataError: as ``PreferencePairsDataModule``; or pairs instead of single pictures.
    """

    def __init__(
        self,
        liked: str | list[str],
        unliked: str | list[str],
        batch_size: int,
        positive_ratio: float | None = None,
        num_workers: int = 0,
        seed: int = 0,
        resolution: int = 512,
        random_crop: bool = False,
        horizontal_flip: bool = True,
        shuffle_shards: int = 8,
        cache_dir: str | None = None,
        val_shards: str | list[str] | None = None,
        max_bad_share: float = 0.001,
        stall_seconds: float = 60.0,
        download_attempts: int = 3,
        pairs_per_step: int | None = None,
    ) -> None:
        super().__init__(
            [*as_list(liked), *as_list(unliked)], batch_size, num_workers, seed, resolution, random_crop,
            horizontal_flip, shuffle_shards, cache_dir, val_shards, False, max_bad_share, stall_seconds,
            download_attempts, pairs_per_step,
        )  # fmt: skip
        self.liked, self.unliked, self.positive_ratio = liked, unliked, positive_ratio

    def _open(self, names: str | list[str], shuffled: bool) -> SinglePictures:
        shards = self._pictures(names)
        sizes, liked_shards = shards.sizes, None
        order: MixedOrder | ShuffledOrder | StoredOrder = StoredOrder(sizes)
        if shuffled:
            liked_shards = len(self._pictures(self.liked).sizes)
            liked, unliked = sizes[:liked_shards], sizes[liked_shards:]
            if not (sum(liked) and sum(unliked)):
                raise DataError(f"{names} lacks liked or unliked pictures, and KTO wants both; check their folders")
            order = ShuffledOrder(sizes, self.seed, self.shuffle_shards)
            if self.positive_ratio is not None:
                order = MixedOrder(liked, unliked, self.seed, self.shuffle_shards, self.positive_ratio)
        data = shards.fingerprint()
        self._bad[data] = BadSamples(str(names), data, len(shards), self.max_bad_share, self._bad_samples_file)
        return SinglePictures(shards, order, self.transform, self.seed if shuffled else None, liked_shards)

    def _pictures(self, names: str | list[str]) -> ShardSet:
        # A batch straddles two windows of either kind at most.
        shards = open_shards(names, self.downloads, max_open=4 * self.shuffle_shards)
        if shards.kind != "pictures":
            raise DataError(
                f"{names} holds {'pairs' if shards.kind != 'steps' else 'pairs of denoising steps'}, and KTO trains on "
                "single pictures, liked or not; make them of pairs: python -m experiments.prepare_pictures"
            )
        return shards

    def _order(self) -> dict[str, Any]:
        order = super()._order()
        assert isinstance(self.train_set, SinglePictures)
        return order | {"positive_ratio": self.positive_ratio, "liked_shards": self.train_set.liked_shards}
