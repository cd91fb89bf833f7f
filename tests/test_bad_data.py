"""Damaged and foreign data: each case is one line with the file and the remedy, and leaves nothing half-written."""

from __future__ import annotations

import io
import json
import logging
import resource
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import lightning as L
import pytest
import torch
from pairs_data import picture, rows, write_parquet, write_shards

from datamodules.pairs.latents_key import check_latents, latents_fingerprint
from datamodules.pools.folder import PoolFolder
from datamodules.preference_pairs import PreferencePairsDataModule
from datamodules.shards import bad_samples, download
from datamodules.shards.bad_samples import BadSample, BadSamples
from datamodules.shards.download import Downloads, Expected
from datamodules.shards.locate import open_shards
from datamodules.shards.manifest import MANIFEST, LatentsKey
from datamodules.shards.reader import IndexedShard
from datamodules.shards.samples import pixel_members
from datamodules.shards.writer import write_shard
from datamodules.stream.positions import RunSampler
from experiments.prepare_pickapic import main
from lightning_modules.alignment import AlignmentModule
from lightning_modules.errors import ConfigError, DataError
from lightning_modules.objectives.sft import SFT
from lightning_modules.policies.adaptation import FullFineTuning
from lightning_modules.policies.lora import LoRA
from lightning_modules.policies.stable_diffusion import StableDiffusion


def refusal(call: Callable[[], object], kind: type[Exception] = DataError) -> str:
    """The message with which the call is refused; one line."""
    with pytest.raises(kind) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    return message


def prepared(source: Path, output: Path, *options: str) -> Callable[[], object]:
    return lambda: main(["--input", str(source), "--output", str(output), *options])


# ---------------------------------------------------------------------------------------------- parquet


def test_a_missing_column(tmp_path: Path) -> None:
    content = rows(3)
    for row in content:
        del row["label_1"]
    source = write_parquet(tmp_path / "a.parquet", content)
    message = refusal(prepared(source, tmp_path / "out"))
    assert message.startswith(f"{source} has no column label_1; it has jpg_0, jpg_1, label_0, caption")
    assert "check --input" in message
    assert not (tmp_path / "out").exists()


def test_a_truncated_parquet_file(tmp_path: Path) -> None:
    source = write_parquet(tmp_path / "a.parquet", rows(6))
    source.write_bytes(source.read_bytes()[:-200])
    message = refusal(prepared(source, tmp_path / "out"))
    assert message.startswith(f"{source} is not a whole parquet file")
    assert "download it again" in message
    assert not (tmp_path / "out").exists()


def test_an_empty_file_and_a_file_of_something_else(tmp_path: Path) -> None:
    for name, content in (("empty.parquet", b""), ("page.parquet", b"<html>not found</html>" * 20)):
        (tmp_path / name).write_bytes(content)
        assert f"{name} is not a whole parquet file" in refusal(prepared(tmp_path / name, tmp_path / "out"))


def test_pictures_that_are_no_bytes(tmp_path: Path) -> None:
    source = write_parquet(tmp_path / "a.parquet", rows(1, jpg_0="a path"))
    assert "column jpg_0 is string, expected encoded pictures as binary" in refusal(prepared(source, tmp_path / "out"))


def test_no_rows(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    assert "holds no parquet files" in refusal(prepared(tmp_path / "in", tmp_path / "out"))
    assert "does not exist" in refusal(prepared(tmp_path / "gone.parquet", tmp_path / "out"))


def test_zero_usable_pairs(tmp_path: Path) -> None:
    source = write_parquet(
        tmp_path / "a.parquet", [*rows(3, label_0=0.5, label_1=0.5), *rows(1, 3, jpg_0=b"no picture")]
    )
    message = refusal(prepared(source, tmp_path / "out"))
    assert message.startswith(f"zero usable pairs in {source} (rows_read 4, ties_dropped 3, corrupt_dropped 1)")
    assert "a.parquet, row 3 (a3, b3): jpg_0: a damaged picture" in message
    assert not (tmp_path / "out").exists()


def test_the_command_exits_with_status_2_and_one_line(tmp_path: Path) -> None:
    source = write_parquet(tmp_path / "a.parquet", rows(3))
    source.write_bytes(source.read_bytes()[:300])
    command = [sys.executable, "-m", "experiments.prepare_pickapic", "--input", str(source)]
    done = subprocess.run([*command, "--output", str(tmp_path / "out")], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {source} is not a whole parquet file")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


# -------------------------------------------------------------------------------------------------- tar


@pytest.mark.parametrize("cut", [1, 700, 1024, 2000, 5000, -100])
def test_a_truncated_tar_file_beside_its_manifest(tmp_path: Path, cut: int) -> None:
    folder = write_shards(tmp_path / "data", [4, 4])
    shard = folder / "00001.tar"
    shard.write_bytes(shard.read_bytes()[:-cut])
    message = refusal(lambda: PreferencePairsDataModule(str(folder), 2).train_dataloader())
    assert message.startswith(f"shard {shard} has ")
    assert "truncated" in message
    assert "copy or download it again" in message


def test_a_tar_file_without_manifest_truncated_anywhere(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "data", [3])
    (folder / MANIFEST).unlink()
    shard = folder / "00000.tar"
    whole = shard.read_bytes()
    with tarfile.open(shard) as tar:
        end = max(member.offset_data + -(-member.size // 512) * 512 for member in tar)
    for length in (0, 100, 512, 600, end // 2 // 512 * 512, end - 512, end, end + 512):
        shard.write_bytes(whole[:length])
        message = refusal(lambda: open_shards(str(shard)))
        assert str(shard) in message
        assert "truncated" in message
    shard.write_bytes(whole)
    assert len(open_shards(str(shard))) == 3


def test_a_shard_replaced_by_one_of_the_same_size(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "data", [4])
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["shards"][0]["samples"] = 5
    (folder / MANIFEST).write_text(json.dumps(manifest))
    message = refusal(lambda: list(PreferencePairsDataModule(str(folder), 2, resolution=8).train_dataloader()))
    assert "00000.tar holds 4 samples but the manifest says 5" in message


def tar_with(path: Path, members: dict[str, bytes], kind: bytes = tarfile.REGTYPE) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size, info.type = len(data), kind
            tar.addfile(info, io.BytesIO(data))
    return path


def test_a_key_with_a_dot(tmp_path: Path) -> None:
    members = {f"img.00{n}.{name}": b"x" for n in (1, 2) for name in ("chosen.jpg", "rejected.jpg", "json")}
    path = tar_with(tmp_path / "00000.tar", members)
    message = refusal(lambda: open_shards(str(path)))
    assert message.startswith(f"shard {path}: member 'img.001.chosen.jpg' is not a sample")
    assert "integer key without a dot" in message
    assert "rename the members" in message


@pytest.mark.parametrize("name", ["1.pth", "/1.json", "../1.json", "1.chosen.gif", "1.json.pickle", "a.json", "1"])
def test_members_of_another_layout(tmp_path: Path, name: str) -> None:
    path = tar_with(tmp_path / "a.tar", {name: b"x"})
    assert "is not a sample" in refusal(lambda: open_shards(str(path)))


def test_links_and_incomplete_samples(tmp_path: Path) -> None:
    link = tar_with(tmp_path / "link.tar", {"1.json": b""}, tarfile.SYMTYPE)
    assert "is not a sample" in refusal(lambda: open_shards(str(link)))
    half = tar_with(tmp_path / "half.tar", {"1.json": b"{}", "1.chosen.jpg": b"x"})
    assert "sample 1 has only ['chosen.jpg', 'json']" in refusal(lambda: open_shards(str(half)))


def test_a_missing_shard_or_folder_and_an_unfinished_preparation(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "data", [2])
    assert "gone.tar does not exist" in refusal(lambda: open_shards(f"{folder}/gone.tar"))
    (folder / MANIFEST).unlink()
    message = refusal(lambda: open_shards(str(folder)))
    assert "has no manifest.json: its preparation has not finished. Run it again" in message


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "holds a JSON list"),
        ('{"format_version": 9}', "format version 9"),
        ('{"format_version": 1, "shards": []}', "not a shard manifest"),
    ],
)
def test_a_damaged_manifest(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / MANIFEST).write_text(content)
    refused = refusal(lambda: open_shards(str(tmp_path)))
    assert refused.startswith(str(tmp_path / MANIFEST))
    assert message in refused


def test_a_manifest_that_points_elsewhere(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "data", [2])
    text = (folder / MANIFEST).read_text().replace('"00000.tar"', '"../../00000.tar"')
    (folder / MANIFEST).write_text(text)
    assert "names a shard outside its folder" in refusal(lambda: open_shards(str(folder)))


def test_a_shard_cut_while_it_is_read(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "data", [2])
    shard = IndexedShard(folder / "00000.tar")
    with (folder / "00000.tar").open("r+b") as file:
        file.truncate(1000)
    assert "was truncated while in use, at sample 000000001" in refusal(lambda: shard.read("000000001"))


# --------------------------------------------------------------------------------------------- pictures


@pytest.mark.parametrize("workers", [0, 2])
def test_too_many_corrupt_jpegs_in_training_are_one_line_from_any_process(tmp_path: Path, workers: int) -> None:
    corrupt = picture(1, (64, 64), "JPEG")[:400]
    samples = [(n, pixel_members(picture(0), corrupt, {"caption": "x"})) for n in range(2)]
    write_shard(tmp_path / "00000.tar", samples)
    data = PreferencePairsDataModule(f"{tmp_path}/00000.tar", 2, num_workers=workers, resolution=8)
    message = refusal(lambda: list(data.train_dataloader()))
    assert message.startswith(f"2 of 2 samples of {tmp_path}/00000.tar are bad")
    assert "data.max_bad_share 0.001 allows 1" in message
    assert f"{tmp_path}/00000.tar, sample 00000000" in message
    assert "rejected: a damaged picture of 400 bytes" in message
    assert "prepare the shards again" in message


# ------------------------------------------------------------------------------------------ bad samples


def with_bad(folder: Path, bad: dict[tuple[int, int], bytes]) -> Path:
    """23 pairs in 5 shards, some of whose chosen pictures (by shard and row) are replaced."""
    write_shards(folder, [5, 5, 5, 5, 3])
    manifest = json.loads((folder / MANIFEST).read_text())
    for shard in {shard for shard, _ in bad}:
        opened = IndexedShard(folder / f"{shard:05d}.tar")
        samples = []
        for row, key in enumerate(opened.keys):
            members = dict(opened.read(key).members)
            if (shard, row) in bad:
                members["chosen.png"] = bad[shard, row]
            samples.append((int(key), members))
        manifest["shards"][shard] = vars(write_shard(folder / f"{shard:05d}.tar", samples))
    (folder / MANIFEST).write_text(json.dumps(manifest))
    return folder


TWO = {(1, 2): b"\x89PNG\r\n\x1a\nnothing", (4, 0): picture(7)[:60]}


@pytest.fixture(scope="module")
def two_bad(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_bad(tmp_path_factory.mktemp("bad") / "data", TWO)


def tolerant(folder: Path, batch_size: int = 4, share: float = 0.1, **changes: int) -> PreferencePairsDataModule:
    return PreferencePairsDataModule(str(folder), batch_size, resolution=8, max_bad_share=share, **changes)


def sequence(folder: Path, batch_size: int, world: int, workers: int, share: float = 0.1) -> list[tuple[int, str]]:
    """What all ranks together train on in an epoch and the next, in the order of the batches."""
    data = tolerant(folder, batch_size, share, num_workers=workers)
    data.setup("fit")
    seen: list[tuple[int, str, float]] = []
    for start in (0, 20):
        ranks = [
            list(data._loader(data.train_set, RunSampler(23, batch_size, rank, world, lambda start=start: start)))
            for rank in range(world)
        ]
        for batches in zip(*ranks):
            for batch in batches:
                seen += zip(batch.indices.tolist(), batch.prompts, batch.chosen.sum(dim=(1, 2, 3)).tolist())
    return seen


def test_a_bad_sample_is_replaced_by_the_next_in_the_order_whoever_reads_it(two_bad: Path, tmp_path: Path) -> None:
    found = sequence(two_bad, 4, 1, 0)
    assert [n for n, *_ in found] == list(range(40))
    data = tolerant(two_bad)
    data.setup("fit")
    keys = [data.train_set.order[n] for n in range(60)]
    for n, caption, _ in found:
        whole = next(place for place in keys[n:] if place not in TWO)
        assert caption == f"caption {whole[0] * 5 + whole[1]}"
    assert sum(key in TWO for key in keys[:40]) >= 2
    assert sequence(two_bad, 2, 2, 0) == found
    assert sequence(two_bad, 4, 1, 2) == found


def test_the_draws_of_a_replacement_are_those_of_its_place(two_bad: Path) -> None:
    """Flip and crop follow n, not the sample, and what is not bad is what it would have been anyway."""
    whole = tolerant(two_bad)
    whole.setup("fit")
    n = next(n for n in range(23) if whole.train_set.order[n] in TWO and whole.train_set.order[n + 1] not in TWO)
    item = whole.train_set.item(n, n + 1)
    assert item.indices.tolist() == [n]
    flips = {torch.equal(whole.train_set.item(m, n + 1).chosen, item.chosen) for m in range(n + 2, n + 20)}
    assert flips == {True, False}


def test_bad_samples_are_named_once_and_counted_by_shard(two_bad: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = tolerant(two_bad, 1, num_workers=2)
    with caplog.at_level(logging.WARNING, "datamodules"):
        loader = data.train_dataloader()
        for _ in range(2):
            list(loader)
        data.teardown("fit")
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 3
    named = sorted(lines[:2])
    assert named[0].startswith(
        f"skipped a bad sample: {two_bad}/00001.tar, sample 000000007: chosen: a damaged picture"
    )
    assert named[1].startswith(
        f"skipped a bad sample: {two_bad}/00004.tar, sample 000000020: chosen: a damaged picture"
    )
    assert lines[2].startswith(f"2 of 23 samples of {two_bad} are bad ({two_bad}/0000")
    assert f"{two_bad}/00001.tar 1" in lines[2]


@pytest.mark.parametrize("workers", [0, 2])
def test_beyond_the_share_the_run_ends_with_one_line(two_bad: Path, workers: int) -> None:
    data = tolerant(two_bad, 1, share=0.05, num_workers=workers)  # 1.15 of 23
    message = refusal(lambda: list(data.train_dataloader()))
    assert message.startswith(f"2 of 23 samples of {two_bad} are bad")
    assert "data.max_bad_share 0.05 allows 1: " in message
    assert "prepare the shards again, which drops such pairs, or raise data.max_bad_share" in message
    strict = tolerant(two_bad, 1, share=0.0)
    assert "1 of 23 samples" in refusal(lambda: list(strict.train_dataloader()))


def test_the_share_is_of_the_whole_data_set_and_one_is_always_allowed(tmp_path: Path) -> None:
    allowed = {
        (total, share): BadSamples("x", "d", total, share, None).allowed
        for total, share in ((10, 0.001), (10_000, 0.001), (850_000, 0.001), (10, 0.0), (10, 0.25))
    }
    assert list(allowed.values()) == [1, 10, 850, 0, 2]
    for share in (-0.1, 1.0, float("nan")):
        assert "max_bad_share is a share" in refusal(lambda share=share: tolerant(tmp_path, share=share), ConfigError)


def test_ranks_and_a_resumed_run_count_together(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Two ranks, then the same two after a restart: four processes' worth of finds, each named once."""
    file = tmp_path / "run" / bad_samples.FILE
    finds = [BadSample("a.tar", f"{n}", "torn") for n in range(4)]

    def process() -> BadSamples:
        return BadSamples("data", "fingerprint", 100, 0.03, file)

    first, second = process(), process()
    with caplog.at_level(logging.WARNING, "datamodules"):
        first.add(finds[:1])
        second.add(finds[:2])
        first.add(finds[:2])
        with file.open("ab") as torn:
            torn.write(b'{"data": "finger')  # killed while writing
        first, second = process(), process()
        second.add(finds[2:3])
        first.add(finds[1:3])
    assert [record.getMessage() for record in caplog.records] == [
        f"skipped a bad sample: {sample}" for sample in finds[:3]
    ]
    message = refusal(lambda: first.add(finds[3:]))
    assert message.startswith("4 of 100 samples of data are bad (a.tar 4), data.max_bad_share 0.03 allows 3: a.tar, ")
    assert f"all found so far in {file}" in message
    other = BadSamples("other", "another fingerprint", 100, 0.01, file)
    other.add([BadSample("b.tar", "1", "torn")])  # what is bad in other data doesn't count
    first.forget()
    again = process()
    again.add(finds[:3])
    assert again.count == 3
    assert '"another fingerprint"' in file.read_text()


class Trained(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[tuple[int, str]] = []

    def training_step(self, batch, batch_index: int) -> torch.Tensor:
        self.seen += zip(batch.indices.tolist(), batch.prompts)
        return self.weight * batch.chosen.mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def trained(folder: Path, root: Path, steps: int, ckpt: Path | None = None) -> tuple[Trained, L.Trainer]:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    module = Trained()
    trainer = L.Trainer(
        accelerator="cpu", max_steps=steps, max_epochs=-1, default_root_dir=root, enable_model_summary=False, **quiet
    )
    trainer.fit(module, tolerant(folder), ckpt_path=ckpt)
    return module, trainer


def test_a_run_over_bad_samples_resumes_exactly_and_goes_on_counting(two_bad: Path, tmp_path: Path) -> None:
    whole, _ = trained(two_bad, tmp_path / "whole", 9)
    lines = (tmp_path / "whole" / bad_samples.FILE).read_text().splitlines()
    assert sorted(json.loads(line)["key"] for line in lines) == ["000000007", "000000020"]
    begun, trainer = trained(two_bad, tmp_path / "run", 4)
    trainer.save_checkpoint(tmp_path / "stop.ckpt")
    resumed, _ = trained(two_bad, tmp_path / "run", 9, tmp_path / "stop.ckpt")
    assert begun.seen + resumed.seen == whole.seen
    assert len((tmp_path / "run" / bad_samples.FILE).read_text().splitlines()) == 2
    # Begun anew with the shards mended in place: what was bad counts no more.
    trained(two_bad, tmp_path / "run", 1)
    assert len((tmp_path / "run" / bad_samples.FILE).read_text().splitlines()) < 2


def test_a_run_folder_in_which_bad_samples_cannot_be_noted_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    bad = BadSamples("data", "d", 10, 0.5, tmp_path / "file" / "bad.jsonl")
    assert "cannot note bad samples in" in refusal(lambda: bad.add([BadSample("a.tar", "1", "torn")]))


# ------------------------------------------------------------------------------------- vanishing, stalling


def test_a_shard_that_vanishes_in_mid_run_is_named_and_never_skipped(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "data", [4] * 4)
    data = tolerant(folder, 2, share=0.9, shuffle_shards=1)
    batches = iter(data.train_dataloader())
    next(batches)
    opened = next(iter(data.train_set.shards._open))
    for number in range(4):
        if number != opened:
            (folder / f"{number:05d}.tar").unlink()
    next(batches)  # of a file that is open
    message = refusal(lambda: list(batches))
    assert "does not exist; check the path or prepare the shards again" in message


STALLS = "head -c 3000 {shard}; sleep 1000"


@pytest.mark.parametrize("command", [STALLS, "sleep 1000 & sleep 1000", "cat {shard}; exec 1>&-; sleep 1000"])
def test_a_stalled_reader_is_given_up_and_nothing_is_left_of_it(tmp_path: Path, command: str, monkeypatch) -> None:
    monkeypatch.setattr(download, "FIRST_PAUSE_SECONDS", 0.01)
    shard = write_shards(tmp_path / "data", [2]) / "00000.tar"
    url = f"pipe:echo $$ >> {tmp_path}/groups; {command.format(shard=shard)}"
    began = time.monotonic()
    message = refusal(lambda: open_shards(url, Downloads(tmp_path / "cache", stall_seconds=0.3, attempts=2)))
    assert time.monotonic() - began < 60
    assert "0.3 s; attempt 2 of 2); check the address and the network" in message
    groups = [int(line) for line in (tmp_path / "groups").read_text().split()]
    assert len(groups) == 2
    assert not [group for group in groups if lives(group)]
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"]


def lives(group: int) -> bool:
    """Whether any process of a group runs; one that is dead and not yet buried doesn't, one that is dying may wait."""
    for _ in range(100):
        if not any(runs(status, group) for status in Path("/proc").glob("[0-9]*/stat")):
            return False
        time.sleep(0.1)
    return True


def runs(status: Path, group: int) -> bool:
    try:
        state, _, found = status.read_text().rpartition(")")[2].split()[:3]
    except OSError:
        return False
    return int(found) == group and state != "Z"


def test_a_reader_that_breaks_off_once_is_tried_again(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(download, "FIRST_PAUSE_SECONDS", 0.01)
    shard = write_shards(tmp_path / "data", [2]) / "00000.tar"
    once = f"test -e {tmp_path}/tried || {{ touch {tmp_path}/tried; head -c 1500 {shard}; exit 1; }}; cat {shard}"
    assert len(open_shards(f"pipe:{once}", Downloads(tmp_path / "cache"))) == 2


def test_a_download_is_held_against_its_manifest_and_a_partial_one_never_kept(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(download, "FIRST_PAUSE_SECONDS", 0.01)
    folder = write_shards(tmp_path / "data", [2])
    shard, info = folder / "00000.tar", json.loads((folder / MANIFEST).read_text())["shards"][0]
    whole = Expected(info["bytes"], info["digest"])
    downloads = Downloads(tmp_path / "cache", attempts=1)
    short, longer = f"pipe:head -c 5000 {shard}", f"pipe:cat {shard}; yes"
    assert f"it gave 5000 bytes, not the {whole.size}" in refusal(lambda: downloads.fetch(short, whole))
    assert f"it gave more than {whole.size} bytes" in refusal(lambda: downloads.fetch(longer, whole))
    other = f"pipe:sed s/caption/Caption/ {shard}"
    assert "other bytes than its manifest says" in refusal(lambda: downloads.fetch(other, whole))
    # A bare tar file, of which nothing is known before: refused, and asked for again the next time.
    assert "truncated" in refusal(lambda: open_shards(short, downloads))
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"] * 3
    fetched = downloads.fetch(f"pipe:cat {shard}", whole)
    fetched.write_bytes(fetched.read_bytes()[:700])
    assert downloads.fetch(f"pipe:cat {shard}", whole).stat().st_size == whole.size


def test_a_stall_in_mid_run_ends_it_from_a_worker(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(download, "FIRST_PAUSE_SECONDS", 0.01)
    folder = write_shards(tmp_path / "data", [2, 2])
    url = f"pipe:test ! -e {tmp_path}/gone || sleep 1000; cat {folder}/{{00000..00001}}.tar"
    options = {"cache_dir": str(tmp_path / "cache"), "stall_seconds": 0.3, "download_attempts": 1}
    data = PreferencePairsDataModule(url, 2, num_workers=1, resolution=8, **options)
    loader = data.train_dataloader()
    (tmp_path / "gone").touch()
    for path in (tmp_path / "cache").glob("*.tar"):
        path.unlink()
    assert "not a byte for 0.3 s; attempt 1 of 1" in refusal(lambda: list(loader))


def test_urls_that_nothing_reads_and_settings_that_make_no_sense(tmp_path: Path) -> None:
    message = refusal(lambda: open_shards("ais://bucket/00000.tar", Downloads(tmp_path)), ConfigError)
    assert "nothing here reads ais://; use pipe: with a command that prints the file" in message
    assert "must be above 0" in refusal(lambda: Downloads(stall_seconds=0.0), ConfigError)
    assert "at least 1" in refusal(lambda: tolerant(tmp_path, download_attempts=0), ConfigError)


def test_curl_gives_up_by_itself_too_and_a_secret_is_no_argument(monkeypatch) -> None:
    monkeypatch.setattr(download, "_on_the_hub", lambda url: ("https://hub.invalid/file", "secret"))
    command, config = download._command("hf://datasets/a/b/00000.tar", 60.0)
    assert command[:5] == ["curl", "--fail", "--silent", "--show-error", "--location"]
    assert "--globoff" in command
    assert command[-2:] == ["--", "https://hub.invalid/file"]
    assert command[command.index("--speed-time") + 1] == "60"
    assert not any("secret" in word for word in command)
    assert config == 'header = "Authorization: Bearer secret"\n'


# ------------------------------------------------------------------------------------ full and read-only disks


@contextmanager
def small_files(most: int) -> Iterator[None]:
    """Writing beyond so many bytes of a file fails, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_preparation_that_runs_out_of_disk_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    source = write_parquet(tmp_path / "a.parquet", rows(2, jpg_0=picture(3, (200, 200), "PNG") + bytes(30_000)))
    with small_files(20_000):
        message = refusal(prepared(source, tmp_path / "out"))
    assert message.startswith(f"cannot write {tmp_path}/out/00000.tar: ")
    assert "free some space or choose another folder" in message
    assert not (tmp_path / "out").exists()


def test_a_full_cache_disk_is_one_line_and_ends_the_download(tmp_path: Path) -> None:
    url = f"pipe:echo $$ >> {tmp_path}/groups; yes"
    with small_files(3000):
        message = refusal(lambda: open_shards(url, Downloads(tmp_path / "cache")))
    assert message.startswith(f"cannot write {tmp_path}/cache/")
    assert "free some space or choose another folder" in message
    groups = [int(line) for line in (tmp_path / "groups").read_text().split()]
    assert len(groups) == 1  # a full disk is nothing to try again
    assert not lives(groups[0])
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"]


def test_a_full_disk_while_a_shard_is_written(tmp_path: Path) -> None:
    pairs = [(0, pixel_members(picture(0) + bytes(5000), picture(1), {"caption": "x"}))]
    with small_files(3000):
        assert "cannot write" in refusal(lambda: write_shard(tmp_path / "00000.tar", pairs))
    assert list(tmp_path.iterdir()) == []


def test_folders_that_cannot_be_written_are_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for blocked in (tmp_path / "file" / "x", Path("/proc/x")):  # /proc takes no files, from root neither
        message = refusal(lambda blocked=blocked: open_shards("pipe:echo", Downloads(blocked)))
        assert message.startswith(f"cannot write to the cache folder {blocked}: ")
        assert "data.cache_dir" in message
        message = refusal(PoolFolder(blocked, 1).create)
        assert message.startswith(f"cannot make the pool folder {blocked} or write to it: ")
        assert "data.pools_dir" in message
        assert "cannot write" in refusal(lambda blocked=blocked: write_shard(blocked / "0.tar", []))
    assert "cannot make the pool folder /proc" in refusal(PoolFolder(Path("/proc"), 1).create)


def test_a_full_cache_may_be_read_only(tmp_path: Path, monkeypatch) -> None:
    folder = write_shards(tmp_path / "data", [2])
    shard, downloads = folder / "00000.tar", Downloads(tmp_path / "cache")
    downloads.fetch(f"pipe:cat {shard}")

    def refuse(path: Path) -> None:
        raise AssertionError("the cache is written to")

    monkeypatch.setattr(download, "_alone", refuse)
    assert downloads.fetch(f"pipe:cat {shard}").read_bytes() == shard.read_bytes()


# ---------------------------------------------------------------------------------------------- latents


@pytest.fixture(scope="module")
def policy(pipelines: Path) -> StableDiffusion:
    return StableDiffusion(str(pipelines / "tiny-sd15"), LoRA())


def test_latents_of_other_networks(policy: StableDiffusion) -> None:
    right = latents_fingerprint(policy, 32, "centre", "float16")
    check_latents(LatentsKey(right, 32, "centre", "float16"), policy, 32)
    message = refusal(lambda: check_latents(LatentsKey("0" * 32, 32, "centre", "float16"), policy, 32))
    assert message.startswith(
        f"the latents carry the hash {'0' * 32} but this run's VAE and text encoders give {right}"
    )
    assert "prepare again with --encode-with" in message


def test_latents_of_another_resolution(policy: StableDiffusion) -> None:
    key = LatentsKey(latents_fingerprint(policy, 32, "centre", "float16"), 32, "centre", "float16")
    message = refusal(lambda: check_latents(key, policy, 64))
    assert "encoded at 32 px, this run asks for 64 px; set resolution to 32" in message


def test_cached_embeddings_while_the_text_encoder_trains(pipelines: Path) -> None:
    policy = StableDiffusion(str(pipelines / "tiny-sd15"), FullFineTuning(text_encoder=True))
    key = LatentsKey(latents_fingerprint(policy, 32, "centre", "float16"), 32, "centre", "float16")
    assert "trains its text encoder" in refusal(lambda: check_latents(key, policy, 32), ConfigError)


def test_the_data_module_checks_latents_against_the_run(tmp_path: Path, policy: StableDiffusion) -> None:
    folder = write_shards(tmp_path / "data", [2])
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest.update(kind="latents", latents={"hash": "0", "resolution": 8, "crop": "centre", "dtype": "float16"})
    (folder / MANIFEST).write_text(json.dumps(manifest))
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = L.Trainer(accelerator="cpu", max_steps=1, max_epochs=1, **quiet)
    data = PreferencePairsDataModule(str(folder), 2, resolution=8)
    assert "carry the hash 0 but" in refusal(lambda: trainer.fit(AlignmentModule(policy, SFT()), data))


# ------------------------------------------------------------------------------------------- too little


def test_fewer_pairs_than_one_global_batch(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "data", [3])
    message = refusal(lambda: PreferencePairsDataModule(str(folder), 4).train_dataloader())
    assert message.startswith(f"{folder} holds 3 usable pairs, one optimizer step needs 4 (batch_size 4 x 1 ranks x 1 ")
    assert "set data.batch_size and data.pairs_per_step to at most 3, or give more data" in message


def test_shards_without_pairs(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "data", [0])
    assert "zero usable pairs" in refusal(lambda: PreferencePairsDataModule(str(folder), 4).train_dataloader())
    empty = write_shards(tmp_path / "empty", [])
    assert "no shards in" in refusal(lambda: PreferencePairsDataModule(str(empty), 4).train_dataloader())
