"""What a preparation reads: the files of one split however published, and columns however typed."""

from pathlib import Path, PurePath

import pyarrow
import pyarrow.parquet as parquet
import pytest
from pairs_data import picture, rows, write_parquet

from datamodules.shards.locate import open_shards
from datamodules.stream.order import StoredOrder
from experiments import prepare_pickapic
from experiments.preparation.inputs import find_inputs, of_split, split_name
from lightning_modules.errors import DataError

# ----------------------------------------------------------------------------------------------- splits


@pytest.mark.parametrize(
    ("file", "split"),
    [
        ("train-00000-of-00645-5a1b.parquet", "train"),
        ("data/validation_unique-00000-of-00001.parquet", "validation_unique"),
        ("pickapic_v2-test-00000-of-00001.parquet", "test"),
        ("preferred-00000-of-00002.parquet", "preferred"),
        ("default/train/0000.parquet", "train"),
        ("default/test_unique/0000.parquet", "test_unique"),
        ("train_0000.parquet", "train"),
        ("pairs.val.parquet", "validation"),
        ("Dev.parquet", "validation"),
        ("training/0.parquet", "train"),
        ("evaluation/part-0.parquet", "test"),
        ("test/train-00000-of-00001.parquet", "train"),  # the file's own name counts before its folder's
        ("train/val/0.parquet", "validation"),
        ("contest.parquet", None),
        ("values/trainer.parquet", None),
        ("device0.parquet", None),
        ("a.parquet", None),
    ],
)
def test_splits_are_read_from_names_of_files_and_folders(file, split):
    assert split_name(PurePath(file)) == split


def files(*names):
    return [PurePath(name) for name in names]


def test_other_spellings_of_a_split_are_the_same():
    assert of_split(files("val/0.parquet", "train/0.parquet"), "dev", "here") == files("val/0.parquet")
    assert of_split(files("validation_unique/0.parquet"), "validation_unique", "here")


def test_without_names_all_files_are_training_pairs_and_no_other_split():
    assert of_split(files("a.parquet", "b.parquet"), "train", "here") == files("a.parquet", "b.parquet")
    with pytest.raises(DataError, match="here holds no split 'test': none of its files names one"):
        of_split(files("a.parquet"), "test", "here")


def test_held_out_pairs_never_pass_for_training_pairs():
    with pytest.raises(DataError, match="here holds no split 'train', only test, validation_unique"):
        of_split(files("test/0.parquet", "validation_unique/0.parquet"), "train", "here")
    with pytest.raises(DataError, match=r"here holds 1 files of no split, such as more.parquet, beside those of test"):
        of_split(files("train.parquet", "test.parquet", "more.parquet"), "train", "here")


def test_files_and_patterns_are_taken_as_they_are(tmp_path):
    one, other = tmp_path / "train.parquet", tmp_path / "test.parquet"
    for path in (one, other):
        write_parquet(path, rows(1))
    assert find_inputs([str(other)], "train") == [other]
    assert find_inputs([f"{tmp_path}/*.parquet"], "train") == [other, one]
    assert find_inputs([str(tmp_path)], "train") == [one]


def test_folders_behind_links_are_read_once(tmp_path):
    write_file = tmp_path / "disk" / "train-00000-of-00001.parquet"
    write_file.parent.mkdir()
    write_parquet(write_file, rows(1))
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "data").symlink_to("../disk")
    (tmp_path / "disk" / "round").symlink_to("..")
    assert [path.name for path in find_inputs([str(tmp_path / "in" / "data")], "train")] == [write_file.name]
    assert [path.name for path in find_inputs([str(tmp_path / "in")], "train")] == [write_file.name]


def test_home_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_parquet(tmp_path / "a.parquet", rows(1))
    assert find_inputs(["~/a.parquet"], "train") == [tmp_path / "a.parquet"]
    assert find_inputs(["~"], "train") == [tmp_path / "a.parquet"]


def test_of_a_hub_data_set_only_the_split_is_fetched(tmp_path, monkeypatch):
    import huggingface_hub

    names = ["README.md", "data/train-0-of-1.parquet", "data/validation_unique-0-of-1.parquet"]
    fetched = {}

    def snapshot_download(repository, repo_type, allow_patterns):
        fetched.update(repository=repository, repo_type=repo_type, allow_patterns=allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", lambda self, repository, repo_type: names)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert find_inputs(["some/pairs"], "train") == [tmp_path / "data/train-0-of-1.parquet"]
    assert fetched == {
        "repository": "some/pairs",
        "repo_type": "dataset",
        "allow_patterns": ["data/train-0-of-1.parquet"],
    }
    with pytest.raises(DataError, match="some/pairs holds no split 'test', only train, validation_unique"):
        find_inputs(["some/pairs"], "test")


# ---------------------------------------------------------------------------------------------- columns


def table(**columns) -> pyarrow.Table:
    found = pyarrow.Table.from_pylist(rows(4))
    for name, values in columns.items():
        found = found.set_column(found.schema.get_field_index(name), name, values)
    return found


def prepared(tmp_path, content: pyarrow.Table):
    parquet.write_table(content, tmp_path / "in.parquet")
    return prepare_pickapic.main(["--input", str(tmp_path / "in.parquet"), "--output", str(tmp_path / "out")])


def stored(folder: Path):
    shards = open_shards(str(folder))
    return [shards.read(*StoredOrder(shards.sizes)[n]) for n in range(len(shards))]


def recast(name, how):
    return table(**{name: how(table()[name].combine_chunks())})


@pytest.mark.parametrize(
    "content",
    [
        recast("jpg_0", lambda column: column.cast(pyarrow.binary_view())),
        recast("jpg_0", lambda column: column.cast(pyarrow.large_binary())),
        recast("jpg_0", lambda column: column.dictionary_encode()),
        recast("jpg_0", lambda column: pyarrow.array([{"bytes": v.as_py(), "path": None} for v in column])),
        recast("caption", lambda column: column.dictionary_encode()),
        recast("caption", lambda column: column.cast(pyarrow.large_string())),
        recast("label_0", lambda column: column.cast(pyarrow.int8())),
        recast("has_label", lambda column: column.cast(pyarrow.int8())),
        recast("ranking_id", lambda column: column.cast(pyarrow.float64())),
    ],
    ids=["view", "large", "dictionary", "structure", "words", "large words", "integers", "flags", "floats"],
)
def test_what_means_the_same_gives_the_same_shards(tmp_path, content):
    manifest = prepared(tmp_path, content)
    assert manifest.counts["pairs"] == 4
    expected = [(picture(2 * n, kind="JPEG"), n) for n in range(4)]
    for sample, (first, n) in zip(stored(tmp_path / "out"), expected, strict=True):
        assert sample.picture("chosen" if n % 2 == 0 else "rejected") == first
        assert (sample.info()["caption"], sample.info()["ranking_id"]) == (f"caption {n}", 100 + n)
        assert isinstance(sample.info()["ranking_id"], int)


def test_a_structure_without_bytes_is_no_picture(tmp_path):
    column = pyarrow.array([{"bytes": picture(7), "path": None}] * 3 + [{"bytes": None, "path": "gone.png"}])
    manifest = prepared(tmp_path, table(jpg_0=column))
    assert (manifest.counts["pairs"], manifest.counts["corrupt_dropped"]) == (3, 1)
    assert stored(tmp_path / "out")[0].picture("chosen") == picture(7)
    assert manifest.corrupt == ("in.parquet, row 3 (a3, b3): jpg_0 is empty",)


def test_gaps_that_became_nan_are_gaps(tmp_path):
    nan = pyarrow.array([3.0, float("nan")] * 2)
    manifest = prepared(tmp_path, table(num_example_per_prompt=nan, ranking_id=nan))
    assert manifest.counts["pairs"] == 4
    info = [sample.info() for sample in stored(tmp_path / "out")]
    assert [entry.get("ranking_id") for entry in info] == [3, None, 3, None]
    assert [entry.get("num_example_per_prompt") for entry in info] == [3, None, 3, None]


def test_flags_as_numbers_drop_unlabelled_rows(tmp_path):
    manifest = prepared(tmp_path, table(has_label=pyarrow.array([1, 0, 1, 0], pyarrow.int8())))
    assert (manifest.counts["pairs"], manifest.counts["unlabelled_dropped"]) == (2, 2)


def test_identities_may_be_numbers(tmp_path):
    manifest = prepared(tmp_path, table(image_0_uid=pyarrow.array([5, 6, 5, 8])))
    assert manifest.counts["pairs"] == 4
    assert stored(tmp_path / "out")[0].info()["chosen_uid"] == "5"


@pytest.mark.parametrize("value", [0, -1, 2e9])
def test_a_count_that_the_reader_refuses_makes_no_pair(tmp_path, value):
    manifest = prepared(tmp_path, table(num_example_per_prompt=pyarrow.array([3.0, value, 1.0, 1e9])))
    assert (manifest.counts["pairs"], manifest.counts["corrupt_dropped"]) == (3, 1)
    assert "num_example_per_prompt must lie in [1, 1e+09], got" in manifest.corrupt[0]


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("image_0_uid", pyarrow.array([b"a"] * 4), "image_0_uid is binary, expected text or whole numbers"),
        ("ranking_id", pyarrow.array(range(4), pyarrow.timestamp("ns")), r"ranking_id is timestamp.*expected numbers"),
        ("has_label", pyarrow.array(["yes"] * 4), "has_label is string, expected booleans, or 0 and 1"),
        ("caption", pyarrow.array([1] * 4), "caption is int64, expected text"),
        ("jpg_1", pyarrow.array(["a.png"] * 4), "jpg_1 is string, expected encoded pictures"),
        ("label_1", pyarrow.array([[1.0]] * 4), "label_1 is list.*expected numbers"),
        ("caption", pyarrow.nulls(4), "caption is null, expected text"),
    ],
)
def test_a_column_that_cannot_hold_what_is_read_is_refused_before_any_row(tmp_path, column, values, message):
    with pytest.raises(DataError, match=message):
        prepared(tmp_path, table(**{column: values}))
    assert not (tmp_path / "out").exists()


def test_an_empty_column_that_is_not_needed_is_no_column(tmp_path):
    assert prepared(tmp_path, table(ranking_id=pyarrow.nulls(4), has_label=pyarrow.nulls(4))).counts["pairs"] == 4
