from __future__ import annotations

import io
import json
import os
import pickle
import tarfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pairs_data import picture, write_shards
from PIL import Image

from datamodules.shards import download
from datamodules.shards.download import Downloads
from datamodules.shards.locate import open_shards
from datamodules.shards.manifest import MANIFEST, Manifest
from datamodules.shards.pictures import decode_picture
from datamodules.shards.reader import IndexedShard, Located, ShardSet
from datamodules.shards.samples import Sample, latent_members, pixel_members
from datamodules.shards.writer import write_shard
from datamodules.stream.order import ShuffledOrder, StoredOrder
from lightning_modules.errors import ConfigError, DataError
from lightning_modules.files import atomic_file


def read_all(shards):
    return [shards.read(*StoredOrder(shards.sizes)[n]) for n in range(len(shards))]


def captions(shards) -> list[str]:
    return [sample.info()["caption"] for sample in read_all(shards)]


# ---------------------------------------------------------------------------------- encode and decode


def test_encoded_bytes_pass_through_untouched(tmp_path: Path) -> None:
    jpeg, webp = picture(3, kind="JPEG") + b"trailing bytes a re-encoding would lose", picture(4, kind="WEBP")
    write_shard(tmp_path / "00000.tar", [(12, pixel_members(jpeg, webp, {"caption": "é"}))])

    sample = IndexedShard(tmp_path / "00000.tar").read("000000012")

    assert sample.picture("chosen") == jpeg
    assert sample.picture("rejected") == webp
    assert sample.info() == {"caption": "é"}
    with tarfile.open(tmp_path / "00000.tar") as tar:
        assert tar.getnames() == ["000000012.chosen.jpg", "000000012.json", "000000012.rejected.webp"]


def test_latents_and_embeddings_come_back_bit_for_bit(tmp_path: Path) -> None:
    latents = {"chosen": torch.randn(4, 2, 2).half(), "rejected": torch.randn(4, 2, 2).half()}
    embeds = {"embeds": torch.randn(3, 5)}
    members = [
        (0, latent_members(latents, embeds, {"caption": "a"})),
        (1, latent_members(latents, None, {"caption": "a", "embeds_key": "000000000"})),
    ]
    shard = IndexedShard(write_shard_at(tmp_path, members))

    assert shard.kind == "latents"
    assert torch.equal(shard.read("000000001").tensors("latents")["chosen"], latents["chosen"])
    assert torch.equal(shard.read("000000000").tensors("embeds")["embeds"], embeds["embeds"])


def write_shard_at(folder: Path, members) -> Path:
    write_shard(folder / "00000.tar", members)
    return folder / "00000.tar"


def test_the_same_samples_give_the_same_file(tmp_path: Path) -> None:
    samples = [(n, pixel_members(picture(n), picture(n + 1), {"caption": str(n)})) for n in range(3)]
    first, second = write_shard(tmp_path / "a.tar", samples), write_shard(tmp_path / "b.tar", samples)
    assert (first.samples, first.bytes, first.digest) == (3, second.bytes, second.digest)
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    def samples():
        yield 0, pixel_members(picture(0), picture(1), {"caption": ""})
        raise DataError("the source broke off")

    with pytest.raises(DataError, match="broke off"):
        write_shard(tmp_path / "00000.tar", samples())
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="cannot write .*file/x: File exists"), atomic_file(tmp_path / "file" / "x"):
        pass


def test_unknown_picture_bytes_are_refused() -> None:
    with pytest.raises(DataError, match="chosen picture is neither JPEG, PNG nor WebP"):
        pixel_members(b"GIF89a..", picture(0), {"caption": ""})


def test_transparent_pixels_become_white() -> None:
    image = Image.new("RGBA", (2, 1), (255, 0, 0, 255))
    image.putpixel((1, 0), (0, 0, 0, 0))
    out = io.BytesIO()
    image.save(out, "PNG")
    decoded = decode_picture(out.getvalue())
    assert decoded.mode == "RGB"
    assert [decoded.getpixel((x, 0)) for x in (0, 1)] == [(255, 0, 0), (255, 255, 255)]


def test_a_picture_too_large_is_refused_before_it_is_decoded() -> None:
    out = io.BytesIO()
    Image.new("1", (8200, 8200)).save(out, "PNG")
    with pytest.raises(DataError, match="8200x8200 px is larger"):
        decode_picture(out.getvalue())


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b[:20], lambda b: b"", lambda b: b"x" * 99])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_damaged_pictures_are_refused(damage, kind: str) -> None:
    with pytest.raises(DataError, match="damaged picture"):
        decode_picture(damage(picture(7, (64, 64), kind)))


# ------------------------------------------------------------------------------------------- locating


def test_manifest_survives_writing_and_reading(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "data", [2, 1])
    manifest = Manifest.read(folder / MANIFEST)
    assert [shard.samples for shard in manifest.shards] == [2, 1]
    manifest.write(tmp_path)
    assert Manifest.read(tmp_path / MANIFEST) == manifest


def test_every_way_to_name_shards_reads_the_same(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "data", [2, 3, 1])
    expected = [f"caption {n}" for n in range(6)]
    names: list[str | list[str]] = [
        str(folder),
        str(folder / MANIFEST),
        f"file://{folder}",
        f"{folder}/{{00000..00002}}.tar",
        [f"{folder}/00000.tar", f"{folder}/{{00001..00002}}.tar"],
    ]
    for name in names:
        assert captions(open_shards(name)) == expected
    assert captions(open_shards(f"{folder}/00001.tar")) == expected[2:5]


def test_bare_tar_files_without_a_manifest_are_read(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "data", [2, 3])
    (folder / MANIFEST).unlink()
    assert captions(open_shards(f"{folder}/{{00000..00001}}.tar")) == [f"caption {n}" for n in range(5)]


def test_shards_from_pipes_and_urls_are_cached(tmp_path: Path) -> None:
    folder, cache = write_shards(tmp_path / "data", [2, 3]), tmp_path / "cache"
    name = f"pipe:cat {folder}/{{00000..00001}}.tar"
    assert captions(open_shards(name, Downloads(cache))) == [f"caption {n}" for n in range(5)]
    for path in folder.iterdir():
        path.unlink()
    assert captions(open_shards(name, Downloads(cache))) == [f"caption {n}" for n in range(5)]
    assert not list(cache.glob(".*-unfinished-*"))


def test_remote_shards_need_a_cache_folder() -> None:
    with pytest.raises(ConfigError, match="set data.cache_dir"):
        open_shards("https://example.invalid/data/00000.tar")


def test_a_failed_download_is_tried_again_and_then_one_message_and_leaves_nothing(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(download, "FIRST_PAUSE_SECONDS", 0.01)
    command = f"pipe:echo >> {tmp_path}/tries; false"
    with pytest.raises(DataError, match="cannot download pipe:.* .exit 1; attempt 3 of 3.; check the address"):
        open_shards(command, Downloads(tmp_path / "cache"))
    assert (tmp_path / "tries").read_text().count("\n") == 3
    assert not [path for path in (tmp_path / "cache").iterdir() if not path.name.endswith(".lock")]


def test_the_open_shards_are_bounded_and_travel_to_another_process(tmp_path: Path) -> None:
    shards = open_shards(str(write_shards(tmp_path / "data", [1, 1, 1])), max_open=2)
    assert captions(shards) == ["caption 0", "caption 1", "caption 2"]
    assert len(shards._open) == 2
    assert captions(pickle.loads(pickle.dumps(shards))) == captions(shards)


def test_the_fingerprint_knows_the_content_and_not_the_place(tmp_path: Path) -> None:
    first = write_shards(tmp_path / "a", [2, 1])
    second = write_shards(tmp_path / "b", [2, 1])
    other = write_shards(tmp_path / "c", [2, 1], (8, 9))
    a, b, c = (open_shards(str(folder)).fingerprint() for folder in (first, second, other))
    assert a == b != c


def test_kinds_do_not_mix(tmp_path: Path) -> None:
    pixels = write_shards(tmp_path / "pixels", [1])
    latents = write_shards(tmp_path / "latents", [1])
    value = json.loads((latents / MANIFEST).read_text())
    key = {"hash": "h", "resolution": 8, "crop": "centre", "dtype": "float16"}
    (latents / MANIFEST).write_text(json.dumps({**value, "kind": "latents", "latents": key}))
    with pytest.raises(DataError, match="do not go with"):
        open_shards([str(pixels), str(latents)])


# ---------------------------------------------------------------------------------------------- order


@settings(deadline=None, max_examples=60)
@given(
    sizes=st.lists(st.integers(1, 7), min_size=1, max_size=9),
    seed=st.integers(0, 5),
    window=st.integers(1, 4),
    epoch=st.integers(0, 3),
)
def test_every_epoch_is_a_permutation_of_all_samples(sizes: list[int], seed: int, window: int, epoch: int) -> None:
    order, total = ShuffledOrder(sizes, seed, window), sum(sizes)
    seen = [order[n] for n in range(epoch * total, (epoch + 1) * total)]
    assert sorted(seen) == [(shard, row) for shard, size in enumerate(sizes) for row in range(size)]


@settings(deadline=None, max_examples=30)
@given(positions=st.lists(st.integers(0, 200), min_size=1, max_size=40))
def test_a_sample_does_not_depend_on_what_was_asked_before(positions: list[int]) -> None:
    order = ShuffledOrder([3, 5, 2, 4, 1], 1, 2)
    assert [order[n] for n in positions] == [ShuffledOrder([3, 5, 2, 4, 1], 1, 2)[n] for n in positions]


def test_epochs_and_seeds_differ() -> None:
    order, total = ShuffledOrder([20] * 5, 0, 2), 100
    epochs = [[order[n] for n in range(e * total, (e + 1) * total)] for e in range(2)]
    other = ShuffledOrder([20] * 5, 1, 2)
    assert epochs[0] != epochs[1] != [other[n] for n in range(total)]


def test_every_epoch_shuffles_the_shards_anew_and_the_samples_within_each_anew() -> None:
    def epoch(order: ShuffledOrder, e: int) -> list[tuple[int, int]]:
        return [order[n] for n in range(e * len(order), (e + 1) * len(order))]

    one_by_one = ShuffledOrder([1] * 20, 0, 1)  # windows of one sample: only the order of the shards is random
    assert epoch(one_by_one, 0) != epoch(one_by_one, 1)
    one_shard = ShuffledOrder([20], 0, 1)  # only the order within the window is
    assert epoch(one_shard, 0) != epoch(one_shard, 1)
    alike = ShuffledOrder([20] * 2, 0, 1)
    rows = [row for _, row in epoch(alike, 0)]
    assert rows[:20] != rows[20:]  # each window of an epoch has an order of its own


def test_a_window_of_shards_is_finished_before_the_next_is_opened() -> None:
    order = ShuffledOrder([10] * 8, 0, 2)
    windows = [{order[n][0] for n in range(start, start + 20)} for start in range(0, 80, 20)]
    assert all(len(window) == 2 for window in windows)
    assert len(set.union(*windows)) == 8


def test_shuffle_shards_must_be_positive() -> None:
    with pytest.raises(ConfigError, match="shuffle_shards is 0"):
        ShuffledOrder([1], 0, 0)


def test_a_caption_is_required() -> None:
    with pytest.raises(DataError, match='s.tar, sample 7: the json member needs a text field "caption"'):
        Sample("s.tar", "7", {"json": b'{"text": 1}'}).info()


# -------------------------------------------------------------------------- altered, and without an end


def altered(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def test_a_byte_that_was_altered_at_the_same_size_is_refused_when_its_shard_is_first_read(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "data", [2, 3])
    shards = open_shards(str(folder))
    altered(folder / "00001.tar", 700)  # within the first member's content: the index is what it was
    assert shards.read(0, 1).info()["caption"] == "caption 1"
    for _ in range(2):
        with pytest.raises(DataError, match="shard .*00001.tar holds other bytes than its manifest says"):
            shards.read(1, 0)


def test_a_cached_download_that_was_altered_is_refused(tmp_path: Path) -> None:
    there = write_shards(tmp_path / "there", [2])
    command, downloads = f"pipe:cat {there}/00000.tar", Downloads(tmp_path / "cache")
    located = Located(command, Manifest.read(there / MANIFEST).shards[0])
    shards = ShardSet("pixels", [located], None, False, downloads, 2)
    assert len(read_all(shards)) == 2
    altered(downloads.path(command), 700)
    with pytest.raises(DataError, match="holds other bytes than its manifest says"):
        read_all(ShardSet("pixels", [located], None, False, downloads, 2))


def test_a_shard_is_hashed_once_for_all_that_read_it(tmp_path: Path, monkeypatch) -> None:
    """Shards that are closed and opened again, in this process and in workers, are not read twice for it."""
    hashed = tmp_path / "hashed"
    check = IndexedShard.check_digest

    def noted(self, expected):
        with hashed.open("a") as file:
            file.write(f"{self.path.name}\n")
        check(self, expected)

    monkeypatch.setattr(IndexedShard, "check_digest", noted)
    shards = open_shards(str(write_shards(tmp_path / "data", [1, 1, 1])), max_open=1)
    for _ in range(2):
        worker = torch.multiprocessing.get_context("fork").Process(target=read_all, args=(shards,))
        worker.start()
        worker.join()
        assert worker.exitcode == 0
        read_all(shards)
    assert hashed.read_text().split() == ["00000.tar", "00001.tar", "00002.tar"]


@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
def test_what_has_no_end_or_is_no_file_is_refused(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "00000.tar"
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path = Path("/dev/zero") if kind == "device" else tmp_path
    with pytest.raises(DataError, match="is a folder, a pipe or a device; name a tar file"):
        IndexedShard(path)
    if kind == "pipe":
        (tmp_path / MANIFEST).unlink(missing_ok=True)
        os.mkfifo(tmp_path / MANIFEST)
        with pytest.raises(DataError, match=f"{MANIFEST} is a folder, a pipe or a device"):
            open_shards(str(tmp_path))


def test_zeros_without_end_behind_a_tar_are_refused_and_padding_is_not(tmp_path: Path) -> None:
    shard = write_shards(tmp_path / "data", [1]) / "00000.tar"
    size = shard.stat().st_size
    (tmp_path / "data" / MANIFEST).unlink()
    os.truncate(shard, size + 512 * 1024)
    assert len(open_shards(str(shard))) == 1
    os.truncate(shard, 1 << 40)  # a hole: it takes no room on the disk
    with pytest.raises(DataError, match="bytes follow the tar file's end at byte .*, more than any padding"):
        open_shards(str(shard))


@pytest.mark.parametrize("names", ["{0..300000000}.tar", "{0..9999}/{0..9999}.tar", "{a,b}" * 30, "{a..z}" * 6])
def test_a_brace_list_of_too_many_names_is_refused_before_it_is_made(names: str) -> None:
    with pytest.raises(ConfigError, match="is a brace list of more than 1000000 names; name a folder"):
        open_shards(names)
