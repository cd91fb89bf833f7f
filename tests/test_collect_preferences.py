"""The embedded world's Pick-a-Pic: several generators, and choices as noisy as they are said to be."""

import math

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from datamodules.shards.pictures import decode_picture
from experiments import prepare_pickapic
from experiments.preparation import parts
from experiments.shapes import collect_preferences as collect
from lightning_modules.errors import ConfigError
from lightning_modules.shapes.reward import ShapesReward


def share(labels, wanted):
    return sum(label == wanted for label in labels) / len(labels)


@pytest.mark.parametrize("gap", [0.0, 0.2, -0.6])
def test_people_choose_by_bradley_and_terry_with_ties(gap):
    """By Rao and Kupper: pi_0 / (pi_0 + theta pi_1), with pi = exp(sharpness r), theta = exp(tie)."""
    people, n = collect.People(sharpness=5.0, tie=0.5), 4000
    rewards = torch.tensor([[0.5 + gap, 0.5]]).repeat(n, 1)
    labels = people.choose(rewards, [("choice", j) for j in range(n)])
    better, worse, theta = math.exp(5 * (0.5 + gap)), math.exp(5 * 0.5), math.exp(0.5)
    first, second = better / (better + theta * worse), worse / (worse + theta * better)
    expected = {1.0: first, 0.0: second, 0.5: 1 - first - second}
    for label, probability in expected.items():
        error = math.sqrt(probability * (1 - probability) / n)
        assert abs(share(labels, label) - probability) < 4 * error


def test_without_noise_worth_speaking_of_people_are_the_exact_reward():
    rewards = torch.rand(200, 2, generator=torch.Generator().manual_seed(0))
    labels = collect.People(sharpness=1e9, tie=0.0).choose(rewards, [(j,) for j in range(200)])
    assert labels == (rewards[:, 0] > rewards[:, 1]).double().tolist()


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(collect, "WAYS", ((2, 1.0), (3, 2.0)))
    monkeypatch.setattr(collect, "PART", 6)
    monkeypatch.setattr(parts, "PART", 6)


def table(file):
    return pq.read_table(file).to_pylist()


def test_pairs_are_of_one_prompt_and_two_makers_and_go_real_datas_road(tmp_path, quick, monkeypatch, capsys):
    folder = tmp_path / "people"
    words = ["--output", str(folder), "--pairs", "12", "--sharpness", "3", "--seed", "5"]
    collect.main(words)
    told = " ".join(capsys.readouterr().out.split())
    files = sorted(folder.glob("*.parquet"))
    rows = [row for file in files for row in table(file)]
    assert len(files) == 2
    assert [row["ranking_id"] for row in rows] == list(range(12))
    makers = {name for row in rows for name in (row["model_0"], row["model_1"])}
    known = {"artist", "embedded/shapes, 2 steps, guidance 1", "embedded/shapes, 3 steps, guidance 2"}
    assert makers == known
    assert all(row["model_0"] != row["model_1"] for row in rows)
    agreed = 0
    for row in rows:
        pictures = [decode_picture(row[side]) for side in ("jpg_0", "jpg_1")]
        seen = torch.stack([torch.from_numpy(np.array(picture)) for picture in pictures]).permute(0, 3, 1, 2)
        better = ShapesReward().score(seen / 255, [row["caption"]] * 2)
        agreed += row["label_0"] == float(better[0] > better[1])
    ties = share([row["label_0"] for row in rows], 0.5)
    assert f"12 pairs, {ties:.1%} of them ties" in told
    assert f"agrees with {agreed / (12 * (1 - ties)):.1%} of the other choices" in told

    before = [file.read_bytes() for file in files]
    files[1].unlink()
    collect.main(words)  # a part that is missing is made again, the same
    assert [file.read_bytes() for file in files] == before
    with pytest.raises(ConfigError, match=r"begun with other settings \(people"):
        collect.main([*words, "--tie", "2"])
    monkeypatch.setattr(collect, "WAYS", collect.WAYS[:1])
    with pytest.raises(ConfigError, match=r"begun with other settings \(makers"):
        collect.main(words)
    prepare_pickapic.main(["--input", str(folder), "--output", str(tmp_path / "pairs")])
    assert (tmp_path / "pairs" / "manifest.json").exists()


def test_every_pair_has_pictures_and_noise_of_its_own():
    artists = [collect.Maker(name, collect.artist) for name in ("one", "another")]
    nobody, prompt = collect.People(sharpness=0.0, tie=0.0), "one large red circle on a white background"
    made = collect.Collection([prompt], artists, nobody, pairs=40, seed=0).rows(range(40))
    rows = [make() for make in made]
    assert len({row[side] for row in rows for side in ("jpg_0", "jpg_1")}) == 80
    assert 0.2 < share([row["label_0"] for row in rows], 1.0) < 0.8


@pytest.mark.parametrize("wrong", [["--pairs", "0"], ["--tie=-1"], ["--sharpness=-1"]])
def test_settings_without_meaning(tmp_path, wrong):
    with pytest.raises(ConfigError, match="want --pairs of at least 1, --sharpness and --tie of at least 0"):
        collect.main(["--output", str(tmp_path / "people"), *wrong])
    assert not (tmp_path / "people").exists()


def test_a_pipeline_named_twice_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="--pipelines a a: one is named twice"):
        collect.main(["--output", str(tmp_path / "people"), "--pipelines", "a", "a"])
    assert not (tmp_path / "people").exists()
