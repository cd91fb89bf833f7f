"""Single pictures, liked or not, as batches of one: decoded, cropped and flipped."""

from __future__ import annotations

import torch

from datamodules.pairs.samples import PairTransform
from datamodules.shards.reader import ShardSet
from datamodules.single.order import MixedOrder
from datamodules.stream.loading import ShardSamples
from datamodules.stream.order import ShuffledOrder, StoredOrder
from lightning_modules.batches import LabelledPictures
from lightning_modules.errors import DataError
from lightning_modules.randomness import generator


class SinglePictures(ShardSamples):
    """Item n of the run's stream as a batch of one; flip and crop are drawn from (seed, n).

    A bad sample of a ``MixedOrder`` is replaced by the next one of its own kind, so that the share of liked ones stays.

    Args:
        shards: of both kinds.
        order: in which they are read.
        transform: to squares.
        seed: of flips and crops; None for none.
        liked_shards: how many of the shards, the first ones, were given as those of liked pictures; None if none was.

    Raises:
        BadSampleError: a sample is damaged, or of the other kind than its shard; the message names shard and key.
        DataError: a shard is damaged.
    """

    def __init__(
        self,
        shards: ShardSet,
        order: MixedOrder | ShuffledOrder | StoredOrder,
        transform: PairTransform,
        seed: int | None,
        liked_shards: int | None = None,
    ) -> None:
        self.shards, self.order, self.transform, self.seed = shards, order, transform, seed
        self.liked_shards = liked_shards

    def __len__(self) -> int:
        return len(self.order)

    def item(self, n: int, place: int) -> LabelledPictures:
        order = self.order
        shard, row = order.at(n, place - n) if isinstance(order, MixedOrder) else order[place]
        sample = self.shards.read(shard, row)
        info = sample.info()
        liked = info.get("liked")
        if not isinstance(liked, bool):
            raise sample.bad(f"liked must be true or false, got {str(liked)[:80]!r}")
        if self.liked_shards is not None and liked != (shard < self.liked_shards):
            raise sample.bad(f"liked is {str(liked).lower()}, in shards that were given as those of the other kind")
        image = sample.image("picture")
        try:
            picture, time_ids = self.transform.single(
                image, None if self.seed is None else generator(self.seed, "augmentation", n)
            )
        except DataError as error:
            raise sample.bad(str(error)) from error
        return LabelledPictures(
            picture[None], torch.tensor([liked]), (info["caption"],), time_ids[None], torch.tensor([n])
        )
