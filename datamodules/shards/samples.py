"""One sample of a shard: its members as bytes, and what they mean.

Encoded pictures pass through untouched; tensors are safetensors, the rest is JSON. Nothing is pickled or unpickled.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from datamodules.shards.bad_samples import BadSample, BadSampleError
from datamodules.shards.json_files import parse_json
from datamodules.shards.pictures import decode_picture, picture_suffix
from lightning_modules.errors import DataError

# What safetensors raises on damaged bytes, and on types that this torch doesn't know.
TENSOR_ERRORS = (SafetensorError, KeyError, ValueError, RuntimeError, TypeError, OverflowError)


# -------------------------------------------------------------------------------------------- writing


def pixel_members(chosen: bytes, rejected: bytes, info: Mapping[str, Any]) -> dict[str, bytes]:
    """The members of a pair of encoded pictures; ``info`` needs a "caption"."""
    members = {"json": _dump(info)}
    for role, data in (("chosen", chosen), ("rejected", rejected)):
        suffix = picture_suffix(data)
        if suffix is None:
            raise DataError(f"the {role} picture is neither JPEG, PNG nor WebP: it begins with {data[:8]!r}")
        members[f"{role}.{suffix}"] = data
    return members


def picture_members(picture: bytes, info: Mapping[str, Any]) -> dict[str, bytes]:
    """The members of a single encoded picture; ``info`` needs a "caption", and whether it is "liked"."""
    suffix = picture_suffix(picture)
    if suffix is None:
        raise DataError(f"the picture is neither JPEG, PNG nor WebP: it begins with {picture[:8]!r}")
    return {"json": _dump(info), f"picture.{suffix}": picture}


def latent_members(
    latents: Mapping[str, Tensor], embeds: Mapping[str, Tensor] | None, info: Mapping[str, Any]
) -> dict[str, bytes]:
    """The members of an encoded pair: latents "chosen" and "rejected", and the prompt's "embeds" and "pooled".

    Prompt embeddings are larger than latents and captions repeat, so a shard stores each caption's once: where
    ``embeds`` is None, ``info["embeds_key"]`` names the sample of the same shard that has them.
    """
    members = {"json": _dump(info), "latents.safetensors": _packed(latents)}
    if embeds is not None:
        members["embeds.safetensors"] = _packed(embeds)
    return members


def step_members(latents: Mapping[str, Tensor], info: Mapping[str, Any]) -> dict[str, bytes]:
    """The members of a pair of denoising steps.

    Args:
        latents: "latents" (x_t), "chosen" and "rejected" (x_{t-1}), and "rejected_latents" where the rejected step
            has its own x_t.
        info: "caption", "timestep", "prev_timestep", "score_gap".
    """
    return {"json": _dump(info), "step.safetensors": _packed(latents)}


def _packed(tensors: Mapping[str, Tensor]) -> bytes:
    # safetensors takes no rows of a batch as they are: they share memory and may be strided.
    return save_tensors({name: value.clone(memory_format=torch.contiguous_format) for name, value in tensors.items()})


def _dump(info: Mapping[str, Any]) -> bytes:
    return json.dumps(info, sort_keys=True, ensure_ascii=False, allow_nan=False).encode()


# -------------------------------------------------------------------------------------------- reading


def _finite(values: Tensor) -> bool:
    """Whether all numbers are finite. The sum of any that are not is NaN or infinite, and costs little; where it may be
    so by overflow alone, every number is looked at."""
    numbers = values.float()
    return math.isfinite(numbers.sum().item()) or bool(numbers.isfinite().all())


@dataclass(frozen=True)
class Sample:
    """One sample's raw members, with where it came from for error messages."""

    shard: str
    key: str
    members: dict[str, bytes]

    def bad(self, why: str) -> BadSampleError:
        """The error that says that this sample cannot be used."""
        return BadSampleError(BadSample(self.shard, self.key, " ".join(why.split())[:300]))

    def info(self) -> dict[str, Any]:
        """The sample's JSON member; it has at least a "caption"."""
        try:
            info = parse_json(self.members["json"])
        except ValueError as error:
            raise self.bad(f"the json member is damaged ({error})") from error
        if not isinstance(info, dict) or not isinstance(info.get("caption"), str):
            raise self.bad(f'the json member needs a text field "caption", got {str(info)[:80]!r}')
        return info

    def number(self, info: Mapping[str, Any], name: str, low: float, high: float) -> float:
        """A field of ``info`` that lies in [low, high]; 1 where it has none."""
        value = info.get(name, 1.0)
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            raise self.bad(f"{name} must lie in [{low}, {high}], got {str(value)[:80]}")
        return float(value)

    def picture(self, role: str) -> bytes:
        """The encoded bytes of the "chosen" or the "rejected" picture, or of the only one, "picture"."""
        for suffix in ("jpg", "jpeg", "png", "webp"):
            if f"{role}.{suffix}" in self.members:
                return self.members[f"{role}.{suffix}"]
        raise self.bad(f"has no {role} picture")

    def image(self, role: str) -> Image.Image:
        """The "chosen" or the "rejected" picture, or the only one, "picture", decoded."""
        data = self.picture(role)
        try:
            return decode_picture(data)
        except DataError as error:
            raise self.bad(f"{role}: {error}") from error

    def tensors(self, member: str, **dimensions: int) -> dict[str, Tensor]:
        """The tensors of the "latents", the "embeds" or the "step" member.

        Args:
            member: which.
            dimensions: tensors that must be there, by name, and how many dimensions each has.
        """
        try:
            tensors = load_tensors(self.members[f"{member}.safetensors"])
        except TENSOR_ERRORS as error:
            raise self.bad(f"no whole {member} ({type(error).__name__}: {error})") from error
        for name, count in dimensions.items():
            if name not in tensors or tensors[name].ndim != count:
                raise self.bad(f"{member} has no {name!r} of {count} dimensions")
        for name, value in tensors.items():
            if not value.is_floating_point() or not _finite(value):
                raise self.bad(f"{member}: {name[:80]!r} holds numbers that are not finite or no numbers at all")
        return tensors
