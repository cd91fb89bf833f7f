"""One sample of a shard: its members as bytes, and what they mean.

Encoded pictures pass through untouched; tensors are safetensors, the rest is JSON. Nothing is pickled or unpickled.
"""

from __future__ import annotations

import io
import json
import struct
import zlib
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
from lightning_modules.errors import DataError

PICTURE_FORMATS = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}
# Decoded, a picture of this size takes 200 MB; generated pictures have 0.25 to 4 megapixels.
MAX_PICTURE_PIXELS = 64 * 1024 * 1024
# What Pillow raises on damaged pictures, depending on the format and on where the damage is.
DECODE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    LookupError,
    OverflowError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
)
# What safetensors raises on damaged bytes, and on types that this torch doesn't know.
TENSOR_ERRORS = (SafetensorError, KeyError, ValueError, RuntimeError, TypeError, OverflowError)


# -------------------------------------------------------------------------------------------- writing


def picture_suffix(data: bytes) -> str | None:
    """``jpg``, ``png`` or ``webp`` from a picture's first bytes, None for anything else."""
    if data[:3] == b"\xff\xd8\xff":
        return "jpg"
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        return "png"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    return None


def pixel_members(chosen: bytes, rejected: bytes, info: Mapping[str, Any]) -> dict[str, bytes]:
    """The members of a pair of encoded pictures; ``info`` needs a "caption"."""
    members = {"json": _dump(info)}
    for role, data in (("chosen", chosen), ("rejected", rejected)):
        suffix = picture_suffix(data)
        if suffix is None:
            raise DataError(f"the {role} picture is neither JPEG, PNG nor WebP: it begins with {data[:8]!r}")
        members[f"{role}.{suffix}"] = data
    return members


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
        """The encoded bytes of the "chosen" or the "rejected" picture."""
        for suffix in ("jpg", "jpeg", "png", "webp"):
            if f"{role}.{suffix}" in self.members:
                return self.members[f"{role}.{suffix}"]
        raise self.bad(f"has no {role} picture")

    def image(self, role: str) -> Image.Image:
        """The "chosen" or the "rejected" picture, decoded."""
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
            if not value.is_floating_point() or not value.float().isfinite().all():
                raise self.bad(f"{member}: {name[:80]!r} holds numbers that are not finite or no numbers at all")
        return tensors


def decode_picture(data: bytes) -> Image.Image:
    """RGB pixels of a JPEG, PNG or WebP picture; what is transparent becomes white.

    Raises:
        DataError: damaged, of another format, or larger than ``MAX_PICTURE_PIXELS``.
    """
    _check_pixels(*_webp_size(data))
    try:
        with Image.open(io.BytesIO(data), formats=tuple(PICTURE_FORMATS.values())) as image:
            _check_pixels(*image.size)
            image.load()
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return image.convert("RGB")
    except DECODE_ERRORS as error:
        raise DataError(f"a damaged picture of {len(data)} bytes ({type(error).__name__}: {error})") from error


def _check_pixels(width: int, height: int) -> None:
    if width * height > MAX_PICTURE_PIXELS:
        raise DataError(f"a picture of {width}x{height} px is larger than {MAX_PICTURE_PIXELS} px")


def _webp_size(data: bytes) -> tuple[int, int]:
    """Width and height from a WebP picture's header; (0, 0) for anything else.

    Pillow makes room for a WebP picture when it is opened, before it tells the size.
    """
    if picture_suffix(data) != "webp" or len(data) < 30:
        return 0, 0
    if data[12:16] == b"VP8X":
        return int.from_bytes(data[24:27], "little") + 1, int.from_bytes(data[27:30], "little") + 1
    if data[12:16] == b"VP8L":
        bits = int.from_bytes(data[21:25], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    return int.from_bytes(data[26:28], "little") & 0x3FFF, int.from_bytes(data[28:30], "little") & 0x3FFF
