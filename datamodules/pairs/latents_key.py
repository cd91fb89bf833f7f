"""Which networks, resolution and storage type cached latents belong to: a hash, and its check against a run."""

from __future__ import annotations

import hashlib

from datamodules.shards.manifest import LatentsKey
from lightning_modules.errors import ConfigError, DataError
from lightning_modules.policies.base import DiffusionPolicy
from lightning_modules.weights.network_hash import add_network


def latents_fingerprint(policy: DiffusionPolicy, resolution: int, crop: str, dtype: str) -> str:
    """A hash of all that cached latents and embeddings depend on: networks, resolution, crop, storage type.

    It reads the weights, not their names or the folder they came from: names change with library versions. It
    covers their data type too, for a VAE gives other latents in half precision.

    Args:
        policy: its ``encoders`` made them.
        resolution: side of the encoded squares, in pixels.
        crop: how they were cut out, "centre".
        dtype: what the latents are stored in, "float16" or "float32".
    """
    digest = hashlib.blake2b(repr(("latents", 1, resolution, crop, dtype)).encode(), digest_size=16)
    if settings := policy.encoding_settings():
        digest.update(repr(sorted(settings.items())).encode())
    for module in policy.encoders().values():
        add_network(digest, module)
    return digest.hexdigest()


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
    if any(parameter.requires_grad for module in policy.encoders().values() for parameter in module.parameters()):
        raise ConfigError("this run trains its text encoder, cached prompt embeddings would go stale; use pixel shards")
    expected = latents_fingerprint(policy, resolution, found.crop, found.dtype)
    if found.hash != expected:
        raise DataError(
            f"the latents carry the hash {found.hash} but this run's VAE and text encoders give {expected}: they were "
            "encoded by other weights or in another precision; prepare again with --encode-with this run's config"
        )
