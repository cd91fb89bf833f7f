"""Means, rates and their intervals: known answers, numbers worked out on paper, and how often an interval holds."""

import json
import math
import re
from pathlib import Path
from statistics import NormalDist, fmean, stdev

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from callbacks.evaluation.statistics import (
    Mean,
    WinCount,
    clustered_wilson,
    outcomes,
    over_runs,
    paired_by_prompt,
    paired_difference,
    spread,
    student_quantile,
    wilson_interval,
)

GOLDEN = Path(__file__).parent / "golden"
INTERVALS = json.loads((GOLDEN / "reward_win_rate_intervals.json").read_text())
PAIRING = json.loads((GOLDEN / "reward_win_rate.json").read_text())
Z95 = NormalDist().inv_cdf(0.975)

TABLES = st.lists(st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=1, max_size=4), min_size=2, max_size=20)


# Known answers


@pytest.mark.parametrize("name", INTERVALS)
def test_intervals_are_the_known_ones(name):
    known = INTERVALS[name]
    assert clustered_wilson(known["outcomes"]) == pytest.approx(known["clustered_wilson"], abs=1e-12)
    assert Mean.of(known["outcomes"]).mean == pytest.approx(known["rate"], abs=1e-12)
    assert student_quantile(len(known["outcomes"]) - 1) == pytest.approx(known["t"], abs=1e-12)
    pictures = [value for prompt in known["outcomes"] for value in prompt]
    plain = wilson_interval(fmean(pictures), len(pictures), Z95)
    assert plain == pytest.approx(known["wilson_over_pictures"], abs=1e-12)


@pytest.mark.parametrize(("policy", "tie"), [("ties_half", 0.5), ("ties_lose", 0.0)])
def test_pairing_and_counting_are_the_published_ones(policy, tie):
    """Repeated prompts, prompts that only one set has, exact ties, and both ways to count these."""
    a, b = paired_by_prompt(*([(one["prompt"], one["score"]) for one in PAIRING[side]] for side in "ab"))
    known, count = PAIRING[policy], WinCount.of(a, b, tie)
    assert (count.n, count.wins, count.losses, count.ties) == tuple(
        known[name] for name in ("total_pairs", "wins_a", "wins_b", "ties")
    )
    assert count.rate == pytest.approx(known["win_rate_a_over_b"], abs=1e-12)
    assert Mean.of(a).mean == pytest.approx(known["mean_score_a"], abs=1e-12)
    assert Mean.of(b).mean == pytest.approx(known["mean_score_b"], abs=1e-12)
    assert count.low < count.rate < count.high


def test_pictures_are_paired_one_by_one_as_published():
    """By the pictures' places in their sets, which stand in for scores here."""
    numbered = [[(one["prompt"], float(place)) for place, one in enumerate(PAIRING[side])] for side in ("a", "b")]
    first, second = (
        [PAIRING[side][int(place)]["picture"] for prompt in table for place in prompt]
        for side, table in zip("ab", paired_by_prompt(*numbered))
    )
    assert list(zip(first, second)) == [(a, b) for a, b, _ in PAIRING["pairs"]]


def test_the_average_of_several_rewards_win_rates_is_the_published_one():
    known = PAIRING["mean_of_five_win_rates"]
    joined = over_runs([[[rate], [rate]] for rate in known["inputs"]])
    assert Mean.of(joined).mean == pytest.approx(known["macro"], abs=1e-12)


# By hand


def test_the_example_of_the_page_counts_what_it_says(capsys):
    page = (Path(__file__).parent.parent / "docs" / "evaluation.md").read_text()
    (example,) = re.findall(r"```python\n(from callbacks.evaluation.statistics .*?)```", page, re.DOTALL)
    exec(example, {})
    assert capsys.readouterr().out.strip() == example.rpartition("# ")[2].strip() == "0.75"


def test_wilson_interval_by_hand():
    # 8 of 10, z^2 = 3.8415: centre (0.8 + 0.19207) / 1.38415 = 0.71674,
    # half width 1.95996 / 1.38415 sqrt(0.016 + 0.0096036) = 0.22658
    assert wilson_interval(0.8, 10, Z95) == pytest.approx((0.49016, 0.94332), abs=1e-5)
    assert wilson_interval(0.0, 10, Z95)[0] == pytest.approx(0)
    assert wilson_interval(1.0, 10, Z95)[1] == pytest.approx(1)


def test_clustered_wilson_by_hand():
    # Prompts 1, 1/2, 0: rate 1/2, variance of the rate 1/4 / 3 = 1/12, n = 1/4 / (1/12) = 3; Student's quantile with 2
    # degrees is 4.30265, t^2 = 18.5128: centre 1/2, half width 4.30265 / 7.17094 sqrt(1/12 + 18.5128 / 36) = 0.46383
    low, high = clustered_wilson([[1.0, 1.0], [1.0, 0.0], [0.0, 0.0]])
    assert (low, high) == pytest.approx((0.5 - 0.46383, 0.5 + 0.46383), abs=1e-5)


def test_more_pictures_of_the_same_prompts_that_agree_with_each_other_say_nothing_new():
    once = [[1.0], [0.0], [1.0], [1.0], [0.5]]
    assert clustered_wilson([prompt * 8 for prompt in once]) == pytest.approx(clustered_wilson(once), abs=1e-12)
    assert Mean.of([prompt * 8 for prompt in once]).standard_error == pytest.approx(Mean.of(once).standard_error)


@pytest.mark.parametrize("row", [[1.0], [0.5, 0.5], [1.0, 0.0, 0.0], [1.0] * 7 + [0.5] + [0.0] * 3])
@pytest.mark.parametrize("prompts", [2, 7, 49])
def test_prompts_that_are_all_alike_count_as_one_trial_each(row, prompts):
    """Also where 7.5 / 11, times 11, is not 7.5: a variance of rounding is none."""
    rate = fmean(row)
    expected = wilson_interval(rate, prompts, student_quantile(prompts - 1))
    assert clustered_wilson([row] * prompts) == pytest.approx(expected, abs=1e-9)


def test_one_prompt_says_nothing_of_others():
    assert clustered_wilson([[1.0, 1.0, 1.0]]) == (0.0, 1.0)
    assert Mean.of([[3.0, 5.0]]) == Mean(4.0, None)


def test_ties_count_half():
    count = WinCount.of([[2.0, 1.0], [0.0, 5.0]], [[1.0, 1.0], [3.0, 4.0]])
    assert (count.n, count.wins, count.ties, count.losses, count.rate) == (4, 2, 1, 1, 0.625)
    assert (count.low, count.high) == clustered_wilson([[1.0, 0.5], [0.0, 1.0]])


def test_mean_and_standard_error_are_over_prompts():
    # Prompts 1, 2, 3, 6: mean 3, squared deviations 4 + 1 + 0 + 9 = 14, variance 14 / 3, standard error sqrt(14 / 12);
    # Student's quantile with 3 degrees is 3.18245.
    found = Mean.of([[0.0, 2.0], [2.0, 2.0], [1.0, 5.0], [6.0, 6.0]])
    error = math.sqrt(14 / 12)
    assert (found.mean, found.standard_error) == (3.0, pytest.approx(error))
    assert (found.low, found.high) == pytest.approx((3 - 3.18245 * error, 3 + 3.18245 * error), abs=1e-4)


def test_prompts_weigh_by_their_pictures():
    # 6 pictures, mean 2; sums less 2 for each picture: 4 - 4 x 2 = -4 and 8 - 2 x 2 = 4; variance 2 x 32 / 36.
    found = Mean.of([[1.0, 1.0, 1.0, 1.0], [4.0, 4.0]])
    assert (found.mean, found.standard_error) == (2.0, pytest.approx(math.sqrt(2 * 32 / 36)))


def test_paired_difference_by_hand():
    # Differences 1, 1, 4, though the prompts differ by tens: mean 2, standard deviation sqrt(3), error 1.
    found = paired_difference([[11.0, 11.0], [21.0], [34.0]], [[10.0], [20.0], [29.0, 31.0]])
    assert (found.mean, found.standard_error) == (2.0, pytest.approx(1.0))
    assert (found.low, found.high) == pytest.approx((2 - 4.30265, 2 + 4.30265), abs=1e-5)


def test_outcomes_of_two_policies_against_one_base():
    base = [[0.0, 0.0], [0.0, 0.0]]
    one, two = outcomes([[1.0, 0.0], [1.0, 1.0]], base), outcomes([[-1.0, 0.0], [1.0, -1.0]], base)
    assert (one, two) == ([[1.0, 0.5], [1.0, 1.0]], [[0.0, 0.5], [1.0, 0.0]])
    assert paired_difference(one, two).mean == 0.5  # both prompts by a half
    assert paired_difference(one, two).standard_error == 0


def test_several_runs_are_averaged_per_prompt_first():
    one, two = [[1.0, 3.0], [5.0, 7.0], [0.0, 0.0]], [[2.0, 2.0], [7.0, 9.0], [1.0, 3.0]]
    joined = Mean.of(over_runs([one, two]))
    averaged = [[fmean([fmean(a), fmean(b)])] for a, b in zip(one, two)]
    assert (joined.mean, joined.standard_error) == pytest.approx(
        (fmean(value for (value,) in averaged), stdev(value for (value,) in averaged) / math.sqrt(3))
    )
    assert spread([1.0, 2.0, 6.0]) == pytest.approx(stdev([1.0, 2.0, 6.0]))
    assert spread([1.0]) is None


# Whatever the outcomes


@given(TABLES)
def test_the_interval_holds_the_rate_has_a_width_and_mirrors_it(table):
    rate, (low, high) = Mean.of(table).mean, clustered_wilson(table)
    assert 0 <= low <= rate + 1e-12
    assert rate - 1e-12 <= high <= 1
    assert high - low > 1e-3
    mirrored = clustered_wilson([[1 - value for value in prompt] for prompt in table])
    assert mirrored == pytest.approx((1 - high, 1 - low), abs=1e-9)


@given(st.lists(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1), min_size=1))
def test_swapping_policy_and_reference_mirrors_the_count(scores):
    policy, reference = [[p for p, _ in prompt] for prompt in scores], [[r for _, r in prompt] for prompt in scores]
    one, other = WinCount.of(policy, reference), WinCount.of(reference, policy)
    assert (one.wins, one.ties, one.losses) == (other.losses, other.ties, other.wins)
    assert one.rate == pytest.approx(1 - other.rate)


def test_tables_of_other_prompts_or_pictures_are_no_pairs():
    for other in ([[1.0]], [[1.0], [1.0, 2.0]]):
        for compared in (outcomes, WinCount.of):
            with pytest.raises(ValueError, match="zip"):
                compared([[1.0], [2.0]], other)
    with pytest.raises(ValueError, match="zip"):
        paired_difference([[1.0], [2.0]], [[1.0]])
    with pytest.raises(ValueError, match="zip"):
        over_runs([[[1.0], [2.0]], [[1.0]]])


# How often a 95% interval holds what it is to hold: 1,000 data sets have a standard error of 0.7 points


SETS = 1000
SHAPES = [pytest.param(48, 4, id="48 prompts x 4"), pytest.param(500, 1, id="500 prompts x 1")]


def simulated(prompts, pictures, correlation, seed):
    """Standard normal values of ``SETS`` data sets whose pictures of one prompt have the given correlation."""
    draw = np.random.default_rng(seed).standard_normal
    shared, own = draw((SETS, prompts, 1)), draw((SETS, prompts, pictures))
    return math.sqrt(correlation) * shared + math.sqrt(1 - correlation) * own


def covered(intervals, truth):
    return fmean(low <= truth <= high for low, high in intervals)


@pytest.mark.parametrize(("prompts", "pictures"), SHAPES)
@pytest.mark.parametrize(("rate", "ties"), [(0.6, 0.0), (0.75, 0.2)])
def test_the_interval_of_a_win_rate_covers_what_it_says(prompts, pictures, rate, ties):
    values = simulated(prompts, pictures, correlation=0.3, seed=round(100 * rate) + prompts)
    lost, tied = NormalDist().inv_cdf(1 - rate - ties / 2), NormalDist().inv_cdf(1 - rate + ties / 2)
    found = (values > lost) / 2 + (values > tied) / 2  # in [0, 1/2, 1], of mean ``rate``
    assert 0.93 <= covered((clustered_wilson(one.tolist()) for one in found), rate) <= 0.98
    if pictures > 1 and ties == 0:  # why not Wilson's over pictures
        naive = [wilson_interval(float(one.mean()), one.size, Z95) for one in found]
        assert covered(naive, rate) < 0.92


@pytest.mark.parametrize(("prompts", "pictures"), SHAPES)
def test_the_intervals_of_means_and_of_differences_cover_what_they_say(prompts, pictures):
    """Two policies, the second 0.1 better; half of a score's variance is the prompt's, and both have it."""
    first = simulated(prompts, pictures, correlation=0.5, seed=prompts)
    second = first + 0.1 + 0.5 * simulated(prompts, pictures, correlation=0.3, seed=prompts + 1)
    means = [Mean.of(one.tolist()) for one in first]
    assert 0.93 <= covered([(mean.low, mean.high) for mean in means], 0.0) <= 0.98
    gains = [paired_difference(two.tolist(), one.tolist()) for one, two in zip(first, second)]
    assert 0.93 <= covered([(gain.low, gain.high) for gain in gains], 0.1) <= 0.98


def test_the_interval_of_runs_on_the_same_prompts_covers_what_it_says():
    """Three runs whose pictures differ by noise alone; their counts added up would cover 75%."""
    values = simulated(48, 3 * 4, correlation=0.3, seed=3)
    found = (values > NormalDist().inv_cdf(0.4)).astype(float)
    joined = (over_runs([one[:, 4 * run : 4 * run + 4].tolist() for run in range(3)]) for one in found)
    assert 0.93 <= covered(map(clustered_wilson, joined), 0.6) <= 0.98
