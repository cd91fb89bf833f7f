"""AI feedback on people's pairs: the paper's order of operations, and nothing lost, doubled or changed on the way."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from pairs_data import picture, write_shards

from datamodules.preference_pairs import PreferencePairsDataModule
from datamodules.shards.locate import open_shards
from datamodules.shards.manifest import LatentsKey, Manifest
from datamodules.shards.samples import pixel_members
from datamodules.shards.writer import write_shard
from experiments import relabel
from experiments.relabelling.agreement import Agrees, Judged, accuracy, agreement, by_gap
from lightning_modules.errors import ConfigError, DataError, UserError

TESTS = Path(__file__).parent
BROKEN_AT: list[str] = []  # captions whose pictures redness gives no number
SCORED: list[str] = []


def redness(images, prompts):
    """The level of red, exactly; pictures of pairs_data have one."""
    SCORED.extend(prompts)
    broken = torch.tensor([prompt in BROKEN_AT for prompt in prompts])
    return torch.where(broken, torch.nan, images[:, 0, 0, 0] * 255)


def slow_redness(images, prompts):
    time.sleep(0.2)
    return images[:, 0, 0, 0] * 255


@pytest.fixture(autouse=True)
def forgotten():
    BROKEN_AT.clear()
    SCORED.clear()


PAIRS = [
    # the reds of chosen and rejected, and people's label
    [(10, 200, 1.0), (200, 10, 1.0), (50, 90, 0.5), (70, 70, 1.0)],
    [(30, 33, 1.0), (33, 30, None)],
    [(1, 2, 0.5)],
    [(100, 120, 1.0), (0, 255, 1.0), (255, 0, 1.0)],
]


def write(folder, pairs=PAIRS):
    """Shards of pairs; the rejected picture is wider."""
    folder.mkdir()
    infos, n = [], 0
    for number, shard in enumerate(pairs):
        samples = []
        for chosen, rejected, label in shard:
            info = {"caption": f"caption {n}", "row": n, "chosen_size": [16, 16], "rejected_size": [16, 24],
                    "chosen_uid": f"c{n}", "num_example_per_prompt": 3}  # fmt: skip
            members = pixel_members(picture(chosen), picture(rejected, (24, 16)),
                                    info if label is None else info | {"label": label})  # fmt: skip
            samples.append((n, members))
            n += 1
        infos.append(write_shard(folder / f"{number:05d}.tar", samples))
    Manifest("pixels", tuple(infos), {"pairs": n, "ties_kept": 2}).write(folder)
    return folder


def run(source, output, *more, reward="test_relabel.redness"):
    return relabel.main(["--shards", str(source), "--output", str(output), "--reward", reward, *more])


def read(folder):
    """Every pair that is left: its record, and the red of its chosen and rejected pictures."""
    shards, found = open_shards(str(folder)), []
    for number, size in enumerate(shards.sizes):
        for row in range(size):
            sample = shards.read(number, row)
            reds = [np.asarray(sample.image(role))[0, 0, 0].item() for role in ("chosen", "rejected")]
            found.append((sample.info(), *reds))
    return found


def files(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_the_higher_score_is_chosen_and_equal_scores_keep_the_order(tmp_path):
    manifest = run(write(tmp_path / "in"), tmp_path / "out")
    pairs = read(tmp_path / "out")
    assert [(info["row"], chosen, rejected) for info, chosen, rejected in pairs] == [
        (0, 200, 10), (1, 200, 10), (3, 70, 70), (4, 33, 30), (5, 33, 30), (7, 120, 100), (8, 255, 0), (9, 255, 0),
    ]  # fmt: skip
    assert [info["human_label"] for info, _, _ in pairs] == [0.0, 1.0, 1.0, 0.0, 1.0, 0.0, 0.0, 1.0]
    assert {info["label"] for info, _, _ in pairs} == {1.0}
    assert manifest.counts == {
        "rows_read": 10,
        "pairs": 8,
        "flipped": 4,
        "equal_scores": 1,
        "ties_dropped": 2,
        "below_margin_dropped": 0,
        "corrupt_dropped": 0,
    }
    captions = json.loads((tmp_path / "out" / "captions.json").read_text())
    assert captions == [f"caption {n}" for n in (0, 1, 3, 4, 5, 7, 8, 9)]
    assert sorted(files(tmp_path / "out")) == ["00000.tar", "00001.tar", "00003.tar", "captions.json", "manifest.json"]


@pytest.mark.parametrize(("strategy", "aesthetic"), [(1, 0.0), (2, -0.5), (3, -1.0)])
def test_rewards_that_have_to_agree_keep_the_pairs_of_lpos_filter(golden, strategy, aesthetic):
    known = golden("lrm_data")
    rules = {"aesthetic": Agrees(aesthetic, 0.2), "clipscore": Agrees(0.0, 0.03), "vqascore": Agrees(0.0, 0.07)}
    labels = [1.0 if clear else 0.5 for clear in known["different_flag"].tolist()]
    gaps = {name: known[f"{name}_gap"].tolist() for name in rules}
    found = [all(rules[name].keeps(label, gaps[name][n]) for name in rules) for n, label in enumerate(labels)]
    assert found == known[f"strategy{strategy}.keep"].tolist()
    assert any(found)


def test_with_agree_the_order_stays_and_what_the_reward_contradicts_is_dropped(tmp_path):
    """Clear pairs with a gap of more than 2, ties with one of less than 0."""
    manifest = run(write(tmp_path / "in"), tmp_path / "out", "--agree", "2", "0")
    pairs = read(tmp_path / "out")
    assert [(info["row"], chosen, rejected) for info, chosen, rejected in pairs] == [
        (1, 200, 10), (2, 50, 90), (5, 33, 30), (6, 1, 2), (9, 255, 0),
    ]  # fmt: skip
    assert [info.get("label") for info, _, _ in pairs] == [1.0, 0.5, None, 0.5, 1.0]
    assert (pairs[0][0]["chosen_redness"], pairs[0][0]["rejected_redness"]) == (200.0, 10.0)
    assert pairs[0][0]["chosen_uid"] == "c1"
    assert (manifest.counts["pairs"], manifest.counts["disagreeing_dropped"], manifest.counts["ties_dropped"]) == (
        5,
        5,
        0,
    )
    # The next reward, here the same one, goes on with what is left; below a negative number, too.
    run(tmp_path / "out", tmp_path / "twice", "--agree", "3", "-2")
    assert [info["row"] for info, _, _ in read(tmp_path / "twice")] == [1, 2, 9]
    with pytest.raises(ConfigError, match="another"):
        run(tmp_path / "in", tmp_path / "out", "--agree", "1", "0")
    with pytest.raises(ConfigError, match="--agree takes two numbers and no --margin"):
        run(tmp_path / "in", tmp_path / "more", "--agree", "1", "0", "--margin", "1")


def test_what_is_said_of_a_picture_changes_sides_with_it_and_its_bytes_do_not_change(tmp_path):
    run(write(tmp_path / "in", [[(10, 200, 1.0), (200, 10, 1.0)]]), tmp_path / "out")
    (flipped, _, _), (kept, _, _) = read(tmp_path / "out")
    assert flipped == {
        "caption": "caption 0", "row": 0, "num_example_per_prompt": 3, "label": 1.0, "human_label": 0.0,
        "reward": "redness", "chosen_size": [16, 24], "rejected_size": [16, 16], "rejected_uid": "c0",
        "chosen_score": 200.0, "rejected_score": 10.0,
    }  # fmt: skip
    assert kept == {
        "caption": "caption 1", "row": 1, "num_example_per_prompt": 3, "label": 1.0, "human_label": 1.0,
        "reward": "redness", "chosen_size": [16, 16], "rejected_size": [16, 24], "chosen_uid": "c1",
        "chosen_score": 200.0, "rejected_score": 10.0,
    }  # fmt: skip
    before, after = open_shards(str(tmp_path / "in")), open_shards(str(tmp_path / "out"))
    assert after.read(0, 0).picture("chosen") == before.read(0, 0).picture("rejected")
    assert after.read(0, 1).picture("chosen") == before.read(0, 1).picture("chosen")


def test_peoples_ties_go_before_anything_is_scored(tmp_path):
    run(write(tmp_path / "in"), tmp_path / "out")
    assert set(SCORED) == {f"caption {n}" for n in (0, 1, 3, 4, 5, 7, 8, 9)}


def test_pairs_closer_than_the_margin_are_dropped(tmp_path):
    manifest = run(write(tmp_path / "in"), tmp_path / "out", "--margin=20")
    assert [info["row"] for info, _, _ in read(tmp_path / "out")] == [0, 1, 7, 8, 9]  # 20 itself is enough
    assert manifest.counts["below_margin_dropped"] == 3
    assert manifest.counts["pairs"] == 5


def test_pairs_are_scored_as_they_are_stored(tmp_path, monkeypatch):
    seen = []

    def score(self, images, prompts):
        seen.extend((tuple(image.shape), image.min().item(), image.max().item()) for image in images)
        return images[:, 0, 0, 0]

    monkeypatch.setattr("lightning_modules.rewards.function.FunctionReward.score", score)
    run(write(tmp_path / "in", [[(10, 200, 1.0)]]), tmp_path / "out")
    assert seen == [((3, 16, 16), 0.0, 1.0), ((3, 16, 24), 0.0, 1.0)]


def test_a_second_reward_keeps_what_people_said(tmp_path):
    run(write(tmp_path / "in"), tmp_path / "once")
    assert run(tmp_path / "once", tmp_path / "twice").counts["flipped"] == 0
    assert [info["human_label"] for info, _, _ in read(tmp_path / "twice")] == [
        info["human_label"] for info, _, _ in read(tmp_path / "once")
    ]


def test_training_reads_the_new_order(tmp_path):
    run(write(tmp_path / "in"), tmp_path / "out")
    data = PreferencePairsDataModule(str(tmp_path / "out"), batch_size=8, resolution=16, horizontal_flip=False)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    reds = torch.stack([batch.chosen[:, 0, 0, 0], batch.rejected[:, 0, 0, 0]])
    assert len(batch.prompts) == 8
    assert (reds[0] >= reds[1]).all()


def test_damaged_pairs_are_dropped_counted_and_named(tmp_path):
    source = write(tmp_path / "in", [[(10, 200, 1.0), (200, 10, 1.0)]])
    members = pixel_members(picture(10), picture(20), {"caption": "whole"})
    members["chosen.png"] = members["chosen.png"][:40]
    info = write_shard(source / "00001.tar", [(7, members)])
    manifest = Manifest.read(source / "manifest.json")
    replace(manifest, shards=(*manifest.shards, info)).write(source)
    result = run(source, tmp_path / "out")
    assert (result.counts["corrupt_dropped"], result.counts["pairs"]) == (1, 2)
    assert len(result.corrupt) == 1
    assert result.corrupt[0].startswith("00001.tar, sample 000000007: chosen: a damaged picture")


# Interrupted


def test_an_interrupted_command_goes_on_and_gives_the_same_bytes(tmp_path):
    source = write(tmp_path / "in")
    run(source, tmp_path / "whole", "--batch_size=1")
    BROKEN_AT.append("caption 7")
    with pytest.raises(
        UserError, match="reward redness gave nan to the chosen picture of .*00003.tar, sample 000000007"
    ):
        run(source, tmp_path / "broken", "--batch_size=1")
    assert not (tmp_path / "broken" / "manifest.json").exists()
    BROKEN_AT.clear()
    SCORED.clear()
    run(source, tmp_path / "broken", "--batch_size=1")
    assert set(SCORED) == {"caption 7", "caption 8", "caption 9"}
    assert files(tmp_path / "broken") == files(tmp_path / "whole")


def test_killed_in_the_middle(tmp_path):
    source = write(tmp_path / "in")
    words = ["--shards", str(source), "--reward", "test_relabel.slow_redness", "--batch_size=1"]
    command = [sys.executable, "-m", "experiments.relabel", *words, "--output", str(tmp_path / "killed")]
    paths = os.pathsep.join([str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": paths}, stderr=subprocess.PIPE, text=True)
    marker = tmp_path / "killed" / ".units" / "00000.json"
    until = time.monotonic() + 120
    while not marker.exists() and process.poll() is None and time.monotonic() < until:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert marker.exists()
    assert not (tmp_path / "killed" / "manifest.json").exists()
    for folder in ("killed", "whole"):
        relabel.main([*words, "--output", str(tmp_path / folder)])
    assert files(tmp_path / "killed") == files(tmp_path / "whole")


def test_two_processes_give_the_same_bytes(tmp_path):
    source = write(tmp_path / "in")
    run(source, tmp_path / "one")
    run(source, tmp_path / "two", "--workers=2")
    assert files(tmp_path / "two") == files(tmp_path / "one")


def test_a_shard_that_was_cut_since_is_made_again(tmp_path):
    source = write(tmp_path / "in")
    run(source, tmp_path / "whole")
    BROKEN_AT.append("caption 7")
    with pytest.raises(UserError):
        run(source, tmp_path / "out")
    BROKEN_AT.clear()
    with (tmp_path / "out" / "00000.tar").open("r+b") as file:
        file.truncate(1000)
    run(source, tmp_path / "out")
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_a_complete_folder_is_left_as_it_is(tmp_path):
    source = write(tmp_path / "in")
    first = run(source, tmp_path / "out")
    SCORED.clear()
    assert run(source, tmp_path / "out") == first
    assert SCORED == []


# Refused


@pytest.mark.parametrize("more", [["--margin=3"], ["--batch_size=2"]])
def test_another_job_in_the_same_folder_is_refused(tmp_path, more):
    source = write(tmp_path / "in")
    run(source, tmp_path / "out")
    with pytest.raises(ConfigError, match="was prepared with"):
        run(source, tmp_path / "out", *more)
    with pytest.raises(ConfigError, match="was prepared with reward"):
        run(source, tmp_path / "out", reward="test_relabel.slow_redness")


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--margin=-1"], "margin of 0 or more"),
        (["--margin=.inf"], "margin of 0 or more"),
        (["--batch_size=0"], "batch_size of 1 or more"),
        (["--workers=0"], "--workers must be at least 1, got 0"),
    ],
)
def test_settings_without_meaning_are_refused(tmp_path, more, told):
    with pytest.raises(ConfigError, match=told):
        run(write(tmp_path / "in"), tmp_path / "out", *more)
    assert not (tmp_path / "out").exists()


def test_shards_without_pictures_are_refused(tmp_path):
    folder = write_shards(tmp_path / "in", [1])
    key = LatentsKey("0", 16, "centre", "float16")
    replace(Manifest.read(folder / "manifest.json"), kind="latents", latents=key).write(folder)
    with pytest.raises(ConfigError, match="holds latents, and a reward judges pictures"):
        run(folder, tmp_path / "out")
    with pytest.raises(DataError, match="nowhere"):
        run(tmp_path / "nowhere", tmp_path / "out")


def test_a_margin_that_leaves_nothing_is_one_clear_line_and_can_be_mended(tmp_path):
    source = write(tmp_path / "in", [[(10, 200, 1.0), (5, 6, 0.5)]])
    with pytest.raises(
        DataError, match=r"no pair of \S+ is left \(pairs read 2, people's ties dropped 1, pairs closer "
    ):
        run(source, tmp_path / "out", "--margin=300")
    assert run(source, tmp_path / "out", "--margin=100").counts["pairs"] == 1


# Agreement


def test_pickscores_accuracy_rule_is_the_published_one():
    known = json.loads((TESTS / "golden" / "reward_agreement.json").read_text())
    pairs = [Judged(label, *scores) for label, scores in zip(known["label_0"], known["scores"])]
    assert len(known["thresholds"]) == 6
    for threshold, expected in zip(known["thresholds"], known["accuracy"]):
        assert accuracy(pairs, threshold) == pytest.approx(expected, abs=1e-12)
    words = {"0": 1.0, "1": 0.0, "tie": 0.5}
    for pair, prediction in zip(pairs, known["predictions_at_0.1"]):
        assert accuracy([replace(pair, label=words[prediction])], 0.1) == 1


def test_agreement_by_hand():
    pairs = [Judged(1.0, 3.0, 1.0), Judged(0.0, 3.0, 2.5), Judged(1.0, 2.0, 2.0), Judged(0.0, 0.0, 9.0)]
    assert agreement(pairs) == (1 + 0 + 0.5 + 1) / 4
    groups = by_gap(pairs, 2)
    assert [(group.low, group.high, group.pairs, group.agreement) for group in groups] == [
        (0.0, 0.5, 2, 0.25), (2.0, 9.0, 2, 1.0),
    ]  # fmt: skip
    assert [group.pairs for group in by_gap(pairs[:3], 4)] == [1, 1, 1]


def test_it_tells_how_the_reward_agrees_with_people(tmp_path, capsys):
    manifest = run(write(tmp_path / "in"), tmp_path / "out", "--margin=20")
    told = capsys.readouterr().out
    # Of the 8 that were scored: 3 agree, 4 do not, 1 has equal scores.
    assert manifest.statistics["agreement"] == 3.5 / 8
    assert "43.8%" in told
    assert "people's ties dropped" in told
    assert "0 to 3" in told
