"""Damaged and foreign data: each case is one line with the file and the remedy, and leaves nothing half-written."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import lightning as L
import pytest
from pairs_data import picture, rows, write_parquet, write_shards

from datamodules.preference_pairs import PreferencePairsDataModule, check_latents, latents_fingerprint
from datamodules.shards import MANIFEST, IndexedShard, LatentsKey, open_shards, pixel_members, write_shard
from experiments.prepare_pickapic import main
from lightning_modules.alignment import AlignmentModule
from lightning_modules.errors import ConfigError, DataError
from lightning_modules.objectives.sft import SFT
from lightning_modules.policies.adaptation import FullFineTuning, LoRA
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
    assert "column jpg_0 is string, expected binary" in refusal(prepared(source, tmp_path / "out"))


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
def test_a_corrupt_jpeg_in_training_is_one_line_from_any_process(tmp_path: Path, workers: int) -> None:
    corrupt = picture(1, (64, 64), "JPEG")[:400]
    samples = [(n, pixel_members(picture(0), corrupt, {"caption": "x"})) for n in range(2)]
    write_shard(tmp_path / "00000.tar", samples)
    data = PreferencePairsDataModule(f"{tmp_path}/00000.tar", 2, num_workers=workers, resolution=8)
    message = refusal(lambda: list(data.train_dataloader()))
    assert f"{tmp_path}/00000.tar, sample 00000000" in message
    assert "rejected: a damaged picture of 400 bytes" in message
    assert "prepare the shards again" in message


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
    assert message.startswith(f"{folder} holds 3 usable pairs, one global batch needs 4 (batch_size 4 x 1 ranks)")
    assert "use fewer ranks, a smaller batch_size or more data" in message


def test_shards_without_pairs(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "data", [0])
    assert "zero usable pairs" in refusal(lambda: PreferencePairsDataModule(str(folder), 4).train_dataloader())
    empty = write_shards(tmp_path / "empty", [])
    assert "no shards in" in refusal(lambda: PreferencePairsDataModule(str(empty), 4).train_dataloader())
