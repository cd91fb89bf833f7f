"""Comparisons of runs made by hand, whose numbers can be worked out on paper."""

import base64
import json
import math
import re
import subprocess
import sys

import pytest
from comparison_runs import BASE, cost, write_run
from PIL import Image

from callbacks.evaluation.statistics import clustered_wilson, wilson_interval
from experiments.compare import labelled, main
from experiments.comparison import figures
from experiments.comparison.figures import amount
from experiments.comparison.methods import Comparison
from experiments.comparison.page import quality, tables
from experiments.comparison.runs import Run
from lightning_modules.errors import ConfigError, DataError

CONFIG = """
seed_everything: {seed}
run_dir: {seed}
trainer:
  max_steps: 100
  default_root_dir: somewhere/{seed}
  callbacks:
  - class_path: callbacks.win_rate.WinRate
    init_args: {{every_n_steps: 50}}
model:
  class_path: lightning_modules.alignment.AlignmentModule
  init_args:
    objective:
      class_path: lightning_modules.objectives.{objective}
      init_args: {{beta: {beta}}}
"""


@pytest.fixture
def folders(tmp_path):
    """Two seeds of DPO, one of SPO, four pictures each."""

    def settings(seed, objective, beta):
        return CONFIG.format(seed=seed, objective=objective, beta=beta)

    write_run(tmp_path / "dpo0", [0.7, 0.7, 0.4, 0.6], costs=[cost(100)], config=settings(0, "dpo.DPO", 3000.0))
    two = [cost(50), cost(100)]
    write_run(tmp_path / "dpo1", [0.5, 0.9, 0.8, 0.6], costs=two, config=settings(1, "dpo.DPO", 3000.0))
    spo = [cost(50, sampling=32, seconds=3.0), cost(100, sampling=32, seconds=3.0)]
    write_run(tmp_path / "spo", [0.9, 0.9, 0.9, 0.9], costs=spo, config=settings(0, "spo.SPO", 10.0))
    return tmp_path


def words(folders):
    return [f"DPO={folders / 'dpo0'}", f"DPO={folders / 'dpo1'}", f"SPO={folders / 'spo'}"]


def read(folders):
    return Comparison.of([Run.read(*labelled(word), "test") for word in words(folders)], "test")


def test_seeds_of_a_method_by_hand(folders):
    dpo, _ = read(folders).methods
    # Prompt by prompt 0.7 and 0.5 in seed 0, 0.7 and 0.7 in seed 1. Averaged over the seeds: 0.7 and 0.6, whose
    # standard deviation 0.1 / sqrt(2) is divided by the root of 2 prompts.
    score = dpo.score("shapes")
    assert score.mean == pytest.approx(0.65)
    assert score.standard_error == pytest.approx(0.05)
    assert score.spread == pytest.approx(0.1 / math.sqrt(2))
    assert dpo.score("shapes/correctness").mean == pytest.approx(1.15)
    # Seed 0 wins 2 of 2 and 1 of 2, seed 1 wins 1.5 of 2 and 2 of 2: 3.5 of 4 and 3 of 4, that is 0.875 and 0.75. Half
    # of their difference squared is the variance of the rate, 0.0625^2; n = 0.8125 x 0.1875 / 0.0625^2 = 39; Student's
    # quantile with 1 degree is 12.7062.
    found = dpo.wins("shapes")
    assert found.rate == pytest.approx(0.8125)
    assert found.interval == pytest.approx(wilson_interval(0.8125, 39, 12.7062), abs=1e-5)
    assert found.spread == pytest.approx(0.125 / math.sqrt(2))  # of 0.75 and 0.875


def test_differences_by_hand(folders):
    to_base, other, between = read(folders).differences("shapes")
    # DPO's prompts 0.7 and 0.6 less 0.5: 0.2 and 0.1, mean 0.15, error 0.05.
    assert (to_base.first, to_base.second, to_base.rate) == ("DPO", "base", None)
    gain = to_base.scores["shapes"]
    assert (gain.mean, gain.standard_error) == (pytest.approx(0.15), pytest.approx(0.05))
    assert (gain.low, gain.high) == pytest.approx((0.15 - 12.7062 * 0.05, 0.15 + 12.7062 * 0.05), abs=1e-5)
    assert (other.first, other.second) == ("SPO", "base")
    assert other.scores["shapes/correctness"].mean == pytest.approx(0.4)
    # SPO has 0.9 everywhere and wins all: 0.2 and 0.3 more, and 1 - 0.875 and 1 - 0.75.
    assert (between.first, between.second) == ("SPO", "DPO")
    assert between.scores["shapes"].mean == pytest.approx(0.25)
    assert (between.rate.mean, between.rate.standard_error) == (pytest.approx(0.1875), pytest.approx(0.0625))


def test_one_seed_has_no_spread(folders):
    _, spo = read(folders).methods
    assert spo.score("shapes").spread is None
    assert spo.wins("shapes").spread is None
    assert spo.score("shapes").standard_error == pytest.approx(0, abs=1e-12)


def test_costs_by_hand(folders):
    comparison = read(folders)
    dpo, spo = comparison.methods
    # 100 steps of 4 pairs: 16 denoiser rows and 8 pictures a step. SPO draws 32 rows and 8 pictures a step more.
    assert dpo.cost("denoiser evaluations") == 1600
    assert dpo.cost("pictures") == 800
    assert spo.cost("denoiser evaluations") == 1600 + 3200
    assert spo.cost("pictures") == 800 + 800
    assert (dpo.cost("CPU seconds"), spo.cost("CPU seconds")) == (100, 300)
    # Between what was written, a straight line; it starts at nothing.
    assert comparison.runs[0].cost("denoiser evaluations", 25) == 400


def test_the_base_has_a_row_of_its_own(folders):
    grid = quality(read(folders), "shapes")
    assert grid.header == ["method", "reward", "sd", "correctness", "win rate [95%]", "sd"]
    assert grid.rows[0] == ["base", "0.500 ±0.000", "–", "1.000 ±0.000", "–", "–"]  # noqa: RUF001
    assert [row[0] for row in grid.rows] == ["base", "DPO (2 seeds)", "  seed 0", "  seed 1", "SPO"]
    assert grid.rows[1][1:4] == ["0.650 ±0.050", "0.071", "1.150 ±0.050"]
    assert grid.rows[1][4].startswith("81.2% [")
    assert grid.rows[1][5] == "8.8"
    assert grid.rows[2][4].startswith("75.0% [")


@pytest.fixture
def halfway(tmp_path):
    """Two seeds of a method, at step 50 at 0.7 and 0.9 on the first prompt and at the base's 0.5 on the second."""

    def write(former=False):
        found = []
        for seed, score in enumerate((0.7, 0.9)):
            folder = tmp_path / f"{former}{seed}"
            write_run(
                folder, [0.6] * 4, halfway=[score, score, 0.5, 0.5], costs=[cost(100)], former=former and seed == 1
            )
            found.append(Run.read("DPO", folder, "test"))
        return Comparison.of(found, "test")

    return write


def test_intervals_along_a_curve_by_hand(halfway):
    """The first prompt has gained 0.3 and won, the second nothing: 0.15 with a standard error of 0.15; 75% won."""
    (method,) = halfway().methods
    gain, rate = method.gain_at(50, "shapes"), method.rate_at(50, "shapes")
    quantile = 12.7062  # Student's with one degree of freedom
    assert (gain.mean, gain.low, gain.high) == pytest.approx((0.15, 0.15 - 0.15 * quantile, 0.15 + 0.15 * quantile))
    assert rate.rate == 0.75
    assert rate.interval == clustered_wilson([[1.0] * 4, [0.5] * 4])
    assert method.gain_at(100, "shapes").mean == pytest.approx(0.1)
    (former,) = halfway(former=True).methods
    assert (former.gain_at(50, "shapes"), former.rate_at(50, "shapes")) == (None, None)
    assert method.gain_at(70, "shapes") is None


def test_curves_have_them_as_whiskers(halfway, monkeypatch):
    drawn = []
    monkeypatch.setattr(figures, "_png", lambda figure: drawn.append(figure) or b"")
    comparison = halfway()
    for found in (comparison, halfway(former=True)):
        figures.curves(found, "shapes")
    (method,) = comparison.methods
    ends = [[bar.lines[2][0].get_segments()[0][:, 1] for bar in drawn[0].axes[row].containers] for row in (0, 3)]
    gain, rate = method.gain_at(50, "shapes"), method.rate_at(50, "shapes")
    assert [len(row) for row in ends] == [2, 2]  # steps 50 and 100
    assert ends[0][0] == pytest.approx([0.5 + gain.low, 0.5 + gain.high])
    assert ends[1][0] == pytest.approx([100 * end for end in rate.interval])
    assert [len(axes.containers) for axes in drawn[1].axes] == [0] * 6


def test_settings_that_differ(folders):
    settings = read(folders).differing_settings()
    assert settings == {
        "seed_everything": ["0, 1", "0"],
        "model.objective": ["DPO", "SPO"],
        "model.objective.beta": ["3000.0", "10.0"],
    }


def test_page_and_pictures(folders, capsys):
    output = folders / "out"
    main([*words(folders), "--output", str(output)])
    names = ["curves-shapes.png", "index.html", "results-shapes.png", "tables.md"]
    assert sorted(path.name for path in output.iterdir()) == names
    page = (output / "index.html").read_text()
    # Everything is inside: nothing is fetched when it is read.
    assert not re.search(r"https?://|<script|<link|url\(", page)
    embedded = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    assert [base64.b64decode(content) for content in embedded] == [
        (output / f"{name}-shapes.png").read_bytes() for name in ("curves", "results")
    ]
    assert page.count("<img") == len(embedded)
    for name in ("curves", "results"):
        with Image.open(output / f"{name}-shapes.png") as picture:
            assert picture.width > 800
            assert len(picture.convert("RGB").getcolors(1 << 20)) > 100
    for text in ("81.2% [", "0.650 ±0.050", "model.objective.beta"):
        assert text in page
    printed = capsys.readouterr().out
    for text in ("DPO", "SPO", "base", "4.8k", "index.html"):
        assert text in printed


def test_tables_in_markdown(folders):
    main([f"A|B={folders / 'dpo0'}", f"SPO={folders / 'spo'}", "--output", str(folders / "out")])
    text = (folders / "out" / "tables.md").read_text()
    lines = text.splitlines()
    assert lines[0] == "**shapes: 2 test prompts x 2 pictures per seed**"
    assert lines[2:4] == ["| method | reward | sd | correctness | win rate [95%] | sd |", "| --- " * 6 + "|"]
    assert lines[5].startswith("| A\\|B | 0.600 ±0.100 |")
    assert "| SPO - A\\|B | +0.300 [" in text
    assert lines[-1].endswith("what other seeds would have learned is in sd alone.")


def test_a_label_cannot_break_the_page(folders):
    main([f"<b>A</b>={folders / 'spo'}", "--output", str(folders / "out")])
    page = (folders / "out" / "index.html").read_text()
    assert "<b>A</b>" not in page
    assert "&lt;b&gt;A&lt;/b&gt;" in page


def test_validation_split_and_folder_names(folders, tmp_path):
    runs = [str(folders / "dpo0"), str(folders / "spo")]
    comparison = main([*runs, "--split", "val", "--output", str(tmp_path / "out")])
    assert [method.label for method in comparison.methods] == ["dpo0", "spo"]


def test_without_reference_or_cost_the_rest_is_shown(folders):
    write_run(folders / "sft", [0.6, 0.6, 0.6, 0.6], base=None)
    comparison = main([*words(folders), f"SFT={folders / 'sft'}", "--output", str(folders / "out")])
    quality, differences, costs = tables(comparison)
    assert quality.rows[-1] == ["SFT", "0.600 ±0.000", "–", "1.100 ±0.000", "–", "–"]  # noqa: RUF001
    assert costs.rows[-1] == ["SFT", "100", "–", "–", "–"]  # noqa: RUF001
    # Its scores are compared with all others; a win rate against the base it has none.
    assert [row[0] for row in differences.rows] == [
        "DPO - base", "SPO - base", "SFT - base", "SPO - DPO", "SFT - DPO", "SFT - SPO"
    ]  # fmt: skip
    assert differences.rows[-1][1].startswith("-0.300 [")
    assert differences.rows[-1][-1] == "–"  # noqa: RUF001


def test_runs_of_before_pictures_scores_were_kept_are_shown_without_uncertainty(folders, capsys):
    write_run(folders / "former", [0.6, 0.6, 0.4, 0.6], former=True)
    comparison = main([*words(folders), f"DPO={folders / 'former'}", "--output", str(folders / "out")])
    quality, differences, _ = tables(comparison)
    assert quality.rows[1][0] == "DPO (3 seeds)"
    assert quality.rows[1][1] == "0.617"  # the mean of 0.6, 0.7, 0.55
    assert quality.rows[1][4] == "79.2%"  # of 75%, 87.5% and 75%
    assert quality.rows[2][1] == "0.600 ±0.100"
    assert quality.rows[4][1:] == ["0.550", "", "1.050", "75.0%", ""]
    assert [row[0] for row in differences.rows] == ["SPO - base"]
    line = f"DPO: {folders / 'former'} was judged before the scores of every picture were kept"
    assert line in capsys.readouterr().out
    assert line in (folders / "out" / "index.html").read_text()


def test_former_runs_alone_have_no_differences(folders):
    write_run(folders / "former", [0.6, 0.6, 0.4, 0.6], former=True)
    comparison = main([str(folders / "former"), "--output", str(folders / "out")])
    assert len(tables(comparison)) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"protocol": {"prompts": "4567"}}, "judged differently on the test prompts: prompts is 0123 and 4567"),
        ({"protocol": {"sampler": {"steps": 30}}}, "judged differently on the test prompts: sampler is"),
        (
            {"protocol": {"images_per_prompt": 4}, "values": [0.6] * 8, "base": [0.5] * 8},
            "images_per_prompt is 2 and 4",
        ),
        ({"base": [0.9] * 4}, "start from different base models"),
        ({"split": "val"}, "has no evaluation on the test prompts; run `python -m experiments.run test`"),
    ],
    ids=["prompts", "sampler", "pictures", "base", "not-tested"],
)
def test_runs_that_cannot_be_compared_are_refused(folders, change, message):
    write_run(folders / "other", **{"values": [0.6] * 4, **change})
    with pytest.raises((ConfigError, DataError), match=re.escape(message)) as caught:
        main([*words(folders), str(folders / "other"), "--output", str(folders / "out")])
    assert "\n" not in str(caught.value)
    assert not (folders / "out").exists()


def test_other_mistakes_are_told(folders, tmp_path):
    with pytest.raises(DataError, match="nowhere does not exist"):
        main(["DPO=nowhere"])
    with pytest.raises(ConfigError, match="given twice"):
        main([f"A={folders / 'spo'}", f"B={folders / 'spo'}"])
    with pytest.raises(ConfigError, match="NAME=RUN wants a name and a folder"):
        main(["DPO="])
    with pytest.raises(DataError, match="cannot write .*; free some space or choose another folder"):
        main([str(folders / "spo"), "--output", str(folders / "spo" / "config.yaml")])
    (folders / "spo" / "win_rate.json").write_text("{")
    with pytest.raises(DataError, match="is not JSON"):
        main([str(folders / "spo")])


HISTORIES = [
    "",
    "{}",
    "null",
    "[1]",
    '[{"step": "a"}]',
    '[{"step": 1}]',
    '[{"step": 1, "split": "test"}]',
    "[" * 100_000,
]


@pytest.mark.parametrize("content", HISTORIES)
def test_a_history_of_something_else_is_one_line(folders, content):
    (folders / "spo" / "win_rate.json").write_text(content)
    with pytest.raises(DataError, match=r"win_rate.json(:| is| has)"):
        main([str(folders / "spo")])


@pytest.mark.parametrize(
    "damage",
    [
        lambda entry: entry["policy"]["shapes"].clear(),
        lambda entry: entry["policy"].update({"shapes": 3}),
        lambda entry: entry["policy"].pop("shapes"),
        lambda entry: entry["policy"]["shapes"].update({"mean": "0.5"}),
        lambda entry: entry["policy"]["shapes"].update({"mean": math.nan}),
        lambda entry: entry.update({"comparisons": {"shapes": {}}}),
        lambda entry: entry.update({"comparisons": None}),
        lambda entry: entry["protocol"].pop("number_of_prompts"),
        lambda entry: entry["protocol"].pop("rewards"),
        lambda entry: entry.update({"protocol": [1]}),
        lambda entry: entry.update({"scores": 3}),
        lambda entry: entry["scores"].pop("policy"),
        lambda entry: entry["scores"]["policy"].pop("shapes"),
        lambda entry: entry["scores"]["policy"]["shapes"].pop(),
        lambda entry: entry["scores"]["policy"]["shapes"][0].pop(),
        lambda entry: entry["scores"]["policy"]["shapes"].__setitem__(0, 3),
        lambda entry: entry["scores"]["policy"]["shapes"].__setitem__(0, ["a", "b"]),
        lambda entry: entry["scores"]["reference"]["shapes"][0].__setitem__(0, None),
        lambda entry: entry["scores"]["reference"]["shapes"][0].__setitem__(0, math.inf),
    ],
)
@pytest.mark.parametrize("number", [0, -1], ids=["curve", "result"])
def test_results_that_are_damaged_are_one_line(folders, damage, number):
    path = folders / "spo" / "win_rate.json"
    entries = json.loads(path.read_text())
    damage(entries[number])
    path.write_text(json.dumps(entries))
    with pytest.raises(DataError, match=r"the results of step \d+ are damaged; evaluate the run again"):
        main([str(folders / "spo"), "--output", str(folders / "out")])


def bomb(depth):
    lines = ["a0: &a0 [1, 2, 3, 4, 5, 6, 7, 8, {b: 1}]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}, {{b: 1}}]" for n in range(1, depth)]
    return "\n".join(lines)


@pytest.mark.parametrize("content", ["!!python/object/apply:os.system [ls]", "a: !x b", "[1, 2]", "a: [", bomb(20)])
def test_settings_that_are_none_are_one_line(folders, content):
    (folders / "spo" / "config.yaml").write_text(content)
    with pytest.raises(DataError, match="config.yaml(:| holds)"):
        main([str(folders / "spo")])


def test_evaluations_of_unknown_protocol_are_refused(folders):
    path = folders / "spo" / "win_rate.json"
    path.write_text(json.dumps([entry | {"protocol": {}} for entry in json.loads(path.read_text())]))
    with pytest.raises(DataError, match="does not say how it was judged"):
        main([str(folders / "spo")])


def test_the_shell_gets_one_line_and_status_2(tmp_path):
    command = [sys.executable, "-m", "experiments.compare", str(tmp_path / "nothing")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 2
    assert result.stderr.startswith("error: run folder")
    assert result.stderr.count("\n") == 1


def test_amounts_in_three_digits():
    assert [amount(value) for value in (0, 950, 12345, 4560000, 2e9)] == ["0", "950", "12.3k", "4.56M", "2G"]


def test_base_is_what_the_runs_were_judged_against(folders):
    assert read(folders).base("shapes").mean == pytest.approx(sum(BASE) / 4)
