"""Rows of pictures above each other: drawn by all ranks, and set as one picture."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from itertools import pairwise

import lightning.pytorch as pl
import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

from callbacks.evaluation.pictures import PictureRequest, gathered, make_pictures, my_share
from lightning_modules.alignment import AlignmentModule
from lightning_modules.sampling.eight_bit import eight_bit
from lightning_modules.sampling.pictures import Denoise, Sampler

CELL = 128  # pixels a side below which pictures are enlarged; smaller ones leave no room for a caption
MARGIN = 6  # pixels between pictures
LINE = 15  # pixels a caption line
CAPTION_LINES = 4

Row = list[UInt8[np.ndarray, "H W 3"]]


def drawn_row(
    trainer: pl.Trainer,
    module: AlignmentModule,
    sampler: Sampler,
    denoise: Denoise,
    requests: Sequence[PictureRequest],
    batch_size: int,
    image_size: int | None,
    title: str,
) -> Row:
    """The pictures of all requests, in eight bits. All ranks must call it, within ``evaluation_mode``, and get all.

    Args:
        trainer, module: the run's.
        sampler: how the pictures are made.
        denoise: the policy's or the reference's prediction.
        requests: which pictures.
        batch_size: pictures at a time on one device.
        image_size: side in pixels; None takes the policy's own.
        title: what the progress bar says.
    """
    mine: Row = []
    for batch in my_share(trainer, requests, batch_size, title):
        images = make_pictures(trainer, module, sampler, denoise, batch, image_size)
        mine += list(eight_bit(images, [request.prompt for request in batch]))
    return gathered(trainer, mine)


def grid_picture(
    rows: Mapping[str, Row],
    captions: Sequence[str],
    notes: Sequence[str] = (),
    headings: Mapping[int, str] | None = None,
) -> Image.Image:
    """Rows of pictures as one.

    Args:
        rows: name, at the left of the row -> its pictures, all of one size.
        captions: under every column, in lines of its width.
        notes: a line above every caption; with it at most ``CAPTION_LINES``.
        headings: index of a column -> what stands above it and those at its right, up to the next that has one.
    """
    font = ImageFont.load_default(size=LINE - 2)
    cell = max(CELL, max(picture.shape[0] for row in rows.values() for picture in row))
    characters = int(cell / font.getlength("n"))
    starts = sorted(headings or {})
    spans = [end - start for start, end in pairwise([*starts, len(captions)])]
    heads = [textwrap.fill((headings or {})[c], characters * span) for c, span in zip(starts, spans, strict=True)]
    left = 2 * MARGIN + max(int(font.getlength(name)) for name in rows)
    above = MARGIN + max((head.count("\n") + 1 for head in heads), default=0) * LINE
    width = left + len(captions) * (cell + MARGIN)
    height = above + len(rows) * (cell + MARGIN) + CAPTION_LINES * LINE + MARGIN
    canvas = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(canvas)
    for c, head in zip(starts, heads, strict=True):
        draw.multiline_text((left + c * (cell + MARGIN), MARGIN // 2), head, "black", font, spacing=0)
    for r, (name, row) in enumerate(rows.items()):
        top = above + r * (cell + MARGIN)
        draw.text((MARGIN, top + cell // 2), name, "black", font)
        for c, picture in enumerate(row):
            enlarged = Image.fromarray(picture).resize((cell, cell), Image.Resampling.NEAREST)
            canvas.paste(enlarged, (left + c * (cell + MARGIN), top))
    for c, caption in enumerate(captions):
        note = list(notes[c : c + 1])
        lines = textwrap.wrap(caption, characters, max_lines=CAPTION_LINES - len(note), placeholder=" ...")
        corner = (left + c * (cell + MARGIN), height - CAPTION_LINES * LINE - MARGIN)
        draw.multiline_text(corner, "\n".join([*note, *lines]), "black", font, spacing=0)
    return canvas
