"""Reading pairs from shards, in one process: of pixels against the loop that Hugging Face's examples have, of cached
latents and embeddings against plain webdataset on the same shards."""

import io
import random

import numpy as np
import pyarrow
import pyarrow.parquet as parquet
import pytest
import torch
import webdataset
from alternating import Clock, alternate
from pictures import pickapic_row
from PIL import Image
from safetensors.torch import load
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from datamodules.preference_pairs import PreferencePairsDataModule
from datamodules.shards.manifest import LatentsKey, Manifest
from datamodules.shards.samples import latent_members, pixel_members
from datamodules.shards.writer import write_shard

BATCH = 8
WIDTH, TOKENS = 768, 77  # of SD 1.5's embeddings


class ParquetPairs(Dataset):
    """Rows of a table, as the official training reads them: open, RGB, resize, crop, flip, tensor, normalise."""

    def __init__(self, file, side):
        self.table = parquet.read_table(file)
        self.transform = transforms.Compose([
            transforms.Resize(side, transforms.InterpolationMode.BILINEAR), transforms.CenterCrop(side),
            transforms.RandomHorizontalFlip(), transforms.ToTensor(), transforms.Normalize([0.5], [0.5]),
        ])  # fmt: skip

    def __len__(self):
        return len(self.table)

    def __getitem__(self, n):
        row = self.table.slice(n, 1).to_pylist()[0]
        both = [self.transform(Image.open(io.BytesIO(row[f"jpg_{which}"])).convert("RGB")) for which in (0, 1)]
        return torch.cat(both), row["caption"]


@pytest.fixture(scope="module")
def pixels(size, tmp_path_factory):
    """The same pairs as parquet and as shards."""
    folder = tmp_path_factory.mktemp("pixels")
    source = np.random.default_rng(0)
    rows = [pickapic_row(source, size.side, n) for n in range(size.samples)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "pairs.parquet")
    samples = (
        (n, pixel_members(row["jpg_0"], row["jpg_1"], {"caption": row["caption"]})) for n, row in enumerate(rows)
    )
    shard = write_shard(folder / "00000.tar", samples)
    Manifest("pixels", (shard,), {"pairs": len(rows)}).write(folder)
    return folder


@pytest.fixture(scope="module")
def cached(size, tmp_path_factory):
    """Latents of 512 px and SD 1.5's embeddings, or small ones."""
    folder = tmp_path_factory.mktemp("cached")
    cells = size.side // 8
    draw = torch.Generator().manual_seed(0)
    ids = [float(size.side)] * 2 + [0.0] * 2 + [float(size.side)] * 2
    info = {"chosen_time_ids": ids, "rejected_time_ids": ids}

    def sample(n):
        both = torch.randn(2, 4, cells, cells, generator=draw).half()
        embeds = torch.randn(TOKENS, WIDTH, generator=draw).half()
        return latent_members({"chosen": both[0], "rejected": both[1]}, {"embeds": embeds},
                              {**info, "caption": f"picture {n}", "embeds_key": f"{n:09d}"})  # fmt: skip

    shard = write_shard(folder / "00000.tar", ((n, sample(n)) for n in range(size.samples)))
    key = LatentsKey("0" * 32, size.side, "centre", "float16")
    Manifest("latents", (shard,), {"pairs": size.samples}, latents=key).write(folder)
    return folder


def read(loader):
    """How many pairs it gives; every batch is dropped at once, as a training would."""
    return sum(len(batch) if not isinstance(batch, (list, tuple)) else len(batch[0]) for batch in loader)


def own_loader(folder, size):
    data = PreferencePairsDataModule(str(folder), BATCH, resolution=size.side)
    data.setup("fit")
    return data.train_dataloader()


def test_pixel_pairs(pixels, size, rounds, rows):
    plain = DataLoader(ParquetPairs(pixels / "pairs.parquet", size.side), BATCH, shuffle=True)
    own = own_loader(pixels, size)
    ways = {"HF path": lambda: read(plain), "ours": lambda: read(own)}
    timings = alternate(ways, rounds, Clock("cpu"), peers=["HF path"])
    assert timings.results["ours"] == timings.results["HF path"] == size.samples
    rows.ratio("Pixel pairs", timings, "HF path", "ours", pairs=size.samples)


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # webdataset's
def test_cached_pairs(cached, size, rounds, rows):
    def decoded(sample):
        latents, embeds = load(sample["latents.safetensors"]), load(sample["embeds.safetensors"])
        return latents["chosen"].float(), latents["rejected"].float(), embeds["embeds"].float(), sample["json"]

    def gathered(samples):
        first, second, embeds, infos = zip(*samples)
        return torch.stack(first), torch.stack(second), torch.stack(embeds), infos

    def plain():
        random.seed(0)
        data = webdataset.WebDataset(str(cached / "00000.tar"), shardshuffle=False, empty_check=False)
        pairs = data.shuffle(1000).decode().map(decoded).batched(BATCH, collation_fn=gathered)
        return read(DataLoader(pairs, batch_size=None))

    own = own_loader(cached, size)
    timings = alternate({"webdataset": plain, "ours": lambda: read(own)}, rounds, Clock("cpu"), peers=["webdataset"])
    assert timings.results["ours"] == timings.results["webdataset"] == size.samples
    rows.ratio("Cached pairs", timings, "webdataset", "ours", pairs=size.samples)
