"""Prompt files out of own captions in the published layouts."""

import json
import subprocess
import sys

import pytest
from pairs_data import rows, write_parquet

from datamodules.prompt_sets import PublishedSet, prompts_hash
from datamodules.prompts import load_prompts
from experiments.prepare_prompts import main
from lightning_modules.errors import ConfigError, DataError


@pytest.fixture
def downloads(tmp_path, monkeypatch):
    """Pick-a-Pic's three splits as a folder; the working folder is another."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    folder = tmp_path / "downloads"
    folder.mkdir()
    validation = [" a cat ", "a dog", " a cat ", "", None, "a cat"]
    content = [row | {"caption": caption} for row, caption in zip(rows(6), validation)]
    write_parquet(folder / "validation_unique-00000-of-00001.parquet", content, row_group_size=2)
    write_parquet(folder / "test_unique-00000-of-00001.parquet", rows(3))
    write_parquet(folder / "train-00000-of-00001.parquet", rows(2))
    return folder


def test_held_out_captions_each_once_in_their_order(downloads, tmp_path, capsys):
    assert main(["pickapic_validation", "--input", str(downloads)]) == [" a cat ", "a dog", "a cat"]
    assert main(["pickapic_test", "--input", str(downloads)]) == ["caption 0", "caption 1", "caption 2"]
    made = tmp_path / "here" / "data" / "prompts"
    assert (made / "pickapic_validation.txt").read_bytes() == b" a cat \na dog\na cat\n"
    assert load_prompts(made / "pickapic_test.txt") == ["caption 0", "caption 1", "caption 2"]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "6 rows read; left out: 2 without a caption, 1 repeated"
    hash = prompts_hash([" a cat ", "a dog", "a cat"])
    assert lines[1].startswith(
        f"data/prompts/pickapic_validation.txt: 3 prompts, 3 different, hash {hash}: no published"
    )
    assert lines[2].endswith("Pick-a-Pic v1 validation_unique: 3 prompts, the published set has 500")


def test_they_also_come_from_a_prompt_file(downloads, tmp_path):
    (tmp_path / "pap.json").write_text('["a cat", "a dog", "a cat"]')
    output = tmp_path / "x" / "val.json"
    words = ["pickapic_validation", "--input", str(tmp_path / "pap.json"), "--output", str(output)]
    assert main(words) == load_prompts(output) == ["a cat", "a dog"]


def test_spos_training_prompts(tmp_path, monkeypatch, capsys):
    texts = ["a cat", "a dog"]
    monkeypatch.setattr(
        "experiments.prepare_prompts.PUBLISHED", {"spo_4k": PublishedSet("SPO's", 2, prompts_hash(texts))}
    )
    (tmp_path / "4k.json").write_text(json.dumps([{"caption": t, "trainset_idx": n} for n, t in enumerate(texts)]))
    words = ["spo_4k", "--input", str(tmp_path / "4k.json"), "--output", str(tmp_path / "spo_4k.json")]
    assert main(words) == load_prompts(tmp_path / "spo_4k.json") == texts
    assert "not the published set" not in capsys.readouterr().out
    (tmp_path / "4k.json").write_text(json.dumps([*texts[:1], "two dogs"]))
    with pytest.raises(ConfigError, match="spo_4k.json holds other prompts; choose another --output"):
        main(words)
    assert load_prompts(tmp_path / "spo_4k.json") == texts
    (tmp_path / "spo_4k.json").unlink()
    main(words)
    assert "not the published set: SPO's: 2 prompts, hash " in capsys.readouterr().out


def test_several_files_are_joined_in_their_order_and_repeated_prompts_of_a_benchmark_stay(tmp_path):
    (tmp_path / "photo.json").write_text('["a cat ", "a dog"]')
    (tmp_path / "anime.json").write_text('["a dog"]')
    files = [str(tmp_path / name) for name in ("photo.json", "anime.json")]
    output = tmp_path / "hpdv2.json"
    assert main(["hpdv2", "--input", *files, "--output", str(output)]) == ["a cat ", "a dog", "a dog"]
    assert load_prompts(output) == ["a cat ", "a dog", "a dog"]


@pytest.mark.parametrize("separator", ["\n", "\r\n", "\u2028"])
def test_a_caption_of_several_lines_is_refused_or_kept_in_json(downloads, tmp_path, separator):
    caption = f"a cat{separator}on a mat"
    path = write_parquet(tmp_path / "odd.parquet", rows(2, caption=caption))
    with pytest.raises(DataError, match=r"prompt 1, .* write data/prompts/pickapic_test.json instead"):
        main(["pickapic_test", "--input", str(path)])
    assert list((tmp_path / "here").iterdir()) == []
    assert main(["pickapic_test", "--input", str(path), "--output", "odd.json"]) == [caption]
    assert load_prompts("odd.json") == [caption]


def test_other_inputs_are_told(downloads, tmp_path):
    empty = write_parquet(tmp_path / "empty.parquet", rows(2, caption=" "))
    other = write_parquet(tmp_path / "other.parquet", [{"text": "a cat"}])
    broken = tmp_path / "broken.parquet"
    broken.write_bytes(other.read_bytes()[:-20])
    for given, message in (
        (empty, r"no prompts in .*empty.parquet \(2 rows\)"),
        (other, "has no column caption"),
        (broken, "is not a whole parquet file"),
        (tmp_path / "nothing.parquet", "does not exist"),
        (tmp_path / "nothing.json", "cannot read prompt file"),
    ):
        with pytest.raises(DataError, match=message) as caught:
            main(["pickapic_test", "--input", str(given)])
        assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match="suffix '.parquet' is not known"):
        main(["spo_4k", "--input", str(other)])


def test_the_shell_gets_help_and_one_line_of_errors(tmp_path):
    def ran(*words):
        command = [sys.executable, "-X", "importtime", "-m", "experiments.prepare_prompts", *words]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, cwd=tmp_path)

    page = ran("--help")
    assert page.returncode == 0
    assert "pickapic_validation" in page.stdout
    assert not {"torch", "pyarrow"} & {line.split("|")[-1].strip() for line in page.stderr.splitlines()}
    refused = ran("spo_4k", "--input", "nothing.json")
    assert refused.returncode == 2
    assert [line for line in refused.stderr.splitlines() if not line.startswith("import time:")] == [
        "error: cannot read prompt file nothing.json: No such file or directory"
    ]
