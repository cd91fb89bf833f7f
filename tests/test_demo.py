"""The demo's roads at their smallest: pairs or pools, training, judging, resuming, comparing."""

import json
import shlex

import pytest
import yaml

from experiments import demo, run
from lightning_modules.errors import ConfigError

SMALL = """
trainer:
  max_steps: 2
  enable_progress_bar: false
  callbacks:
    - class_path: WinRate
      init_args:
        prompts: [one large red circle on a white background]
        test_prompts: [one large red circle on a gray background, two small blue squares on a white background]
        rewards: [{class_path: ShapesReward}]
        every_n_steps: 2
        images_per_prompt: 2
        sampler: {class_path: Sampler, init_args: {steps: 2, guidance_scale: 2.0}}
    - class_path: Cost
    - class_path: ExportPolicy
data:
  init_args:
    batch_size: 4
"""
SMALL_POOLS = """
data:
  init_args:
    prompts_per_pool: 2
    prompts_per_batch: 2
    sampler: {steps: 4, candidates: 2, branch_from_step: 1, threshold: 0.0}
"""


@pytest.fixture
def small(tmp_path):
    (tmp_path / "small.yaml").write_text(SMALL)
    (tmp_path / "pools.yaml").write_text(SMALL_POOLS)
    return [
        "--data",
        str(tmp_path / "data"),
        "--runs",
        str(tmp_path / "runs"),
        "--config",
        str(tmp_path / "small.yaml"),
    ]


def commands(capsys):
    return [line for line in capsys.readouterr().out.splitlines() if line.startswith("$ python -m experiments.")]


def last_judged(run):
    entry = json.loads((run / "win_rate.json").read_text())[-1]
    return entry["split"], entry["step"], entry["comparisons"]["shapes"]["n"]


def names(capsys):
    return [line.split()[3].removeprefix("experiments.") for line in commands(capsys)]


def test_dpo_draws_trains_judges_and_goes_on_where_it_stopped_and_kto_takes_the_same_pictures(tmp_path, capsys, small):
    words = ["--methods", "dpo", "--seeds", "1", "--pairs", "8", *small]
    demo.main(words)
    run = tmp_path / "runs" / "demo-dpo-seed1"
    assert last_judged(run) == ("test", 2, 4)
    assert (run / "export").is_dir()
    assert names(capsys) == ["prepare_feedback", "prepare_pickapic", "run", "run"]
    demo.main(words)
    assert names(capsys) == ["run", "run"]
    demo.main(["--methods", "dpo", "kto", "--seeds", "1", *small])  # one by one, and nothing is drawn again
    assert last_judged(tmp_path / "runs" / "demo-kto-seed1") == ("test", 2, 4)
    assert names(capsys) == ["prepare_pictures", "run", "run", "run", "run", "compare"]
    demo.main(["--methods", "dpo_shuffled", "--seeds", "1", *small])  # as many pairs, ordered by a coin of that seed
    assert names(capsys) == ["relabel", "run", "run"]
    pairs, shuffled = (
        json.loads((tmp_path / "data" / "shapes" / name / "manifest.json").read_text())
        for name in ("feedback-pairs", "feedback-shuffled-seed1")
    )
    assert pairs["counts"]["pairs"] == shuffled["counts"]["pairs"] == 8
    assert (shuffled["settings"]["reward"]["name"], shuffled["settings"]["reward"]["seed"]) == ("random", 1)
    assert pairs["shards"][0]["digest"] != shuffled["shards"][0]["digest"]
    taught = yaml.safe_load((tmp_path / "runs" / "demo-dpo_shuffled-seed1" / "config.yaml").read_text())["data"]
    assert taught["init_args"]["shards"].endswith("feedback-shuffled-seed1")


def test_spo_and_its_control_learn_from_pools_and_are_compared(tmp_path, capsys, small):
    demo.main(["--methods", "spo", "shuffled", *small, "--config", str(tmp_path / "pools.yaml")])
    folders = ["demo-spo-seed42", "demo-shuffled-seed42"]
    assert [last_judged(tmp_path / "runs" / name) for name in folders] == [("test", 2, 4)] * 2
    assert len(commands(capsys)) == 5
    assert (tmp_path / "runs" / "demo-comparison" / "index.html").is_file()
    costs = [json.loads((tmp_path / "runs" / name / "cost.json").read_text())[-1] for name in folders]
    assert costs[0]["drawn_pictures"] == costs[1]["drawn_pictures"] > 0  # the control judges too


def test_a_seed_among_the_settings_is_refused(small):
    with pytest.raises(ConfigError, match="the command line gives --seed_everything, which this command sets itself"):
        demo.main([*small, "--seed_everything=9"])


def test_further_settings_have_the_last_word(monkeypatch, small):
    monkeypatch.setattr(demo, "_pictures", lambda *_: ["--data.shards=drawn"])
    trials = []
    monkeypatch.setattr(demo, "train_and_compare", lambda given, _: trials.extend(given))
    demo.main(["--methods", "dpo", *small[:4], "--data.shards=mine"])
    assert trials[0].words[-1] == "--data.shards=mine"


def test_runs_that_start_from_other_bases_are_refused_before_anything_is_drawn(tmp_path, small):
    with pytest.raises(ConfigError, match="--methods: dpo_flow, spo_flow start from the base as a flow"):
        demo.main(["--methods", "dpo_flow", "dpo", "spo_flow", *small])
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("method", demo.METHODS)
def test_every_methods_settings_are_a_config(method, capsys):
    with pytest.raises(SystemExit) as ended:
        run.main([*shlex.split(demo.METHODS[method]), "--print_config"])
    assert ended.value.code in (0, None)
    objective = yaml.safe_load(capsys.readouterr().out)["model"]["init_args"]["objective"]["class_path"]
    others = {**dict.fromkeys(("shuffled", "d3po", "lpo", "spo_exact"), "SPO"), "sdpo": "Safeguard"}
    method = method if method == "shuffled" else method.removesuffix("_shuffled")
    expected = others.get(method, method.removesuffix("_flow").replace("_", ""))
    assert objective.split(".")[-1].lower() == expected.lower()
