"""CPU time of preparing own pictures in a folder, against the same pairs as Pick-a-Pic's parquet.

    python tests/bench_prepare_pairs.py --pairs 1000 --side 512 --rounds 3

Rounds alternate between the two, so that other work on the machine meets both. One process each, imports not counted.
"""

import argparse
import io
import statistics
import tempfile
import time
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet as parquet
from PIL import Image

from experiments import prepare_pairs, prepare_pickapic


def photograph(source: np.random.Generator, side: int) -> bytes:
    """A JPEG of smooth colours with some noise: about as much to decode as a photograph."""
    colours = Image.fromarray(source.integers(0, 256, (16, 16, 3), np.uint8))
    smooth = np.asarray(colours.resize((side, side), Image.Resampling.BICUBIC)).astype(int)
    noisy = np.clip(smooth + source.integers(-8, 9, (side, side, 3)), 0, 255)
    out = io.BytesIO()
    Image.fromarray(noisy.astype(np.uint8)).save(out, "JPEG", quality=90)
    return out.getvalue()


def make(folder: Path, pairs: int, side: int) -> None:
    source = np.random.default_rng(0)
    rows = []
    for role in ("chosen", "rejected"):
        (folder / "pictures" / role).mkdir(parents=True)
    for n in range(pairs):
        chosen, rejected = photograph(source, side), photograph(source, side)
        (folder / "pictures" / "chosen" / f"{n:05d}.jpg").write_bytes(chosen)
        (folder / "pictures" / "rejected" / f"{n:05d}.jpg").write_bytes(rejected)
        (folder / "pictures" / "chosen" / f"{n:05d}.txt").write_text(f"picture {n}")
        rows.append({"jpg_0": chosen, "jpg_1": rejected, "label_0": 1.0, "label_1": 0.0, "caption": f"picture {n}"})
    parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "pairs.parquet", row_group_size=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=1000)
    parser.add_argument("--side", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make(folder, args.pairs, args.side)
        ways = {
            "pictures": (prepare_pairs, folder / "pictures"),
            "parquet": (prepare_pickapic, folder / "pairs.parquet"),
        }
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        for number in range(args.rounds):
            for way, (command, place) in ways.items():
                start = time.process_time()
                with redirect_stdout(io.StringIO()):
                    command.main(["--input", str(place), "--output", str(folder / f"{way}-{number}")])
                seconds[way].append(time.process_time() - start)
    for way, found in seconds.items():
        print(f"{way}: {args.pairs / statistics.median(found):.0f} pairs per CPU second (rounds {found})")
    ratios = [one / other for one, other in zip(seconds["pictures"], seconds["parquet"])]
    middle, low, high = statistics.median(ratios), min(ratios), max(ratios)
    print(f"pictures take {middle:.2f} ({low:.2f} to {high:.2f}) times parquet's CPU time")


if __name__ == "__main__":
    main()
