"""Preparing shards: against a plain loop over Pick-a-Pic's parquet, and own pictures in a folder against that parquet.

The plain loop reads rows, decodes both pictures so that damaged ones are found, and writes the encoded ones into tars.
"""

import io
import json
from contextlib import redirect_stdout

import numpy as np
import pyarrow
import pyarrow.parquet as parquet
import pytest
import webdataset
from alternating import Clock, alternate
from pictures import pickapic_row
from PIL import Image

from experiments import prepare_pairs, prepare_pickapic


@pytest.fixture(scope="module")
def folder(size, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    source = np.random.default_rng(0)
    rows = [pickapic_row(source, size.side, n) for n in range(size.samples)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "pairs.parquet", row_group_size=100)
    for place, column in (("chosen", "jpg_0"), ("rejected", "jpg_1")):
        (folder / "pictures" / place).mkdir(parents=True)
        for n, row in enumerate(rows):
            (folder / "pictures" / place / f"{n:05d}.jpg").write_bytes(row[column])
            if place == "chosen":
                (folder / "pictures" / place / f"{n:05d}.txt").write_text(row["caption"])
    return folder


@pytest.fixture
def prepared(tmp_path_factory):
    """A command's way into a new folder."""

    def way(command, place):
        with redirect_stdout(io.StringIO()):
            return command.main(["--input", str(place), "--output", str(tmp_path_factory.mktemp("out") / "shards")])

    return way


def plain_loop(file, output):
    written = 0
    with webdataset.TarWriter(str(output)) as tar:
        for batch in parquet.ParquetFile(file).iter_batches(32):
            for row in batch.to_pylist():
                if row["label_0"] == row["label_1"]:
                    continue
                first = row["label_0"] > row["label_1"]
                for column in ("jpg_0", "jpg_1"):
                    Image.open(io.BytesIO(row[column])).convert("RGB")
                chosen, rejected = (row["jpg_0"], row["jpg_1"]) if first else (row["jpg_1"], row["jpg_0"])
                info = json.dumps({"caption": row["caption"]}).encode()
                sample = {"chosen.jpg": chosen, "rejected.jpg": rejected, "json": info}
                tar.write({"__key__": f"{written:09d}", **sample})
                written += 1
    return written


def test_preparing_parquet(folder, prepared, tmp_path, rounds, rows, size):
    ways = {
        "plain loop": lambda: plain_loop(folder / "pairs.parquet", tmp_path / "plain.tar"),
        "ours": lambda: prepared(prepare_pickapic, folder / "pairs.parquet"),
    }
    timings = alternate(ways, rounds, Clock("cpu"), peers=["plain loop"])
    assert timings.results["ours"].counts["pairs"] == timings.results["plain loop"] == size.samples
    rows.ratio("Preparing Pick-a-Pic", timings, "plain loop", "ours", pairs=size.samples)


def test_preparing_a_folder_of_pictures(folder, prepared, rounds, rows, size):
    ways = {
        "parquet": lambda: prepared(prepare_pickapic, folder / "pairs.parquet"),
        "pictures": lambda: prepared(prepare_pairs, folder / "pictures"),
    }
    timings = alternate(ways, rounds, Clock("cpu"))
    rows.ratio("Preparing pictures in folders", timings, "parquet", "pictures", pairs=size.samples)
