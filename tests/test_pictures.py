"""What a picture's file says of it is applied where it is decoded: orientation, depth, palette, transparency, CMYK."""

from __future__ import annotations

import io
import random
import struct
import zlib

import numpy as np
import pytest
from pairs_data import picture, rows, write_parquet
from PIL import Image

from datamodules.preference_pairs import PreferencePairsDataModule
from datamodules.shards.locate import open_shards
from datamodules.shards.pictures import decode_picture, picture_size
from experiments import prepare_pickapic
from lightning_modules.errors import DataError

ORIENTATION = 0x0112
# Red, green, blue and white, one pixel each: no two orientations of it are alike.
CORNERS = np.array([[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [255, 255, 255]], [[9, 9, 9], [90, 90, 90]]], np.uint8)
# How a picture that is to look like a has to be stored, by the meaning of each orientation in EXIF's specification
# (where row 0 and column 0 of what is stored lie): 2 top right, 3 bottom right, 4 bottom left, 5 left top, ...
STORED = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: a[:, ::-1].transpose(1, 0, 2),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: a[::-1].transpose(1, 0, 2),
}


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def turned(image: Image.Image, orientation: int, kind: str = "PNG") -> bytes:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    options = {"lossless": True} if kind == "WEBP" else {}
    return encoded(image, kind, exif=exif, **options)


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
@pytest.mark.parametrize("orientation", STORED)
def test_every_orientation_is_turned_upright(orientation: int, kind: str) -> None:
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](CORNERS)))
    np.testing.assert_array_equal(np.asarray(decode_picture(turned(stored, orientation, kind))), CORNERS)


@pytest.mark.parametrize("value", [0, 9, 65535])
def test_an_orientation_without_meaning_turns_nothing(value: int) -> None:
    np.testing.assert_array_equal(np.asarray(decode_picture(turned(Image.fromarray(CORNERS), value))), CORNERS)


def test_damaged_exif_data_harm_no_picture() -> None:
    for exif in (b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + bytes(8), b"x"):
        image = decode_picture(encoded(Image.fromarray(CORNERS), exif=exif))
        np.testing.assert_array_equal(np.asarray(image), CORNERS)


def test_a_picture_on_its_side_is_stored_as_it_is_and_trained_upright(tmp_path) -> None:
    """Sizes, and so SDXL's time ids, are those of the picture as everybody sees it."""
    sideways = turned(Image.new("RGB", (48, 32), (200, 0, 0)), 6, "JPEG")  # for everybody 32 wide and 48 high
    source = write_parquet(tmp_path / "a.parquet", rows(1, jpg_0=sideways))
    prepare_pickapic.main(["--input", str(source), "--output", str(tmp_path / "out")])
    sample = open_shards(str(tmp_path / "out")).read(0, 0)
    assert sample.picture("chosen") == sideways
    assert sample.info()["chosen_size"] == [48, 32]
    batch = next(iter(PreferencePairsDataModule(str(tmp_path / "out"), 1, resolution=32).train_dataloader()))
    assert batch.chosen_time_ids.tolist() == [[48, 32, 8, 0, 32, 32]]


def png16(values: np.ndarray, transparent: int | None = None) -> bytes:
    """A grey PNG of 16 bits, by its specification: Pillow writes no transparent value into one."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width = values.shape
    lines = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    parts = [chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, 0, 0, 0, 0))]
    parts += [chunk(b"tRNS", struct.pack(">H", transparent))] if transparent is not None else []
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")


def test_of_sixteen_bits_the_upper_eight_are_kept() -> None:
    values = np.array([[0, 255, 256], [0x8012, 0xFEFF, 0xFFFF]])
    image = decode_picture(png16(values))
    assert np.asarray(image)[..., 0].tolist() == [[0, 0, 1], [0x80, 0xFE, 0xFF]]
    assert np.asarray(decode_picture(png16(values, 0x8012)))[..., 1].tolist() == [[0, 0, 1], [255, 0xFE, 0xFF]]


def test_palettes_grey_and_cmyk_become_rgb() -> None:
    colours = Image.fromarray(np.repeat(CORNERS[:2], 8, axis=0).repeat(8, axis=1))
    palette = encoded(colours.quantize(8))
    np.testing.assert_array_equal(np.asarray(decode_picture(palette)), np.asarray(colours))
    clear = colours.quantize(8)
    assert decode_picture(encoded(clear, transparency=clear.getpixel((0, 0)))).getpixel((0, 0)) == (255, 255, 255)
    assert decode_picture(encoded(Image.new("L", (2, 2), 77))).getpixel((1, 1)) == (77, 77, 77)
    red = decode_picture(encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=100)).getpixel((4, 4))
    assert np.abs(np.subtract(red, (255, 0, 0))).max() <= 3


@pytest.mark.parametrize(
    ("kind", "name"),
    [("GIF", "GIF"), ("BMP", "BMP"), ("TIFF", "TIFF"), ("AVIF", "AVIF"), ("JPEG2000", "JPEG 2000")],
)
def test_a_sound_picture_of_another_format_is_named_and_not_called_damaged(kind: str, name: str) -> None:
    with pytest.raises(DataError) as caught:
        decode_picture(encoded(Image.new("RGB", (8, 8)), kind))
    assert str(caught.value) == f"a picture in {name} format, read are JPEG, PNG and WebP; convert it"


@pytest.mark.parametrize("data", [b"", b"<html>404 Not Found</html>", picture(3)[:40], picture(3, kind="JPEG")[:30]])
def test_damage_is_told_without_addresses_in_memory(data: bytes) -> None:
    with pytest.raises(DataError, match=f"a damaged picture of {len(data)} bytes") as caught:
        decode_picture(data)
    assert "object at" not in str(caught.value)


# ---------------------------------------------------------------------------------------- checked, not decoded


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("orientation", STORED)
def test_a_picture_that_is_only_checked_has_the_size_that_it_would_have_decoded(mode: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    for size in ((1, 1), (7, 3), (37, 90)):
        for progressive in (False, True):
            data = encoded(Image.new(mode, size, 90), "JPEG", exif=exif, progressive=progressive)
            assert picture_size(data) == decode_picture(data).size
    data = picture(5, (24, 16))  # a PNG
    assert picture_size(data) == (24, 16)


def refusal(look, data: bytes) -> str | None:
    try:
        look(data)
    except DataError as error:
        return str(error)
    return None


@pytest.mark.parametrize("progressive", [False, True])
def test_a_picture_that_is_only_checked_is_refused_as_when_it_is_decoded(progressive: bool) -> None:
    source = random.Random(3)
    noise = np.frombuffer(source.randbytes(40 * 56 * 3), np.uint8).reshape(40, 56, 3)
    data = encoded(Image.fromarray(noise), "JPEG", progressive=progressive)
    harmed = [data[: source.randrange(len(data))] for _ in range(60)]
    for _ in range(200):
        bytes_ = bytearray(data)
        bytes_[source.randrange(len(data))] = source.randrange(256)
        harmed.append(bytes(bytes_))
    told = [(refusal(picture_size, one), refusal(decode_picture, one)) for one in harmed]
    assert [pair for pair in told if pair[0] != pair[1]] == []
    assert sum(pair[0] is not None for pair in told) > 60
