"""Pairs as latents and prompt embeddings, so that training on them needs neither VAE nor text encoders."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from datamodules.shards.manifest import LatentsKey
from datamodules.shards.samples import latent_members
from experiments.cli.workers import batches_ahead
from experiments.preparation.pickapic_rows import Pair
from lightning_modules.errors import ConfigError

if TYPE_CHECKING:  # torch's and diffusers' users are imported only where latents are asked for
    from torch import Tensor

    from lightning_modules.policies.base import DiffusionPolicy

ENCODE_BATCH = 8  # pairs a VAE pass


def latents_key(policy: DiffusionPolicy, resolution: int | None, dtype: str) -> LatentsKey:
    """What the latents will be keyed by.

    Raises:
        ConfigError: a resolution that the VAE does not divide.
    """
    from datamodules.pairs.latents_key import latents_fingerprint

    side = policy.image_size if resolution is None else resolution
    if side < 1 or side % policy.downscale:
        raise ConfigError(f"--resolution {side} is not a multiple of the VAE's {policy.downscale} pixels a latent")
    return LatentsKey(latents_fingerprint(policy, side, "centre", dtype), side, "centre", dtype)


def encoded(
    pairs: Iterator[Pair], policy: DiffusionPolicy, key: LatentsKey, shard_size: int
) -> Iterator[tuple[int, dict[str, bytes]]]:
    """Samples of latents and prompt embeddings, of pairs with decoded pictures.

    Latents are the mean of the VAE's posterior, scaled. Each caption's embeddings are stored once a shard. Pictures are
    decoded while those before are encoded.
    """
    import torch

    from datamodules.pairs.samples import PairTransform

    transform, dtype = PairTransform(key.resolution), getattr(torch, key.dtype)
    stored: dict[str, int] = {}
    count = 0
    ready = ((pair, transform(*pair.images, None)) for pair in pairs if pair.images is not None)
    for both in batches_ahead(ready, ENCODE_BATCH):
        batch, squares = zip(*both, strict=True)
        images = torch.stack([square[0] for square in squares] + [square[1] for square in squares])
        latents = policy.encode_images(images.to(policy.device)).to("cpu", dtype)
        embeds = _embeds(policy, [pair.info["caption"] for pair in batch], dtype)
        for i, pair in enumerate(batch):
            if count % shard_size == 0:
                stored = {}
            owner = stored.setdefault(pair.info["caption"], pair.number)
            info = {
                **pair.info,
                "chosen_time_ids": squares[i][2].tolist(),
                "rejected_time_ids": squares[i][3].tolist(),
                "embeds_key": f"{owner:09d}",
            }
            own = {name: rows[i] for name, rows in embeds.items()} if owner == pair.number else None
            sides = {"chosen": latents[i], "rejected": latents[len(batch) + i]}
            yield pair.number, latent_members(sides, own, info)
            count += 1


def _embeds(policy: DiffusionPolicy, captions: Sequence[str], dtype: Any) -> dict[str, Tensor]:
    """Rows of prompt embeddings; a caption that several pairs of the batch share is encoded once."""
    import torch

    different = list(dict.fromkeys(captions))
    with torch.no_grad():
        cond = policy.encode_prompts(different)
    rows = [different.index(caption) for caption in captions]
    embeds = {"embeds": cond.embeds.to("cpu", dtype)[rows]}
    if cond.pooled is not None:
        embeds["pooled"] = cond.pooled.to("cpu", dtype)[rows]
    return embeds
