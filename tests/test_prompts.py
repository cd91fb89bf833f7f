from __future__ import annotations

import json
from pathlib import Path

import pytest

from datamodules.prompt_sets import PUBLISHED, PublishedSet, difference, prompts_hash, recognised, told
from datamodules.prompts import load_prompts, write_prompts
from lightning_modules.errors import DataError


def written(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


# Own texts in the layouts of the published files: outer spaces, quotation marks and separators are text.
PARTI = 'Prompt\tCategory\tChallenge\tNote\n"a" cat \tAnimals\tBasic\t\n\'dog\tAnimals\tBasic\tx\n'
SDPO = [
    {"prompt": " a cat", "metadata": {"n": 1}, "raw_image_path": "x.png", "gen_image_path": "y.png"},
    {"prompt": "a dog", "metadata": None, "raw_image_path": "x.png", "neg_prompt": "blurry"},
]
GENEVAL = """{"tag": "counting", "include": [{"class": "dog", "count": 3}], "exclude": [], "prompt": "three dogs"}
{"tag": "colors", "include": [{"class": "cat", "count": 1, "color": "red"}], "prompt": "a red cat"}
"""


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.txt", "a cat\n\n  a dog \r\n", ["a cat", "  a dog "]),
        ("a.txt", "\ufeffa cät", ["a cät"]),
        ("a.txt", "a cat\u2028on a mat\ntwo\x0cdogs\x85asleep\n", ["a cat\u2028on a mat", "two\x0cdogs\x85asleep"]),
        ("color_val.txt", "a red cat.\r\ntwo dogs.\r\n", ["a red cat.", "two dogs."]),
        ("photo.json", '["a cat ", "a dog"]', ["a cat ", "a dog"]),
        ("spo.json", '[{"caption": "a cat", "trainset_idx": 7}]', ["a cat"]),
        ("papv2.json", json.dumps(SDPO), [" a cat", "a dog"]),
        ("benchmark-prompts.json", '[{"id": "0-1", "prompt": "a cat"}]', ["a cat"]),
        ("evaluation_metadata.jsonl", GENEVAL, ["three dogs", "a red cat"]),
        (
            "a.jsonl",
            '{"prompt": "a cat", "category": "animals"}\n\n{"prompt": "a\\u2028dog", "index": 2}\n',
            ["a cat", "a\u2028dog"],
        ),
        ("same.json", '[{"prompt": "a cat", "caption": "a cat"}]', ["a cat"]),
        ("PartiPrompts.tsv", PARTI, ['"a" cat ', "'dog"]),
        ("PartiPrompts.tsv", PARTI.replace("\n", "\r\n"), ['"a" cat ', "'dog"]),
    ],
)
def test_known_forms(tmp_path: Path, name: str, content: str, expected: list[str]) -> None:
    assert load_prompts(written(tmp_path, name, content)) == expected


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "\n \n", "holds no prompts"),
        ("a.json", "[]", "holds no prompts"),
        ("a.csv", "a cat", "suffix '.csv' is not known"),
        ("a.json", '{"caption": "x"}', "holds a JSON object, not a list"),
        ("a.json", '["x", 3]', "entry 2 has a number"),
        ("a.json", '[{"text": "x"}]', r"entry 1 has the fields \['text'\]"),
        ("a.json", '[{"caption": 7}]', "entry 1 has the fields"),
        ("a.json", '["x"', "the file is not valid JSON"),
        ("a.jsonl", '{"prompt": "x"}\n{', "line 2 is not valid JSON"),
        ("a.tsv", "Text\tCategory\nx\ty\n", "none is Prompt"),
        ("a.json", '[{"prompt": "x", "caption": "y"}]', "entry 1 has a prompt and another caption"),
        ("a.json", '[{"prompt": ["x"]}]', "entry 1 has the fields"),
        ("a.tsv", "\n", "has the columns"),
        ("a.tsv", "Prompt\tCategory\nx\n", "line 2: 1 columns, the header has 2"),
        ("a.txt", b"caf\xe9", "is not UTF-8 text"),
        ("a.json", json.dumps(["x", " "]), "prompt 2 has 0 characters"),
        ("a.txt", "x" * 10_001, "prompt 1 has 10001 characters"),
    ],
)
def test_other_files_are_refused_by_name(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    path = written(tmp_path, name, content)
    with pytest.raises(DataError, match=message) as caught:
        load_prompts(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot read prompt file .*none.txt"):
        load_prompts(tmp_path / "none.txt")


def test_a_folder_of_a_file_for_each_prompt(tmp_path: Path) -> None:
    """As DPG-Bench has them: numbers in their order, then the others by name; what is no .txt is no prompt."""
    for name in ("10", "9", "COCO_val_2", "COCO_val_10"):
        written(tmp_path, f"{name}.txt", f"prompt {name}\n")
    written(tmp_path, "readme.md", "no prompt")
    assert load_prompts(tmp_path) == ["prompt 9", "prompt 10", "prompt COCO_val_10", "prompt COCO_val_2"]
    written(tmp_path, "list.txt", "a cat\na dog\n")
    with pytest.raises(DataError, match="list.txt has 2 lines of text; in a folder every file is one prompt"):
        load_prompts(tmp_path)


# Writing


@pytest.mark.parametrize("name", ["a.txt", "a.json"])
def test_what_is_written_is_read_again(tmp_path: Path, name: str) -> None:
    prompts = [" a cat ", 'a "dog"', "zwei Hündchen", "a cat"]
    write_prompts(tmp_path / name, prompts)
    assert load_prompts(tmp_path / name) == prompts
    assert prompts[2] in (tmp_path / name).read_text()


@pytest.mark.parametrize("character", ["\n", "\r", "\x0b", "\x0c", "\x1c", "\x85", "\u2028", "\u2029"])
def test_prompts_that_lines_cannot_hold_are_written_as_json(tmp_path: Path, character: str) -> None:
    prompts = ["a cat", f"a dog{character}asleep"]
    with pytest.raises(DataError, match="prompt 2, .* write .*a.json instead") as caught:
        write_prompts(tmp_path / "a.txt", prompts)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []
    write_prompts(tmp_path / "a.json", prompts)
    assert load_prompts(tmp_path / "a.json") == prompts


def test_what_no_file_of_prompts_can_hold_is_refused(tmp_path: Path) -> None:
    for prompts, name, message in (
        (["a cat", " "], "a.txt", "prompt 2 has 0 characters"),
        (["\ufeffa cat"], "a.txt", "a.json instead"),  # it would be taken for the mark of the file's encoding
        (["a cat"], "a.csv", "written as .txt or .json"),
    ):
        with pytest.raises(DataError, match=message):
            write_prompts(tmp_path / name, prompts)


# Which set it is


def test_the_hash_is_of_the_texts_as_a_json_list() -> None:
    # echo -n '["a cat", "\\u00e9"]' | sha256sum
    assert prompts_hash(["a cat", "é"]) == "874e6d6dff9b826b"
    assert prompts_hash(["a cat", "é "]) != prompts_hash(["a cat", "é"]) != prompts_hash(["é", "a cat"])


SETS = {
    "cats": PublishedSet(
        "Cats", 2, prompts_hash(["a cat ", "two cats"]), {prompts_hash(["a cat", "two cats"]): "no spaces"}
    ),
    "dogs": PublishedSet("Dogs", 2, None),
}


def test_a_difference_from_a_published_set_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    cats, dogs = SETS.values()
    assert difference(["a cat ", "two cats"], cats) is None
    assert difference(["a cat"], cats) == "Cats: 1 prompts, the published set has 2"
    found = prompts_hash(["x", "y"])
    assert difference(["x", "y"], cats) == f"Cats: 2 prompts, hash {found} differs from the published {cats.hash}"
    assert difference(["a cat", "two cats"], cats).endswith(f"the published {cats.hash}; no spaces")
    assert difference(["x", "y"], dogs) is None
    assert difference(["x"], dogs) == "Dogs: 1 prompts, the published set has 2"


def test_a_published_set_is_recognised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datamodules.prompt_sets.PUBLISHED", SETS)
    assert recognised(["a cat ", "two cats"]) == SETS["cats"]
    assert told(["a cat ", "two cats"]) == f"2 prompts, 2 different, hash {SETS['cats'].hash}: Cats as published"
    assert told(["a cat", "two cats"]).endswith(": Cats, no spaces")
    assert recognised(["x", "x"]) is None
    assert told(["x", "x"]).startswith("2 prompts, 1 different, hash ")
    assert told(["x", "x"]).endswith(": no published set whose hash is known here")


def test_hashes_of_published_sets_are_sixteen_digits_and_different() -> None:
    hashes = [hash for known in PUBLISHED.values() for hash in (known.hash, *known.others) if hash is not None]
    assert len(hashes) == len(set(hashes)) == 21
    assert all(len(hash) == 16 and set(hash) <= set("0123456789abcdef") for hash in hashes)
