from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import pyarrow
import pyarrow.parquet as parquet
import pytest
import torch
from pairs_data import picture, rows, write_parquet

from datamodules.pairs.latents_key import latents_fingerprint
from datamodules.pairs.samples import PairTransform
from datamodules.preference_pairs import PreferencePairsDataModule
from datamodules.prompts import load_prompts
from datamodules.shards.locate import open_shards
from datamodules.shards.manifest import MANIFEST, Manifest
from datamodules.shards.pictures import decode_picture
from datamodules.stream.order import StoredOrder
from experiments.cli.configured_policy import load_policy
from experiments.preparation.pickapic_rows import Settings, Unit, plan_units, preference, usable_pairs
from experiments.prepare_pickapic import main
from lightning_modules.batches import LatentPairs, PreferencePairs
from lightning_modules.errors import ConfigError, DataError


def prepared(inputs: Path | str, output: Path, *options: str) -> Manifest:
    return main(["--input", str(inputs), "--output", str(output), *options])


def stored(folder: Path):
    shards = open_shards(str(folder))
    return [shards.read(*StoredOrder(shards.sizes)[n]) for n in range(len(shards))]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# ---------------------------------------------------------------------------------------------- rows


@pytest.mark.parametrize(
    ("first", "second", "has_label", "expected"),
    [
        (1.0, 0.0, True, 1.0),
        (0.0, 1.0, True, 0.0),
        (0.5, 0.5, True, 0.5),
        (1.0, 0.0, False, None),
        (None, None, True, None),
        (float("nan"), float("nan"), True, None),
        (0.0, 0.0, True, None),
        (0.7, 0.3, True, None),
    ],
)
def test_labels(first, second, has_label, expected) -> None:
    assert preference({"label_0": first, "label_1": second, "has_label": has_label}) == expected


def test_pairs_keep_bytes_order_and_what_is_known_of_them(tmp_path: Path) -> None:
    content = rows(3)
    manifest = prepared(write_parquet(tmp_path / "a.parquet", content), tmp_path / "out")
    samples = stored(tmp_path / "out")

    assert manifest.kind == "pixels"
    assert [sample.key for sample in samples] == ["000000000", "000000001", "000000002"]
    for n, sample in enumerate(samples):
        chosen, rejected = ("0", "1") if n % 2 == 0 else ("1", "0")
        assert sample.picture("chosen") == content[n][f"jpg_{chosen}"]
        assert sample.picture("rejected") == content[n][f"jpg_{rejected}"]
    assert samples[1].info() == {
        "caption": "caption 1",
        "label": 1.0,
        "row": 1,
        "chosen_size": [16, 24],
        "chosen_uid": "b1",
        "chosen_model": "two",
        "rejected_size": [16, 16],
        "rejected_uid": "a1",
        "rejected_model": "one",
        "num_example_per_prompt": 3,
        "ranking_id": 101,
    }


def mixed_rows() -> list[dict]:
    """11 rows: 3 good, 2 ties, 1 unlabelled, 1 without caption, 2 duplicates of row 0, 2 with damaged pictures."""
    content = rows(11)
    content[1].update(label_0=0.5, label_1=0.5)
    content[2].update(label_0=0.5, label_1=0.5)
    content[3].update(has_label=False)
    content[4].update(caption=None)
    content[5].update(
        {name: content[0][name] for name in ("image_0_uid", "image_1_uid", "caption")}, label_0=1.0, label_1=0.0
    )
    content[6].update(jpg_1=picture(1, (40, 40), "JPEG")[:100])
    content[7].update(jpg_0=b"")
    content[10].update(content[0])
    return content


def test_everything_dropped_is_counted_and_named(tmp_path: Path) -> None:
    manifest = prepared(write_parquet(tmp_path / "a.parquet", mixed_rows()), tmp_path / "out", "--shard-size", "4")
    assert manifest.counts == {
        "rows_read": 11,
        "pairs": 3,
        "ties_kept": 0,
        "ties_dropped": 2,
        "unlabelled_dropped": 1,
        "without_caption_dropped": 1,
        "duplicates_dropped": 2,
        "corrupt_dropped": 2,
    }
    assert len(manifest.corrupt) == 2
    assert manifest.corrupt[0].startswith("a.parquet, row 6 (a6, b6): jpg_1: a damaged picture of 100 bytes")
    assert manifest.corrupt[1] == "a.parquet, row 7 (a7, b7): jpg_0 is empty"
    assert [sample.info()["row"] for sample in stored(tmp_path / "out")] == [0, 8, 9]
    assert Manifest.read(tmp_path / "out" / MANIFEST) == manifest


def test_the_same_pair_preferred_the_other_way_is_no_duplicate(tmp_path: Path) -> None:
    content = rows(2, image_0_uid="a", image_1_uid="b", caption="c")
    assert prepared(write_parquet(tmp_path / "a.parquet", content), tmp_path / "out").counts["pairs"] == 2


def test_without_uids_the_bytes_tell_duplicates(tmp_path: Path) -> None:
    content = [*rows(3), *rows(1)]
    for row in content:
        del row["image_0_uid"]
    manifest = prepared(write_parquet(tmp_path / "a.parquet", content), tmp_path / "out")
    assert (manifest.counts["pairs"], manifest.counts["duplicates_dropped"]) == (3, 1)


def test_without_uids_what_differs_in_one_picture_or_in_the_caption_is_another_pair(tmp_path: Path) -> None:
    first, second, third = rows(3)
    content = [
        first,
        first | {"jpg_1": second["jpg_1"]},
        first | {"jpg_0": third["jpg_0"]},
        first | {"caption": "other"},
    ]
    content.append(dict(content[1]))
    for row in content:
        row["image_0_uid"] = None
    manifest = prepared(write_parquet(tmp_path / "a.parquet", content), tmp_path / "out")
    assert (manifest.counts["pairs"], manifest.counts["duplicates_dropped"]) == (4, 1)


def test_ties_are_kept_on_request(tmp_path: Path) -> None:
    content = rows(2)
    content[1].update(label_0=0.5, label_1=0.5)
    manifest = prepared(write_parquet(tmp_path / "a.parquet", content), tmp_path / "out", "--keep-ties")
    assert (manifest.counts["pairs"], manifest.counts["ties_kept"]) == (2, 1)
    tie = stored(tmp_path / "out")[1]
    assert tie.info()["label"] == 0.5
    assert tie.picture("chosen") == content[1]["jpg_0"]


def test_only_the_columns_that_are_used_are_read(tmp_path: Path) -> None:
    table = pyarrow.Table.from_pylist(rows(2, image_0_url="http://x"))
    parquet.write_table(
        table.append_column("created_at", pyarrow.array([0, 0], pyarrow.timestamp("ns"))), tmp_path / "a.parquet"
    )
    unit = plan_units([tmp_path / "a.parquet"], 10, None)[0]
    pairs = list(usable_pairs(unit, Settings(), Counter(), []))
    assert len(pairs) == 2
    assert "created_at" not in pairs[0].info


# ---------------------------------------------------------------------------------------- units, input


def test_units_are_row_groups_together_with_numbers_reserved(tmp_path: Path) -> None:
    first = write_parquet(tmp_path / "a.parquet", rows(10), row_group_size=4)  # 4, 4, 2
    second = write_parquet(tmp_path / "b.parquet", rows(3), row_group_size=3)
    assert plan_units([first, second], 5, None) == [
        Unit(0, str(first), (0, 1), 0, 8, 0),
        Unit(1, str(first), (2,), 8, 2, 2),
        Unit(2, str(second), (0,), 10, 3, 3),
    ]
    assert [unit.rows for unit in plan_units([first, second], 5, 9)] == [8, 1]


def test_shards_do_not_depend_on_the_number_of_workers(tmp_path: Path) -> None:
    source = write_parquet(tmp_path / "a.parquet", rows(10))
    one = prepared(source, tmp_path / "one", "--shard-size", "3")
    two = prepared(source, tmp_path / "two", "--shard-size", "3", "--workers", "2")
    assert one == two
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert [shard.samples for shard in one.shards] == [3, 1, 3, 1, 2]


def test_a_folder_gives_the_files_of_its_split(tmp_path: Path) -> None:
    source = tmp_path / "in"
    (source / "data").mkdir(parents=True)
    write_parquet(source / "data" / "train-00000-of-00002-ab.parquet", rows(2))
    write_parquet(source / "data" / "train-00001-of-00002-cd.parquet", rows(2, 2))
    write_parquet(source / "data" / "validation_unique-00000-of-00001-ef.parquet", rows(1, 9))
    assert prepared(source, tmp_path / "train").counts["pairs"] == 4
    assert prepared(source, tmp_path / "val", "--split", "validation_unique").counts["pairs"] == 1
    assert prepared(f"{source}/data/train-*.parquet", tmp_path / "pattern").counts["pairs"] == 4
    with pytest.raises(DataError, match="holds no split 'test', only train, validation_unique"):
        prepared(source, tmp_path / "test", "--split", "test")


def test_limit_reads_the_first_rows(tmp_path: Path) -> None:
    manifest = prepared(write_parquet(tmp_path / "a.parquet", rows(9)), tmp_path / "out", "--limit", "5")
    assert manifest.counts["rows_read"] == 5


def test_a_hub_id_without_network_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match="'nobody/nothing' is no file or folder here.*check the name and the network"
    ) as caught:
        prepared("nobody/nothing", tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_each_caption_stands_once_in_a_prompt_file(tmp_path: Path) -> None:
    content = (
        rows(9) + rows(2, 4, image_0_uid=None) + rows(1, 20, caption="two\nlines \u2028") + rows(1, 21, caption=" ")
    )
    source = write_parquet(tmp_path / "a.parquet", [*content, *rows(1, 30, has_label=False)])
    for workers, folder in (("1", "one"), ("2", "two")):
        assert prepared(source, tmp_path / folder, "--shard-size", "4", "--workers", workers).counts["pairs"] == 13
        expected = [*(f"caption {n}" for n in range(9)), "two\nlines \u2028"]
        assert load_prompts(tmp_path / folder / "captions.json") == expected


# --------------------------------------------------------------------------------------------- resuming


def test_finished_units_are_not_made_again(tmp_path: Path) -> None:
    source = write_parquet(tmp_path / "a.parquet", rows(8))
    whole = prepared(source, tmp_path / "whole", "--shard-size", "4")
    broken = rows(8)
    broken_file = tmp_path / "b" / "a.parquet"
    broken_file.parent.mkdir()
    damage_second_row_group(write_parquet(broken_file, broken))
    with pytest.raises(DataError, match="not a whole parquet file"):
        prepared(broken_file, tmp_path / "out", "--shard-size", "4")
    assert (tmp_path / "out" / "00000.tar").exists()
    assert not list((tmp_path / "out").rglob(".*-unfinished-*"))
    before = (tmp_path / "out" / "00000.tar").stat().st_mtime_ns
    broken_file.write_bytes(source.read_bytes())

    assert prepared(broken_file, tmp_path / "out", "--shard-size", "4") == whole
    assert (tmp_path / "out" / "00000.tar").stat().st_mtime_ns == before
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def damage_second_row_group(path: Path) -> None:
    """Overwrite a page header where the footer says the second row group's pictures are."""
    start = parquet.ParquetFile(path).metadata.row_group(1).column(0).dictionary_page_offset
    data = bytearray(path.read_bytes())
    data[start : start + 64] = b"\xff" * 64
    path.write_bytes(bytes(data))


def test_a_killed_preparation_is_taken_up_again(tmp_path: Path) -> None:
    source = write_parquet(tmp_path / "a.parquet", rows(240), row_group_size=8)
    whole = prepared(source, tmp_path / "whole", "--shard-size", "8")
    command = [sys.executable, "-m", "experiments.prepare_pickapic", "--input", str(source), "--shard-size", "8"]
    process = subprocess.Popen([*command, "--output", str(tmp_path / "out")], stdout=subprocess.DEVNULL)
    while not list((tmp_path / "out").glob("*.tar")) and process.poll() is None:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    (tmp_path / "out" / ".00099.tar-unfinished-1").write_bytes(b"half")
    assert prepared(source, tmp_path / "out", "--shard-size", "8") == whole
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def processes_of(marker: str) -> list[int]:
    """Processes that have a variable in their environment, but for this one."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if marker.encode() in (place / "environ").read_bytes().split(b"\0"):
                found.append(int(place.name))
    return found


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs Linux' /proc")
def test_workers_do_not_outlive_a_killed_preparation(tmp_path: Path) -> None:
    source = write_parquet(tmp_path / "a.parquet", rows(240), row_group_size=8)
    marker = f"PREPARATION={tmp_path}"
    command = [sys.executable, "-m", "experiments.prepare_pickapic", "--input", str(source), "--shard-size", "8"]
    process = subprocess.Popen(
        [*command, "--output", str(tmp_path / "out"), "--workers", "2"],
        stdout=subprocess.DEVNULL,
        env={**os.environ, "PREPARATION": str(tmp_path)},
    )
    while not list((tmp_path / "out").glob("*.tar")) and process.poll() is None:
        time.sleep(0.01)
    assert len(processes_of(marker)) >= 4  # this command, its server, two workers
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    for _ in range(300):
        if not processes_of(marker):
            break
        time.sleep(0.1)
    assert processes_of(marker) == []


def test_a_finished_preparation_is_not_repeated_and_other_settings_are_refused(tmp_path: Path) -> None:
    source = write_parquet(tmp_path / "a.parquet", rows(6))
    manifest = prepared(source, tmp_path / "out")
    before = contents(tmp_path / "out")
    assert prepared(source, tmp_path / "out") == manifest
    with pytest.raises(ConfigError, match=r"prepared with shard_size 1000 \(now 3\); choose another --output"):
        prepared(source, tmp_path / "out", "--shard-size", "3")
    write_parquet(source, rows(6, 1))
    with pytest.raises(ConfigError, match="other input files"):
        prepared(source, tmp_path / "out")
    assert contents(tmp_path / "out") == before


def test_a_folder_with_other_things_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(ConfigError, match="is not empty"):
        prepared(write_parquet(tmp_path / "a.parquet", rows(1)), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.parquet", "thesis.tex"]


# ---------------------------------------------------------------------------------------------- latents


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, pipelines: Path) -> str:
    return write_config(tmp_path_factory.mktemp("config") / "tiny.yaml", "StableDiffusion", pipelines / "tiny-sd15")


def write_config(path: Path, policy: str, pipeline: Path) -> str:
    path.write_text(
        f"weights: {pipeline}\n"
        "model:\n"
        "  class_path: AlignmentModule\n"
        "  init_args:\n"
        "    policy:\n"
        f"      class_path: {policy}\n"
        "      init_args: {pretrained: '${weights}', adaptation: {class_path: LoRA}}\n"
    )
    return str(path)


def test_latents_and_embeddings_are_those_of_the_policy(tmp_path: Path, config: str) -> None:
    content = rows(5)
    content[3]["caption"] = content[1]["caption"]
    source = write_parquet(tmp_path / "a.parquet", content)
    prepared(source, tmp_path / "out", "--encode-with", config, "--resolution", "32", "--dtype", "float32")
    data = PreferencePairsDataModule(str(tmp_path / "out"), 5, resolution=32)
    batch = next(iter(data.train_dataloader()))
    assert isinstance(batch, LatentPairs)
    assert sorted(batch.prompts) == sorted(row["caption"] for row in content)

    policy, transform = load_policy(config), PairTransform(32)
    by_chosen = {sample.info()["row"]: sample for sample in stored(tmp_path / "out")}
    for n, sample in by_chosen.items():
        chosen, rejected = (content[n][name] for name in (("jpg_0", "jpg_1") if n % 2 == 0 else ("jpg_1", "jpg_0")))
        pixels = transform(decode_picture(chosen), decode_picture(rejected), None)
        expected = policy.encode_images(torch.stack(pixels[:2]))
        tensors = sample.tensors("latents")
        torch.testing.assert_close(tensors["chosen"], expected[0], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(tensors["rejected"], expected[1], atol=1e-5, rtol=1e-4)
        assert sample.info()["chosen_time_ids"] == pixels[2].tolist()
    torch.testing.assert_close(batch.cond.embeds, policy.encode_prompts(batch.prompts).embeds, atol=1e-5, rtol=1e-4)
    assert batch.cond.pooled is None


def test_a_caption_is_embedded_once_a_shard(tmp_path: Path, config: str) -> None:
    source = write_parquet(tmp_path / "a.parquet", rows(5, caption="the same"), row_group_size=9)
    prepared(source, tmp_path / "out", "--encode-with", config, "--resolution", "32", "--shard-size", "3")
    owners = [sample.info()["embeds_key"] for sample in stored(tmp_path / "out")]
    have = [sample.key for sample in stored(tmp_path / "out") if "embeds.safetensors" in sample.members]
    assert owners == ["000000000"] * 3 + ["000000003"] * 2
    assert have == ["000000000", "000000003"]


def test_sdxl_latents_carry_pooled_embeddings_and_time_ids(tmp_path: Path, pipelines: Path) -> None:
    config = write_config(tmp_path / "xl.yaml", "StableDiffusionXL", pipelines / "tiny-sdxl")
    source = write_parquet(tmp_path / "a.parquet", rows(2))
    prepared(source, tmp_path / "out", "--encode-with", config, "--resolution", "32")
    data = PreferencePairsDataModule(str(tmp_path / "out"), 2, resolution=32)
    batch = next(iter(data.train_dataloader()))
    assert batch.cond.pooled.shape[0] == 2
    # Row 0's chosen is 16 x 16; row 1's is 16 high and 24 wide: resized to 32 x 48, 8 cut off on the left.
    ids = dict(zip(batch.prompts, batch.chosen_time_ids.tolist()))
    assert ids == {"caption 0": [16, 16, 0, 0, 32, 32], "caption 1": [16, 24, 0, 8, 32, 32]}


def test_the_key_covers_networks_resolution_and_type(config: str, pipelines: Path, tmp_path: Path) -> None:
    policy = load_policy(config)
    keys = {latents_fingerprint(policy, *rest) for rest in ((32, "centre", "float16"), (64, "centre", "float16"))}
    keys.add(latents_fingerprint(policy, 32, "centre", "float32"))
    assert len(keys) == 3
    key = latents_fingerprint(policy, 32, "centre", "float16")
    with torch.no_grad():
        weight = next(policy.vae.parameters())
        weight[0] += 1
        assert latents_fingerprint(policy, 32, "centre", "float16") != key
        weight[0] -= 1


def test_pictures_of_pixel_shards_reach_the_data_module(tmp_path: Path) -> None:
    prepared(write_parquet(tmp_path / "a.parquet", rows(4)), tmp_path / "out")
    batch = next(iter(PreferencePairsDataModule(str(tmp_path / "out"), 4, resolution=16).train_dataloader()))
    assert isinstance(batch, PreferencePairs)
    assert batch.chosen.shape == (4, 3, 16, 16)


def test_encoding_options_without_encoding_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="are for --encode-with"):
        prepared(write_parquet(tmp_path / "a.parquet", rows(1)), tmp_path / "out", "--resolution", "64")


def test_a_config_without_a_policy_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.yaml").write_text("trainer: {max_steps: 1}\n")
    source = write_parquet(tmp_path / "a.parquet", rows(1))
    with pytest.raises(ConfigError, match="describes no policy"):
        prepared(source, tmp_path / "out", "--encode-with", str(tmp_path / "empty.yaml"))
    assert not (tmp_path / "out").exists()
