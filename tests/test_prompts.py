from __future__ import annotations

import json
from pathlib import Path

import pytest

from datamodules.prompts import load_prompts
from lightning_modules.errors import DataError


def written(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.txt", "a cat\n\n  a dog \r\n", ["a cat", "a dog"]),
        ("a.txt", "\ufeffa cät", ["a cät"]),
        ("a.txt", "a cat\u2028on a mat\ntwo\x0cdogs\x85asleep\n", ["a cat\u2028on a mat", "two\x0cdogs\x85asleep"]),
        ("hpd.json", '["a cat", "a dog"]', ["a cat", "a dog"]),
        ("spo.json", '[{"caption": "a cat", "trainset_idx": 7}]', ["a cat"]),
        (
            "a.jsonl",
            '{"prompt": "a cat", "category": "animals"}\n\n{"prompt": "a\\u2028dog", "index": 2}\n',
            ["a cat", "a\u2028dog"],
        ),
        (
            "PartiPrompts.tsv",
            'Prompt\tCategory\tChallenge\tNote\na "cat\tAnimals\tBasic\t\ndog\tAnimals\tBasic\tx\n',
            ['a "cat', "dog"],
        ),
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
