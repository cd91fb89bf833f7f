"""Pictures that cost about as much to decode as photographs."""

import io

import numpy as np
from PIL import Image


def photograph(source: np.random.Generator, side: int) -> bytes:
    """A JPEG of smooth colours with some noise."""
    colours = Image.fromarray(source.integers(0, 256, (16, 16, 3), np.uint8))
    smooth = np.asarray(colours.resize((side, side), Image.Resampling.BICUBIC)).astype(int)
    noisy = np.clip(smooth + source.integers(-8, 9, (side, side, 3)), 0, 255)
    out = io.BytesIO()
    Image.fromarray(noisy.astype(np.uint8)).save(out, "JPEG", quality=90)
    return out.getvalue()


def pickapic_row(source: np.random.Generator, side: int, n: int) -> dict:
    """As Pick-a-Pic has it; the first picture is preferred."""
    pictures = {f"jpg_{which}": photograph(source, side) for which in (0, 1)}
    uids = {"image_0_uid": f"a{n}", "image_1_uid": f"b{n}"}
    return {**pictures, **uids, "label_0": 1.0, "label_1": 0.0, "caption": f"picture {n}"}
