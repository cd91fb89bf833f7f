"""AI feedback: what a policy draws and a reward orders, in Pick-a-Pic's form."""

import copy
import io

import numpy as np
import pyarrow.parquet as parquet
import pytest
import torch
from PIL import Image

from experiments import prepare_feedback, prepare_pickapic
from experiments.cli.configured_policy import load_policy
from experiments.preparation import parts as preparation_parts
from lightning_modules.errors import ConfigError, UserError
from lightning_modules.shapes.reward import ShapesReward

PROMPTS = ["two large green triangles on a white background", "one small red circle on a black background"]


@pytest.fixture
def words(tmp_path):
    """A command that draws 5 pairs of 3 candidates each; ``words(batch_size=2)`` changes a setting."""
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))

    def make(output="out", **changes):
        settings = {"prompts": tmp_path / "prompts.txt", "output": tmp_path / output, "pairs": 5, "candidates": 3}
        settings |= {"sampler.steps": 2, "sampler.guidance_scale": 2, "batch_size": 3, "config": "dpo_tiny"} | changes
        return ["--reward=ShapesReward", *(f"--{name}={value}" for name, value in settings.items())]

    return make


def read(folder):
    return [row for path in sorted(folder.glob("*.parquet")) for row in parquet.read_table(path).to_pylist()]


def pixels(data):
    return torch.from_numpy(np.array(Image.open(io.BytesIO(data)))).permute(2, 0, 1).float() / 255


def test_the_better_picture_by_the_reward_is_the_preferred_one(tmp_path, words):
    prepare_feedback.main(words())
    rows = read(tmp_path / "out")
    assert [row["caption"] for row in rows] == [PROMPTS[n % 2] for n in range(5)]
    assert [row["num_example_per_prompt"] for row in rows] == [3, 2, 3, 2, 3]
    for row in rows:
        both = torch.stack([pixels(row["jpg_0"]), pixels(row["jpg_1"])])
        first, second = ShapesReward().score(both, [row["caption"]] * 2).tolist()
        assert (first > second) == (row["label_0"] == 1.0)
        assert row["label_0"] + row["label_1"] == 1.0


def test_a_pair_does_not_depend_on_its_batch_and_an_interrupted_command_goes_on(tmp_path, words, monkeypatch):
    prepare_feedback.main(words())
    monkeypatch.setattr(preparation_parts, "PART", 2)
    prepare_feedback.main(words("parts"))
    parts = sorted((tmp_path / "parts").glob("*.parquet"))
    assert len(parts) == 3
    untouched = parts[0].stat().st_mtime_ns
    parts[1].unlink()
    prepare_feedback.main(words("parts"))
    assert parts[0].stat().st_mtime_ns == untouched
    whole, resumed = read(tmp_path / "out"), read(tmp_path / "parts")
    assert [row["best_image_uid"] for row in whole] == [row["best_image_uid"] for row in resumed]
    for one, other in zip(whole, resumed):
        assert (pixels(one["jpg_0"]) - pixels(other["jpg_0"])).abs().max() <= 1 / 255


def test_workers_share_the_parts_and_change_nothing(tmp_path, words, monkeypatch):
    monkeypatch.setattr(preparation_parts, "PART", 2)
    for workers in (1, 2):
        prepare_feedback.main(words(f"of-{workers}", workers=workers))
    alone, shared = (sorted((tmp_path / f"of-{workers}").glob("*.parquet")) for workers in (1, 2))
    assert len(alone) == 3
    assert [part.read_bytes() for part in alone] == [part.read_bytes() for part in shared]
    shared[1].unlink()
    prepare_feedback.main(words("of-2", workers=2))  # a single part is left: no process is started
    assert shared[1].read_bytes() == alone[1].read_bytes()
    with pytest.raises(ConfigError, match="--workers must be at least 1, got 0"):
        prepare_feedback.main(words("none", workers=0))
    assert not (tmp_path / "none").exists()


def test_its_folder_becomes_shards(tmp_path, words):
    prepare_feedback.main(words())
    manifest = prepare_pickapic.main(["--input", str(tmp_path / "out"), "--output", str(tmp_path / "shards")])
    assert manifest.counts["rows_read"] == 5


def test_a_folder_of_other_settings_or_files_is_refused(tmp_path, words):
    prepare_feedback.main(words(pairs=1))
    with pytest.raises(ConfigError, match="was begun with other settings"):
        prepare_feedback.main(words(pairs=2))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("x")
    with pytest.raises(ConfigError, match="holds other files"):
        prepare_feedback.main(words("full"))


@pytest.mark.parametrize("bad", [{"pairs": 0}, {"candidates": 1}, {"batch_size": 0}])
def test_settings_without_meaning_are_refused(words, bad):
    with pytest.raises(ConfigError, match="want --pairs"):
        prepare_feedback.main(words(**bad))


def test_missing_weights_of_a_reward_are_one_line(words):
    with pytest.raises(ConfigError, match="^Pretrained weights: no folder '/nowhere'") as caught:
        prepare_feedback.main(["--reward=PickScore", "--reward.pretrained=/nowhere", *words()[1:]])
    assert "\n" not in str(caught.value)


def test_an_unknown_reward_names_the_known_ones(words):
    with pytest.raises(ConfigError, match="NoReward"):
        prepare_feedback.main(["--reward=NoReward", *words()[1:]])


class Strange(ShapesReward):
    """Gives chosen scores, whatever it sees."""

    values: list[float]

    def score(self, images, prompts):
        return torch.tensor(self.values * (len(images) // len(self.values)))


def strange(values):
    reward = Strange()
    reward.values = values
    return reward


@pytest.fixture
def judged_by(monkeypatch, words):
    """``prepare_feedback`` with another reward than the command line's."""

    def run(reward, *arguments, **changes):
        monkeypatch.setattr(prepare_feedback, "as_reward_model", lambda _: reward)
        prepare_feedback.main(words(*arguments, **changes))

    return run


def test_a_score_that_is_no_number_makes_no_pair(tmp_path, judged_by):
    with pytest.raises(UserError, match="reward shapes is nan for a picture of the policy .'two large green"):
        judged_by(strange([float("nan"), 1.0, 2.0]))
    assert not list((tmp_path / "out").glob("*.parquet"))


def test_equal_scores_make_a_tie_of_two_pictures(tmp_path, judged_by):
    judged_by(strange([1.0, 1.0, 1.0]))
    for row in read(tmp_path / "out"):
        assert row["label_0"] == 0.5
        assert row["jpg_0"] != row["jpg_1"]


def test_of_many_candidates_the_best_and_the_worst_are_paired(tmp_path, judged_by):
    """Candidate pictures are those of a run whose reward tells them apart by their number."""
    judged_by(strange([5.0, 3.0, 9.0, 1.0]), "pairs", candidates=4, pairs=1, batch_size=1)
    judged_by(strange([5.0, 1.0, 9.0, 3.0]), "other", candidates=4, pairs=1, batch_size=1)
    (pair,), (other,) = read(tmp_path / "pairs"), read(tmp_path / "other")
    first = 0 if pair["label_0"] == 1.0 else 1
    assert pair[f"jpg_{first}"] == other[f"jpg_{first}"]  # candidate 2 is the best of both
    assert pair[f"jpg_{1 - first}"] != other[f"jpg_{1 - first}"]  # candidates 3 and 1 are the worst


def test_pairs_of_another_judge_or_policy_are_not_taken_for_ours(tmp_path, words, monkeypatch, judged_by):
    judged_by(strange([1.0, 2.0, 3.0]), pairs=1)
    reward = strange([1.0, 2.0, 3.0])
    reward.register_buffer("weight", torch.ones(100))
    with pytest.raises(ConfigError, match="begun with other settings \\(reward's weights; its job.json"):
        judged_by(reward, pairs=1)
    policy = load_policy("dpo_tiny")
    changed = copy.deepcopy(policy)
    with torch.no_grad():
        next(changed.unet.parameters()).view(-1)[-1] += 1  # of a frozen tensor only a few numbers are usually read
    monkeypatch.setattr(prepare_feedback, "load_policy", lambda config: changed)
    with pytest.raises(ConfigError, match="begun with other settings \\(policy's weights; its job.json"):
        judged_by(strange([1.0, 2.0, 3.0]), pairs=1)


def test_a_part_that_was_cut_off_is_made_again(tmp_path, words, capsys):
    prepare_feedback.main(words(pairs=2))
    (part,) = (tmp_path / "out").glob("*.parquet")
    whole = part.read_bytes()
    part.write_bytes(whole[: len(whole) // 2])
    prepare_feedback.main(words(pairs=2))
    assert part.read_bytes() == whole
    assert "is damaged and made again" in capsys.readouterr().out


def test_what_a_killed_command_left_is_no_other_file(tmp_path, words):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".job.json-unfinished-00ab").write_text("{")
    prepare_feedback.main(words(pairs=1))
    assert len(read(tmp_path / "out")) == 1
