"""An ablation is a YAML of variants; each is trained and judged with every seed, and all are compared."""

import shlex

import pytest
import yaml

from experiments import ablate, compare, run
from experiments.cli import compose
from lightning_modules.errors import ConfigError
from lightning_modules.sampling.step_sampler import StepSampler


@pytest.fixture
def called(monkeypatch):
    """What the commands are called with, in place of what they do."""
    found = []
    for name, module in (("run", run), ("compare", compare)):
        monkeypatch.setattr(module, "main", lambda argv, name=name: found.append((name, *argv)))
    return found


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(
        "every: --config spo_tiny\nvariants: {SPO: '', Two of them: '--data.sampler.candidates=2 --a=\"b c\"'}"
    )
    return path


def test_each_variant_is_trained_and_judged_with_every_seed_and_all_are_compared(file, tmp_path, called):
    ablate.main([str(file), "--seeds", "3", "4", "--runs", str(tmp_path / "runs"), "--trainer.max_steps=2"])
    of = {"spo": (), "two-of-them": ("--data.sampler.candidates=2", "--a=b c")}
    folders = {name: [str(tmp_path / "runs" / f"ablation-mine-{name}-seed{n}") for n in (3, 4)] for name in of}
    expected = []
    for name, own in of.items():
        for seed, folder in zip((3, 4), folders[name]):
            words = (
                "--config",
                "spo_tiny",
                *own,
                f"--seed_everything={seed}",
                "--trainer.max_steps=2",
                "--run_dir",
                folder,
            )
            expected += [("run", *words, "--ckpt_path", "auto"), ("run", "test", *words, "--ckpt_path", "last")]
    labelled = [f"SPO={folder}" for folder in folders["spo"]]
    labelled += [f"Two of them={folder}" for folder in folders["two-of-them"]]
    assert called == [*expected, ("compare", *labelled, "--output", str(tmp_path / "runs" / "ablation-mine"))]


def test_a_seed_may_have_data_of_its_own(tmp_path, called):
    (tmp_path / "own.yaml").write_text("variants: {mine: '--config dpo_tiny --data.shards=pairs-{seed}'}")
    ablate.main([str(tmp_path / "own.yaml"), "--seeds", "3", "4", "--runs", str(tmp_path / "runs")])
    trained = [words for name, *words in called if name == "run" and words[0] != "test"]
    assert [words[2:4] for words in trained] == [
        ["--data.shards=pairs-3", "--seed_everything=3"],
        ["--data.shards=pairs-4", "--seed_everything=4"],
    ]


def test_printed_commands_are_those_that_would_run(file, tmp_path, called, capsys):
    words = [str(file), "--seeds", "3", "--only", "Two of them", "--runs", str(tmp_path)]
    ablate.main([*words, "--print"])
    assert called == []
    (line,) = capsys.readouterr().out.splitlines()
    trained, judged = (shlex.split(command) for command in line.split(" && "))
    ablate.main(words)  # one run alone is compared with nothing
    assert called == [("run", *trained[3:]), ("run", *judged[3:])]
    assert trained[:3] == judged[:3] == ["python", "-m", "experiments.run"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1]", "wants 'every' .* and 'variants' .*, no others"),
        ("variants: {a: ''}\nseeds: 3", "wants 'every' .* and 'variants' .*, no others"),
        ("every: x", "'variants' must name at least one"),
        ("variants: []", "'variants' must name at least one"),
        ("variants: {a: 3}", "'a' must be a text of words for experiments.run, got 3"),
        ('variants: {a: "\'"}', "'a' cannot be split into words"),
        ("variants: {'-': ''}", "a variant's name is a text with a letter and without '=', got '-'"),
        ("variants: {a=b: ''}", "a variant's name is a text with a letter and without '=', got 'a=b'"),
        ("variants: {A: '', a: ''}", "two variants would share a run folder"),
        ("variants: {a: --run_dir=x}", "'a' gives --run_dir, which this command sets itself"),
        ("every: --seed_everything 3\nvariants: {a: ''}", "'every' gives --seed_everything, which this command sets"),
        ("a: [", "cannot be read as YAML"),
    ],
)
def test_a_file_that_says_something_else_is_refused_in_one_line(tmp_path, called, text, message):
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(ConfigError, match=f"ablation .*bad.yaml: {message}") as error:
        ablate.main([str(tmp_path / "bad.yaml")])
    assert "\n" not in str(error.value)
    assert called == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["spo_tny"], r"ablation 'spo_tny' \(did you mean 'spo_tiny'\?\): no file, and none of fair_tiny, spo_tiny"),
        (
            ["spo_tiny", "--seed_everything=9"],
            "the command line gives --seed_everything, which this command sets itself",
        ),
        (["spo_tiny", "--run_dir", "x"], "the command line gives --run_dir, which this command sets itself"),
        (["spo_tiny", "--only", "SPo"], r"--only 'SPo' \(did you mean 'SPO'\?\): spo_tiny has SPO, "),
    ],
)
def test_words_that_cannot_be_meant_are_refused_before_anything_runs(called, words, message):
    with pytest.raises(ConfigError, match=message):
        ablate.main(words)
    assert called == []


def test_the_packaged_variants_are_fourteen_different_experiments(capsys):
    """The sampler's settings are held against its class alone, which spares a parser each; others are parsed."""
    variants = ablate.read_ablation("spo_tiny")[1]
    every = variants["SPO"]
    base = compose.load(compose.find_config("spo_tiny"))["data"]["init_args"]["sampler"]
    base = {name: value for name, value in base.items() if not str(value).startswith("$")}
    found = []
    for words in variants.values():
        assert words[: len(every)] == every
        if all(word.startswith("--data.sampler.") for word in words[len(every) :]):
            changed = dict(
                word.removeprefix("--data.sampler.").split("=") for word in words if word.startswith("--data.sampler.")
            )
            found.append(StepSampler(**base | {name: yaml.safe_load(value) for name, value in changed.items()}))
            continue
        with pytest.raises(SystemExit) as ended:
            run.main([*words, "--print_config"])
        assert ended.value.code in (0, None)
        data = yaml.safe_load(capsys.readouterr().out)["data"]["init_args"]
        found.append((data["scorer"], data["sampler"], data["decoder"]))
    assert len(found) == 14
    assert all(one != other for n, one in enumerate(found) for other in found[:n])
    assert {sampler.continuation for sampler in found if isinstance(sampler, StepSampler)} == {
        "random",
        "best",
        "worst",
    }


def test_in_the_fair_comparison_a_control_differs_from_its_method_in_labels_alone(capsys):
    found = {}
    for label, words in ablate.read_ablation("fair_tiny")[1].items():
        with pytest.raises(SystemExit) as ended:
            run.main([*(word.replace("{seed}", "3") for word in words), "--print_config"])
        assert ended.value.code in (0, None)
        found[label] = yaml.safe_load(capsys.readouterr().out)
        del found[label]["run_dir"]  # which every trial gets anew
    trials = list(found.values())
    on_pairs, on_pools = trials[:-6], trials[-6:]
    pairs = "data/shapes/people-pairs", "data/shapes/people-2-pairs"
    for method, control in zip(on_pairs[::2], on_pairs[1::2], strict=True):
        assert method["data"]["init_args"].pop("shards") == list(pairs)
        assert control["data"]["init_args"].pop("shards") == [f"{shards}-coin3" for shards in pairs]
        assert method == control
    for own, shuffled, learned in zip(on_pools[::2], on_pools[1::2], ("spm", "spm", "lrm"), strict=True):
        judge, dealt = (run["data"]["init_args"].pop("scorer") for run in (own, shuffled))
        assert dealt["init_args"]["scorer"] == judge
        assert judge["init_args"]["model"]["init_args"]["pretrained"] == f"runs/people_{learned}/export/preference"
        assert own == shuffled
    without, inner, latent = (run["data"]["init_args"]["sampler"] for run in on_pools[::2])
    assert inner == without | {"num_inner_step": 3, "threshold": 0.1}
    assert latent["num_inner_step"] == 3
    assert on_pools[0]["model"] == on_pools[4]["model"]
