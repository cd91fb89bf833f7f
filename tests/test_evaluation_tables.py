"""Tables of an evaluation say what can be reckoned by hand, each number once, whatever labels hold."""

import csv
import io
from math import sqrt

import pytest
from evaluations import BASE, DPO, PROMPTS, SPO, drawn, evaluation
from rich.console import Console

from callbacks.evaluation.statistics import Mean, clustered_wilson
from experiments.evaluation.cells import Cell, decimals
from experiments.evaluation.findings import Finding, columns, duels, findings, methods
from experiments.evaluation.records import as_csv
from experiments.evaluation.tables import CAPTION, markdown, tables

T2 = 4.302652729911275  # Student's 97.5% quantile, 2 degrees of freedom


def records(found):
    return list(csv.DictReader(io.StringIO(as_csv(found))))


def of(found, policy, reward="shapes", run=None, against=None):
    (row,) = [
        row
        for row in records(found)
        if (row["policy"], row["reward"]) == (policy, reward)
        and (run is None or row["run"] == run)
        and (against is None or row["against"] == against)
    ]
    return row


def numbers(row, *names):
    return [float(row[name]) for name in names]


def cells(table, row, group=0):
    return dict(zip(table.header, (cell.text for cell in table.groups[group][row])))


def test_a_policy_against_its_baseline_by_hand():
    """Differences per prompt 0, 0, 3: mean 1, standard error sqrt 3 / sqrt 3. Outcomes 0 1, 1/2 1/2, 1 1."""
    row = of(evaluation(drawn("base", BASE, True), drawn("DPO", DPO)), "DPO")
    assert numbers(row, "mean", "mean_standard_error", "mean_low", "mean_high") == pytest.approx([3, 1, 3 - T2, 3 + T2])
    assert numbers(row, "difference", "difference_standard_error") == pytest.approx([1, 1])
    assert numbers(row, "difference_low", "difference_high") == pytest.approx([1 - T2, 1 + T2])
    assert [row[name] for name in ("wins", "ties", "losses")] == ["3", "2", "1"]
    interval = clustered_wilson([[0.0, 1.0], [0.5, 0.5], [1.0, 1.0]])
    assert numbers(row, "win_rate", "win_rate_low", "win_rate_high") == pytest.approx([2 / 3, *interval])
    assert (row["prompts"], row["pictures"], row["runs"], row["against"]) == ("3", "6", "1", "base")


def test_a_baseline_has_means_and_is_compared_with_nobody():
    row = of(evaluation(drawn("base", BASE, True), drawn("DPO", DPO)), "base")
    assert (row["mean"], row["baseline"]) == ("2.0", "1")
    assert {row[name] for name in ("against", "difference", "win_rate", "wins", "mean_sd_of_runs")} == {""}


def test_a_policy_against_itself_is_half_and_all_ties():
    row = of(evaluation(drawn("base", DPO, True), drawn("DPO", DPO)), "DPO")
    assert numbers(row, "win_rate", "difference", "difference_low", "ties") == [0.5, 0, 0, 6]


def test_runs_of_a_label_are_averaged_per_prompt_first_with_their_spread_beside():
    """Prompts' means over both runs: 2.5, 2.5, 5; the runs' means 3 and 11/3, their win rates 2/3 and 11/12."""
    found = evaluation(
        drawn("base", BASE, True), drawn("mine", DPO, source="runs/a"), drawn("mine", SPO, source="runs/b")
    )
    row = of(found, "mine", run="")
    assert numbers(row, "mean", "mean_standard_error", "mean_sd_of_runs") == pytest.approx(
        [10 / 3, 5 / 6, (2 / 3) / sqrt(2)]
    )
    assert (row["pictures"], row["runs"], row["wins"], row["ties"], row["losses"]) == ("12", "2", "8", "3", "1")
    assert numbers(row, "win_rate", "win_rate_sd_of_runs") == pytest.approx([9.5 / 12, (11 / 12 - 2 / 3) / sqrt(2)])
    interval = clustered_wilson([[0, 1, 1, 1], [0.5, 0.5, 1, 0.5], [1, 1, 1, 1]])
    assert numbers(row, "win_rate_low", "win_rate_high") == pytest.approx(interval)
    assert numbers(of(found, "mine", run="runs/b"), "mean", "difference") == pytest.approx([11 / 3, 5 / 3])
    (table,) = tables(found)
    assert [[row[0].text for row in group] for group in table.groups] == [
        ["base"],
        ["mine (2 runs)", "runs/a", "runs/b"],
    ]
    assert cells(table, 0, 1)["sd of runs"] == "0.47"
    assert cells(table, 0, 1)["sd of rates"] == "18%"


def test_runs_meet_every_run_of_the_baseline():
    found = evaluation(drawn("base", BASE, True, source="x"), drawn("base", SPO, True, source="y"), drawn("DPO", DPO))
    row = of(found, "DPO")
    assert [row[name] for name in ("wins", "ties", "losses")] == ["4", "4", "4"]
    assert float(row["difference"]) == pytest.approx(3 - 17 / 6)


def test_two_policies_are_compared_by_their_paired_differences():
    """DPO - SPO: -1, -1, 0 per prompt; win rates against the base 1/2 1/2 1 and 1 3/4 1: differences -1/2, -1/4, 0."""
    found = evaluation(drawn("base", BASE, True), drawn("DPO", DPO), drawn("SPO", SPO))
    row = of(found, "DPO", against="SPO")
    assert numbers(row, "difference", "difference_standard_error") == pytest.approx([-2 / 3, 1 / 3])
    assert [row[name] for name in ("wins", "ties", "losses")] == ["1", "2", "3"]
    assert row["rates_against"] == "base"
    error = sqrt(1 / 16 / 3)
    assert numbers(row, "rate_difference", "rate_difference_standard_error") == pytest.approx([-1 / 4, error])
    assert numbers(row, "rate_difference_low", "rate_difference_high") == pytest.approx(
        [-1 / 4 - T2 * error, -1 / 4 + T2 * error]
    )
    table = tables(found)[-1]
    assert cells(table, 0)["policies"] == "DPO against SPO"
    assert cells(table, 0)["difference of win rates [95%]"] == "-25.0 [-87.1, +37.1]"
    assert cells(table, 0)["win rate [95%]"].startswith("33.3% [")


def test_methods_meet_at_their_own_guidance():
    better = [[score + 1 for score in prompt] for prompt in BASE]
    found = evaluation(
        *(drawn("base", BASE, True, 5.0), drawn("DPO", DPO, False, 5.0)),
        *(drawn("base", better, True, 7.5), drawn("DPO", DPO, False, 7.5), drawn("SPO", SPO, False, 3.0)),
    )
    rows = {row["guidance"]: row for row in records(found) if row["policy"] == "DPO"}
    assert [float(rows[guidance]["difference"]) for guidance in ("5.0", "7.5")] == [1, 0]
    assert of(found, "SPO")["against"] == ""
    assert duels(found, "shapes") == []
    (table,) = tables(found)
    assert "guidance 5" not in table.title
    assert [row[1].text for (row,) in table.groups] == ["5", "5", "7.5", "7.5", "3"]


def test_a_policy_meets_each_of_several_baselines():
    found = evaluation(drawn("base", BASE, True), drawn("SFT", SPO, True), drawn("DPO", DPO))
    assert float(of(found, "DPO", against="SFT")["difference"]) == pytest.approx(-2 / 3)
    (table,) = tables(found)
    assert [row[2].text for (row,) in table.groups] == ["–", "–", "base", "SFT"]  # noqa: RUF001
    assert table.header[2] == "against"


def test_rewards_come_with_their_parts_and_an_overview():
    scores = {"shapes": BASE, "Pick": DPO, "shapes/look": SPO}
    found = evaluation(drawn("base", scores, True), drawn("DPO", scores))
    assert columns(found) == ["shapes", "shapes/look", "Pick"]
    assert [(table.kind, table.title.split(",")[0]) for table in tables(found)] == [
        ("overview", "means"), ("reward", "shapes"), ("part", "shapes/look"), ("reward", "Pick")]  # fmt: skip
    assert tables(found)[0].header == ["policy", "shapes", "Pick"]
    assert tables(found)[0].title == "means, 3 prompts, 2 pictures each, guidance 5"


def test_one_prompt_has_no_interval_and_is_shown_without():
    found = evaluation(drawn("base", [[1.0]], True), drawn("DPO", [[2.0]]), prompts=PROMPTS[:1])
    row = cells(tables(found)[0], 0, 1)
    assert (row["mean"], row["difference [95%]"], row["win rate [95%]"]) == ("2.000", "+1.000", "100.0% [0.0, 100.0]")
    assert of(found, "DPO")["difference_low"] == ""


def test_decimals_show_two_digits_of_the_smallest_error():
    assert decimals([Mean(0.28, 0.0004), Mean(0.3, 0.02)]) == 5
    assert decimals([Mean(21.0, 0.11)]) == 2
    assert decimals([Mean(210.0, 30.0)]) == 1
    assert decimals([Mean(1.0, None), Mean(1.0, 0.0)]) == 3


def test_labels_stay_text_in_markdown_and_on_a_terminal():
    label = "a|b*<i>[x](y)\x1b[31m"
    found = evaluation(drawn("[red]base", BASE, True), drawn(label, DPO))
    text = markdown(found, "t_1")
    assert "# t\\_1" in text
    assert "| a\\|b\\*\\<i\\>[x]\\(y)" in text
    assert {line.replace("\\|", "").count("|") for line in text.split("\n") if line.startswith("|")} == {6}
    assert "\x1b" not in text
    assert CAPTION in text
    assert "new draw of prompts" in text
    console = Console(width=110, record=True, file=io.StringIO())
    console.print(tables(found)[0].for_terminal())
    shown = console.export_text()
    assert "[red]base" in shown
    assert "\x1b" not in shown


@pytest.mark.parametrize("width", [60, 110])
def test_a_terminal_gets_every_digit_however_narrow_it_is(width):
    found = evaluation(drawn("base", BASE, True), drawn("mine", DPO, source="a"), drawn("mine", SPO, source="b"))
    console = Console(width=width, record=True, file=io.StringIO())
    table = tables(found)[0]
    console.print(table.for_terminal())
    words = console.export_text().split()
    kept = [text for group in table.groups for row in group for text in (row[1].text, row[3].text, row[4].text)]
    assert [word for text in kept for word in text.split() if word not in words] == []
    assert "wins/ties/losses" not in words


def test_what_is_shown_is_sorted_by_its_number():
    group = tables(evaluation(drawn("base", BASE, True), drawn("DPO", DPO)))[0].groups[1][0]
    assert group[0] == Cell("DPO", "DPO")
    assert [cell.value for cell in group[1:]] == pytest.approx([3, 1, 2 / 3, 3])


def test_findings_stand_as_they_were_drawn():
    found = evaluation(drawn("b", BASE, True), drawn("x", DPO), drawn("y", SPO), drawn("x", SPO, source="2"))
    assert [(method.label, len(method.runs)) for method in methods(found)] == [("b", 1), ("x", 2), ("y", 1)]
    groups = findings(found, "shapes")
    assert [[finding.method.label for finding in group] for group in groups] == [["b"], ["x"] * 3, ["y"]]
    assert groups[0][0] == Finding.of(methods(found)[0], "shapes")
