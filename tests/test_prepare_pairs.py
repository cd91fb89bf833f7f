"""Own pairs in every form that people keep them give the same shards; what is wrong is one line."""

import csv
import json
from pathlib import Path

import pytest
from PIL import Image

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
    from datamodules.shards.locate import open_shards

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
        ([], [], "holds no pairs; give a .csv, .json or .jsonl table"),
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
        (lambda folder: folder / "gone.csv", "gone.csv does not exist; give a .csv"),
        (lambda folder: folder, "has no folders chosen and rejected; give a .csv"),
        (
            lambda folder: (as_folders(folder) / "chosen" / "0.txt").unlink() or folder / "own",
            "0.png has no prompt; write",
        ),
        (
            lambda folder: (as_folders(folder) / "rejected" / "1.png").unlink() or folder / "own",
            "0 pictures of that name",
        ),
        (lambda folder: (folder / "x.json").write_text("{") and folder / "x.json", "cannot read .*x.json"),
        (lambda folder: (folder / "x.json").write_text("3") and folder / "x.json", "x.json is no list of JSON objects"),
    ],
)
def test_a_place_without_pairs_is_one_line(pictures, make, message):
    with pytest.raises(DataError, match=message):
        prepared(pictures, "out", make(Path(pictures)))
