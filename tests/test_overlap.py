"""Pictures are read, decoded, encoded and written beside the networks' work; what a command writes stays the same.

Where two things have to go on at once, each waits for the other: done one after the other they would wait in vain.
"""

import threading
from itertools import count, islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as parquet
import pytest
import torch
from PIL import Image

from callbacks.evaluation import pictures
from experiments.cli.workers import batches_ahead
from experiments.preparation import encoding
from experiments.preparation.encoding import encoded, latents_key
from experiments.preparation.parts import write_parts
from experiments.preparation.pickapic_rows import Pair
from experiments.preparation.pickapic_schema import pair_row
from lightning_modules.policies import Frozen, StableDiffusion

WAIT = 20  # seconds, after which something has been waited for in vain


@pytest.mark.parametrize("total", [0, 1, 3, 4, 7])
def test_batches_hold_everything_in_order(total):
    found = list(batches_ahead(iter(range(total)), 3))
    assert [item for batch in found for item in batch] == list(range(total))
    assert all(len(batch) == 3 for batch in found[:-1])


def test_a_batch_is_read_while_the_one_before_is_worked_on():
    read = {n: threading.Event() for n in range(8)}

    def items():
        for n, event in read.items():
            event.set()
            yield n

    for batch in batches_ahead(items(), 2):
        assert all(read[n].wait(WAIT) for n in range(batch[0], min(batch[0] + 4, 8)))
        assert not read[7].is_set() or batch[0] >= 4  # no more than one batch


def test_what_reading_raises_comes_after_what_was_read():
    def items():
        yield from range(3)
        raise ValueError("the fourth")

    batches = batches_ahead(items(), 2)
    assert next(batches) == [0, 1]
    with pytest.raises(ValueError, match="the fourth"):
        next(batches)


def test_nothing_is_read_once_nobody_wants_it():
    source = count()
    batches = batches_ahead(source, 2)
    assert next(batches) == [0, 1]
    batches.close()
    assert list(islice(source, 1)) == [4]


def row_of(number):
    return pair_row(number, 0, "a prompt", np.full((2, 4, 4, 3), number, np.uint8), 1.0, 1, ("a", "b"))


def test_rows_are_made_while_the_next_ones_are_asked_for(tmp_path):
    asked = [threading.Event() for _ in range(3)]

    def rows_of(numbers):
        first = numbers[0]
        asked[first].set()

        def make():
            assert first == 2 or asked[first + 1].wait(WAIT)
            return row_of(first)

        return [make]

    write_parts(tmp_path / "out", {}, pairs=3, batch_size=1, rows_of=rows_of)
    (file,) = (tmp_path / "out").glob("*.parquet")
    kept = parquet.read_table(file).to_pylist()
    assert [(row["image_0_uid"], row["jpg_0"]) for row in kept] == [
        (row["image_0_uid"], row["jpg_0"]) for row in map(row_of, range(3))
    ]


def test_a_row_that_cannot_be_made_leaves_no_part(tmp_path):
    def fails():
        raise ValueError("row 1")

    with pytest.raises(ValueError, match="row 1"):
        write_parts(tmp_path, {}, 2, 1, lambda numbers: [fails if numbers[0] else lambda: row_of(0)])
    assert not list(tmp_path.glob("*.parquet"))


def test_pictures_are_written_and_read_together(tmp_path, monkeypatch):
    images = torch.arange(2 * 3 * 4 * 4).reshape(2, 3, 4, 4) / 255
    files = [tmp_path / "0.png", tmp_path / "1.png"]
    both = threading.Barrier(2)

    def together(function):
        def call(*args):
            both.wait(WAIT)
            return function(*args)

        return call

    monkeypatch.setattr(pictures, "png", together(pictures.png))
    pictures.write_pictures(images, ["a", "b"], files)
    monkeypatch.setattr(pictures, "Image", SimpleNamespace(open=together(Image.open)))
    assert torch.equal(pictures.read_pictures(files), images)


def test_pictures_are_decoded_while_those_before_are_encoded(pipelines: Path, monkeypatch):
    policy = StableDiffusion(str(pipelines / "tiny-sd15"), Frozen())
    monkeypatch.setattr(encoding, "ENCODE_BATCH", 1)
    decoded = [threading.Event() for _ in range(3)]

    def pairs():
        for n, event in enumerate(decoded):
            event.set()
            images = (Image.new("RGB", (40, 32), (n, 0, 0)), Image.new("RGB", (32, 40), (0, n, 0)))
            yield Pair(n, b"", b"", {"caption": f"prompt {n}"}, images)

    encode, calls = policy.encode_images, count()

    def waits_for_the_next(images):
        assert decoded[min(next(calls) + 1, 2)].wait(WAIT)
        return encode(images)

    monkeypatch.setattr(policy, "encode_images", waits_for_the_next)
    found = list(encoded(pairs(), policy, latents_key(policy, 32, "float32"), 3))
    assert [number for number, _ in found] == [0, 1, 2]
