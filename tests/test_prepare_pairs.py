"""Own pairs in every form that people keep them give the same shards; what is wrong is one line."""

import csv
import io
import json
import tarfile
from pathlib import Path

import pyarrow
import pyarrow.parquet as parquet
import pytest
from pairs_data import picture
from PIL import Image

from datamodules.shards.locate import open_shards
from experiments import prepare_pairs
from lightning_modules.errors import ConfigError, DataError

PROMPTS = ("a red square", "two cats, one hat", "a \u2028 separator")


@pytest.fixture
def pictures(tmp_path):
    """Files good0.png (chosen) and bad0.png (rejected), ..., each of its own colour."""
    for n in range(len(PROMPTS)):
        for side, name in enumerate(("good", "bad")):
            Image.new("RGB", (8, 6), (40 * n, 200 * side, 9)).save(tmp_path / f"{name}{n}.png")
    return tmp_path


def rows():
    return [{"chosen": f"good{n}.png", "rejected": f"bad{n}.png", "prompt": p} for n, p in enumerate(PROMPTS)]


def choices():
    """The same pairs with the chosen picture now on the one side, now on the other."""
    return [
        {"image_0": f"{'bad' if n % 2 else 'good'}{n}.png", "image_1": f"{'good' if n % 2 else 'bad'}{n}.png",
         "choice": n % 2, "prompt": prompt}
        for n, prompt in enumerate(PROMPTS)
    ]  # fmt: skip


def as_csv(folder, table):
    with (folder / "pairs.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(table[0]))
        writer.writeheader()
        writer.writerows(table)
    return folder / "pairs.csv"


def as_jsonl(folder, table, name="pairs.jsonl"):
    (folder / name).write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in table), encoding="utf-8")
    return folder / name


def as_json(folder, table):
    (folder / "pairs.json").write_text(json.dumps(table))
    return folder / "pairs.json"


def as_folders(folder):
    for row in rows():
        n = row["chosen"][4]
        for side in ("chosen", "rejected"):
            (folder / "own" / side).mkdir(parents=True, exist_ok=True)
            (folder / "own" / side / f"{n}.png").write_bytes((folder / row[side]).read_bytes())
        (folder / "own" / "chosen" / f"{n}.txt").write_text(row["prompt"] + "\n", encoding="utf-8")
    return folder / "own"


def as_page(folder):
    """What ``experiments.label`` writes: a skipped pair, one taken back, and a first choice that was changed."""
    table = [{**row, "annotator": "ann", "left": 0} for row in choices()]
    skipped = {**table[0], "prompt": "skipped", "choice": None, "skipped": True}
    return as_jsonl(folder, [skipped, {**table[0], "choice": "tie"}, *table], "choices.jsonl").parent


def as_parquet(folder, table, name="pairs.parquet"):
    parquet.write_table(pyarrow.Table.from_pylist(table), folder / name)
    return folder / name


def as_bytes(folder, name):
    return (folder / name).read_bytes()


def with_captions(folder):
    """No column for the prompt: it stands beside the pictures."""
    for n, prompt in enumerate(PROMPTS):
        (folder / f"{'good' if n else 'bad'}{n}.{'txt' if n else 'caption'}").write_text(prompt, encoding="utf-8")
    return as_csv(folder, [{"chosen": row["chosen"], "rejected": row["rejected"]} for row in rows()])


def as_tar(folder):
    with tarfile.open(folder / "pairs.tar", "w") as tar:
        for n, row in enumerate(rows()):
            tar.add(folder / row["chosen"], f"{n}.chosen.png")
            tar.add(folder / row["rejected"], f"{n}.rejected.png")
            caption = json.dumps({"caption": row["prompt"]}).encode()
            member = tarfile.TarInfo(f"{n}.json")
            member.size = len(caption)
            tar.addfile(member, io.BytesIO(caption))
    return folder / "pairs.tar"


def as_pickapic(folder):
    table = [
        {"jpg_0": as_bytes(folder, row["image_0"]), "jpg_1": as_bytes(folder, row["image_1"]), "caption": row["prompt"],
         "label_0": 1.0 - row["choice"], "label_1": float(row["choice"])}
        for row in choices()
    ]  # fmt: skip
    (folder / "data").mkdir()
    as_parquet(folder / "data", table, "train-00000-of-00001.parquet")
    as_parquet(folder / "data", table[:1], "test-00000-of-00001.parquet")
    return folder / "data"


def scored(folder, n):
    """Three pictures of a prompt with their scores; the best is good, the worst bad."""
    Image.new("RGB", (8, 6), (1, 2, 3)).save(folder / f"middle{n}.png")
    return [(f"middle{n}.png", 0.25), (f"good{n}.png", 0.75), (f"bad{n}.png", -1.0)]


def as_lists(folder):
    table = [
        {"images": [name for name, _ in scored(folder, n)], "scores": [score for _, score in scored(folder, n)],
         "prompt": prompt}
        for n, prompt in enumerate(PROMPTS)
    ]  # fmt: skip
    return as_jsonl(folder, table)


def as_single_pictures(folder):
    """A row per picture, the prompts' rows among one another."""
    table = [
        {"image": scored(folder, n)[k][0], "score": scored(folder, n)[k][1], "text": prompt}
        for k in range(3)
        for n, prompt in enumerate(PROMPTS)
    ]
    return as_csv(folder, table)


FORMS = {
    "csv": lambda folder: [as_csv(folder, rows())],
    "jsonl": lambda folder: [as_jsonl(folder, choices())],
    "json": lambda folder: [as_json(folder, [{**row, "choice": f"image_{row['choice']}"} for row in choices()])],
    "columns": lambda folder: [
        as_csv(folder, [{"a": row["chosen"], "b": row["rejected"], "caption": row["prompt"]} for row in rows()]),
        "--columns", "chosen=a,rejected=b",
    ],
    "folders": lambda folder: [as_folders(folder)],
    "page": lambda folder: [as_page(folder)],
    "captions beside": lambda folder: [with_captions(folder)],
    "parquet of paths": lambda folder: [
        as_parquet(folder, [{**row, "choice": float(row["choice"])} for row in choices()])
    ],
    "parquet of bytes": lambda folder: [
        as_parquet(
            folder, [row | {side: as_bytes(folder, row[side]) for side in ("chosen", "rejected")} for row in rows()]
        )
    ],
    "parquet of structures": lambda folder: [
        as_parquet(
            folder,
            [
                {"chosen": {"bytes": as_bytes(folder, row["chosen"]), "path": "elsewhere.png"},
                 "rejected": {"bytes": None, "path": row["rejected"]}, "prompt": row["prompt"]}
                for row in rows()
            ],
        )
    ],
    "tar": lambda folder: [as_tar(folder)],
    "Pick-a-Pic": lambda folder: [as_pickapic(folder)],
    "two scores": lambda folder: [
        as_csv(
            folder,
            [
                {"image_0": row["image_0"], "image_1": row["image_1"], "prompt": row["prompt"],
                 "score_0": 5 - row["choice"], "score_1": 4.5}
                for row in choices()
            ],
        )
    ],
    "lists with scores": lambda folder: [as_lists(folder)],
    "pictures with scores": lambda folder: [as_single_pictures(folder)],
}  # fmt: skip


def prepared(folder, output, *words):
    manifest = prepare_pairs.main(["--output", str(folder / output), "--input", *map(str, words)])
    return manifest, {path.name: path.read_bytes() for path in sorted((folder / output).glob("*.tar"))}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_the_same_pairs_gives_the_same_shards(pictures, form):
    _, expected = prepared(pictures, "expected", as_jsonl(pictures, rows(), "expected.jsonl"))
    manifest, shards = prepared(pictures, "out", *FORMS[form](pictures))
    assert shards == expected
    assert len(shards) == 1
    assert manifest.counts["pairs"] == 3


def test_the_chosen_picture_is_stored_as_chosen(pictures):
    prepared(pictures, "out", as_jsonl(pictures, choices()))
    shards = open_shards(str(pictures / "out"))
    for n, prompt in enumerate(PROMPTS):
        sample = shards.read(0, n)
        assert sample.info()["caption"] == prompt
        assert sample.image("chosen").getpixel((0, 0)) == (40 * n, 0, 9)
        assert sample.image("rejected").getpixel((0, 0)) == (40 * n, 200, 9)


def test_a_tie_is_dropped_and_counted_or_kept_on_request(pictures):
    table = [{**choices()[0], "choice": "tie"}, *choices()[1:]]
    manifest, _ = prepared(pictures, "out", as_jsonl(pictures, table))
    assert (manifest.counts["pairs"], manifest.counts["ties_dropped"]) == (2, 1)
    manifest, _ = prepared(pictures, "kept", as_jsonl(pictures, table), "--keep-ties")
    assert (manifest.counts["pairs"], manifest.counts["ties_kept"]) == (3, 1)


def numbers(folder, output):
    """The pairs of prepared shards, as (chosen, rejected) reds and greens."""
    shards = open_shards(str(folder / output))
    return [
        tuple(shards.read(0, n).image(side).getpixel((0, 0))[:2] for side in ("chosen", "rejected"))
        for n in range(len(shards))
    ]


def test_of_scored_pictures_all_pairs_or_the_best_against_the_worst(pictures):
    lists = as_lists(pictures)
    prepared(pictures, "best", lists)
    good, middle, bad = (40, 0), (1, 2), (40, 200)
    assert numbers(pictures, "best")[1] == (good, bad)
    manifest, _ = prepared(pictures, "all", lists, "--pairs", "all")
    assert manifest.counts["pairs"] == 9
    assert sorted(numbers(pictures, "all")[3:6]) == sorted([(good, middle), (good, bad), (middle, bad)])


def test_scores_within_the_margin_are_ties(pictures):
    lists = as_lists(pictures)  # gaps of 0.5, 1.25 and 1.75
    manifest, _ = prepared(pictures, "one", lists, "--pairs", "all", "--margin", "0.5")
    assert (manifest.counts["pairs"], manifest.counts["ties_dropped"]) == (9, 0)
    manifest, _ = prepared(pictures, "two", lists, "--pairs", "all", "--margin", "0.51")
    assert (manifest.counts["pairs"], manifest.counts["ties_dropped"]) == (6, 3)
    table = [{"image_0": "good0.png", "image_1": "bad0.png", "score_0": 1, "score_1": 1, "prompt": "x"}, choices()[1]]
    table[1] = {**table[0], "score_1": 2, "prompt": "y"}
    manifest, _ = prepared(pictures, "equal", as_jsonl(pictures, table, "equal.jsonl"))
    assert (manifest.counts["pairs"], manifest.counts["ties_dropped"]) == (1, 1)
    assert numbers(pictures, "equal") == [((0, 200), (0, 0))]


def test_limit_reads_the_first_pairs(pictures):
    manifest, _ = prepared(pictures, "out", as_jsonl(pictures, rows()), "--limit", "2")
    assert manifest.counts["pairs"] == 2


def test_other_pictures_of_the_same_sizes_are_another_job(pictures):
    table = as_jsonl(pictures, rows())
    for n in range(len(PROMPTS)):
        Image.new("RGB", (8, 6), (0, 0, n)).save(pictures / f"good{n}.bmp")
    first, _ = prepared(pictures, "out", table)
    again, _ = prepared(pictures, "out", table)
    assert first == again
    (pictures / "good0.png").write_bytes((pictures / "good1.png").read_bytes())
    with pytest.raises(ConfigError, match="was prepared with other input files"):
        prepared(pictures, "out", table)


def test_people_who_agree_give_one_pair_and_those_who_do_not_give_two(pictures):
    ann, bob = ({**choices()[0], "annotator": name} for name in ("ann", "bob"))
    manifest, _ = prepared(pictures, "alike", as_jsonl(pictures, [ann, bob]))
    assert (manifest.counts["pairs"], manifest.counts["duplicates_dropped"]) == (1, 1)
    manifest, _ = prepared(pictures, "apart", as_jsonl(pictures, [ann, {**bob, "choice": 1}]))
    assert manifest.counts["pairs"] == 2


def test_a_picture_that_is_none_is_counted_and_named_by_its_row(pictures):
    (pictures / "good1.png").write_bytes(b"none")
    manifest, _ = prepared(pictures, "out", as_jsonl(pictures, rows()))
    assert (manifest.counts["pairs"], manifest.counts["corrupt_dropped"]) == (2, 1)
    assert manifest.corrupt[0].startswith("pairs.jsonl, row 1: jpg_0: ")


@pytest.mark.parametrize(
    ("table", "words", "message"),
    [
        ([{"good": "a", "bad": "b", "prompt": "c"}], [], "has the columns good, bad, prompt; name those of chosen"),
        (rows(), ["--columns", "chosen=chosn"], "no column 'chosn' .did you mean 'chosen'.*; it has chosen, rejected"),
        (rows(), ["--columns", "chosn=chosen"], "--columns names 'chosn' .did you mean 'chosen'"),
        (rows(), ["--columns", "chosen"], "--columns wants ROLE=COLUMN,..., got 'chosen'"),
        ([{**rows()[0], "chosen": "gone.png"}], [], "row 1: the picture .*gone.png does not exist; correct the path"),
        ([{**rows()[0], "rejected": "good0.png"}], [], "row 1: both pictures are .*good0.png"),
        ([{**rows()[0], "prompt": " "}], [], "row 1: the prompt is ' '; write a text"),
        ([{**choices()[0], "choice": 2}], [], "row 1: choice is 2; want one of 0, image_0, left"),
        ([rows()[0], {"chosen": "good1.png", "prompt": "x"}], [], "row 2 has no rejected"),
        ([], [], "holds no pairs; give a .csv, .json, .jsonl, .parquet or .tar file"),
        ([{"image": "good0.png", "score": 1, "prompt": "x"}], [], "'x' has one picture, and a pair takes two"),
        ([{"image": "good0.png", "score": "high", "prompt": "x"}], [], "row 1: a score is 'high'; write a number"),
        ([{"images": ["good0.png"], "scores": [1, 2], "prompt": "x"}], [], "row 1: images and scores must be lists of"),
        ([{"images": "good0.png", "scores": [1], "prompt": "x"}], [], "row 1: images and scores must be lists of one"),
        ([{**rows()[0], "chosen": {"path": 3}}], [], "row 1: a picture is '3'; write its path"),
        ([{"chosen": "good0.png", "rejected": "bad0.png"}], [], "row 1 has no prompt; write it into .*good0.txt"),
    ],
)
def test_what_is_wrong_is_one_line(pictures, table, words, message):
    with pytest.raises((ConfigError, DataError), match=message) as error:
        prepared(pictures, "out", as_json(pictures, table), *words)
    assert "\n" not in str(error.value)
    assert not (pictures / "out").exists()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: folder / "gone.csv", "gone.csv' does not exist.*can be given: a .csv"),
        (lambda folder: folder, "holds no parquet files.*can be given: a .csv"),
        (lambda folder: (folder / "chosen").mkdir() or folder, "has no folders chosen and rejected; give a .csv"),
        (lambda folder: folder / "good0.png", "good0.png is no such table; give a .csv"),
        (lambda folder: (folder / "x.parquet").write_text("{") and folder / "x.parquet", "x.parquet is not a whole"),
        (
            lambda folder: (as_folders(folder) / "chosen" / "0.txt").unlink() or folder / "own",
            "0.png has no prompt; write",
        ),
        (
            lambda folder: (as_folders(folder) / "rejected" / "1.png").unlink() or folder / "own",
            "0 pictures of that name",
        ),
        (
            lambda folder: (as_folders(folder) / "chosen" / "1.png").unlink() or folder / "own",
            "rejected/1.png: no picture of that name",
        ),
        (lambda folder: (folder / "x.json").write_text("{") and folder / "x.json", "cannot read .*x.json"),
        (lambda folder: (folder / "x.json").write_text("3") and folder / "x.json", "x.json is no list of JSON objects"),
    ],
)
def test_a_place_without_pairs_is_one_line(pictures, make, message):
    with pytest.raises(DataError, match=message):
        prepared(pictures, "out", make(Path(pictures)))


@pytest.mark.parametrize("form", ["csv", "folders", "tar", "Pick-a-Pic", "page"])
@pytest.mark.parametrize("words", [["--margin", "0.5"], ["--pairs", "all"]])
def test_settings_of_scores_where_there_are_none_are_refused(pictures, form, words):
    with pytest.raises(ConfigError, match="--pairs and --margin are for pictures with scores, and .* has none"):
        prepared(pictures, "out", *FORMS[form](pictures), *words)
    assert not (pictures / "out").exists()


@pytest.mark.parametrize("form", ["folders", "tar"])
def test_columns_where_there_are_none_are_refused(pictures, form):
    with pytest.raises(ConfigError, match="--columns is for tables, and .* is none"):
        prepared(pictures, "out", *FORMS[form](pictures), "--columns", "chosen=a")


@pytest.mark.parametrize("margin", ["-1", "nan", "inf"])
def test_a_margin_that_means_nothing_is_refused(pictures, margin):
    with pytest.raises(ConfigError, match="--margin must be 0 or more, got"):
        prepared(pictures, "out", as_lists(pictures), f"--margin={margin}")


def test_a_caption_file_of_windows_is_read_as_any_other(tmp_path: Path) -> None:
    for side, value in (("chosen", 1), ("rejected", 2)):
        (tmp_path / "own" / side).mkdir(parents=True)
        (tmp_path / "own" / side / "a.png").write_bytes(picture(value))
    (tmp_path / "own" / "chosen" / "a.txt").write_bytes(b"\xef\xbb\xbfa cat\r\non a mat\r\n")
    prepare_pairs.main(["--input", str(tmp_path / "own"), "--output", str(tmp_path / "out")])
    assert json.loads((tmp_path / "out" / "captions.json").read_text()) == ["a cat\non a mat"]
