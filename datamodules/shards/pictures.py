"""The one place that decodes pictures, for training and for preparation alike: 8-bit RGB, upright, on white.

An encoded picture passes through shards untouched, so what its file says of it is applied here: the orientation that a
camera or a phone noted, palettes, transparency, 16 bits per channel, CMYK.
"""

from __future__ import annotations

import io
import re
import struct
import warnings
import zlib

import numpy as np
from PIL import ExifTags, Image

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
# Formats that are told apart from damage: what a file of each begins with.
_OTHER_FORMATS = {
    "GIF": rb"GIF8[79]a",
    "TIFF": rb"II\*\0|MM\0\*",
    "BMP": rb"BM.{4}\0{4}",
    "AVIF": rb".{4}ftypavi[fs]",
    "HEIC": rb".{4}ftyp(?:hei[cmsx]|hev[cmsx]|mif1|msf1)",
    "JPEG 2000": rb"\0\0\0\x0cjP  \r\n|\xff\x4f\xff\x51",
    "JPEG XL": rb"\xff\x0a|\0\0\0\x0cJXL ",
}
# What turns a picture upright, by the orientation in its EXIF data; 1 is upright.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ON_THEIR_SIDE = (5, 6, 7, 8)


def picture_suffix(data: bytes) -> str | None:
    """``jpg``, ``png`` or ``webp`` from a picture's first bytes, None for anything else."""
    if data[:3] == b"\xff\xd8\xff":
        return "jpg"
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        return "png"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    return None


def decode_picture(data: bytes) -> Image.Image:
    """RGB pixels of a JPEG, PNG or WebP picture, turned upright; what is transparent becomes white.

    Of an animation it is the first picture; of 16 bits per channel the upper 8 are kept.

    Raises:
        DataError: damaged, of another format, or larger than ``MAX_PICTURE_PIXELS``.
    """
    if picture_suffix(data) is None:
        raise DataError(_no_picture(data))
    _check_pixels(*_webp_size(data))
    try:
        with Image.open(io.BytesIO(data), formats=tuple(PICTURE_FORMATS.values())) as image:
            _check_pixels(*image.size)
            image.load()
            turn = _UPRIGHT.get(_orientation(image))
            pixels = _rgb(image)
            return pixels if turn is None else pixels.transpose(turn)
    except DECODE_ERRORS as error:
        raise _damaged(data, error) from error


def picture_size(data: bytes) -> tuple[int, int]:
    """Width and height of what ``decode_picture`` would give, and its refusals: all of a file is read and checked.

    A JPEG's pixels are made at an eighth of their size, which skips most of the arithmetic and none of the data.
    """
    if picture_suffix(data) != "jpg":
        return decode_picture(data).size
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG",)) as image:
            width, height = image.size
            _check_pixels(width, height)
            image.draft(image.mode, (1, 1))
            image.load()
            return (height, width) if _orientation(image) in _ON_THEIR_SIDE else (width, height)
    except DECODE_ERRORS as error:
        raise _damaged(data, error) from error


def _damaged(data: bytes, error: BaseException) -> DataError:
    # Pillow names the object that it read from by its address in memory.
    reason = re.sub(r" <\S+ object at 0x[0-9a-f]+>", "", str(error))
    return DataError(f"a damaged picture of {len(data)} bytes ({type(error).__name__}: {reason})")


def _no_picture(data: bytes) -> str:
    for name, beginning in _OTHER_FORMATS.items():
        if re.match(beginning, data, re.DOTALL):
            return f"a picture in {name} format, read are JPEG, PNG and WebP; convert it"
    return f"a damaged picture of {len(data)} bytes, neither JPEG, PNG nor WebP: it begins with {data[:16]!r}"


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation of a loaded picture, 1 where it has none or none that can be read."""
    if not ({"exif", "Raw profile type exif", "XML:com.adobe.xmp", "xmp"} & image.info.keys()):
        return 1
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # notes of damage in EXIF data, which harms no pixel
            return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except (*DECODE_ERRORS, TypeError):
        return 1


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        image = _eight_bits(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")  # which would copy what is RGB already


def _eight_bits(image: Image.Image) -> Image.Image:
    """16-bit grey as 8-bit grey, with alpha where one value means transparent; Pillow would clip it to white."""
    values = np.asarray(image)
    grey = Image.fromarray((values >> 8).astype(np.uint8))
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        grey.putalpha(Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8)))
    return grey


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
