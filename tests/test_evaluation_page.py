"""The page of an evaluation: what it chooses and draws is right, and a real browser shows it and asks for no more."""

import base64
import io
import json
import re

import numpy as np
import pytest
from evaluations import BASE, DPO, PROMPTS, SPO, drawn, evaluation, paint
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from experiments.evaluation.charts import BOTTOM, HEIGHT, TOP, Series, curves, histogram
from experiments.evaluation.findings import methods
from experiments.evaluation.gallery import PROMPTS as PER_KIND
from experiments.evaluation.gallery import SIDE, chosen, embedded, gallery
from experiments.evaluation.page import flat, render, title, write_page
from experiments.evaluation.page_charts import styles, sweeps
from lightning_modules.errors import DataError

PROTOCOL = {"name": "shapes", "sampler": {"steps": 20, "eta": 0.0}, "guidance": [5.0, 7.5],
            "rewards": [{"name": "HPSv2", "crop": None}, {"kind": "x"}]}  # fmt: skip


def several():
    """Two rewards, a part, two guidances, two policies, one of them with two runs."""
    scores = [{"shapes": table, "shapes/look": table, "Pick": table[::-1]} for table in (BASE, DPO, SPO)]
    found = [
        one
        for guidance in (5.0, 12.5)  # the greater one comes first by its letters
        for one in (
            drawn("base", scores[0], True, guidance),
            drawn("DPO", scores[1], False, guidance),
            drawn("SPO", scores[2], False, guidance, "runs/spo0"),
            drawn("SPO", scores[1], False, guidance, "runs/spo1"),
        )
    ]
    return evaluation(*found, protocol=PROTOCOL)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluation")
    paint(several(), folder)
    return write_page(several(), folder)


# ------------------------------------------------------------------------------------------ what is chosen


def test_best_median_and_worst_by_hand():
    differences = [0.0, 9.0, 1.0, 8.0, 2.0, 7.0, 3.0, 6.0, 4.0, 5.0]
    assert chosen(differences) == {"best": [1, 3, 5], "median": [7, 9, 8], "worst": [4, 2, 0]}
    assert chosen([1.0, 2.0]) == {"best": [1], "worst": [0]}
    assert chosen([1.0]) == {"best": [0]}
    assert chosen([0.0] * 9) == {"best": [0, 1, 2], "median": [3, 4, 5], "worst": [6, 7, 8]}


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=40))
def test_no_prompt_is_shown_twice_and_each_kind_is_what_it_says(differences):
    found = chosen(differences)
    numbers = [n for kind in found.values() for n in kind]
    assert len(set(numbers)) == len(numbers)
    assert all(len(kind) <= PER_KIND for kind in found.values())
    values = [differences[n] for n in numbers]
    assert values == sorted(values, reverse=True)
    assert (values[0], values[-1]) == (max(differences), min(differences))


def test_a_gallery_has_the_differences_and_everybodys_pictures(tmp_path):
    found = evaluation(drawn("base", BASE, True), drawn("DPO", DPO), drawn("SPO", SPO))
    paint(found, tmp_path)
    base, dpo, spo = methods(found)
    shown = gallery(found, tmp_path, "shapes", spo, base, [base, dpo, spo]).groups
    best = shown["best"][0]
    assert (best.number, best.prompt, best.difference) == (2, PROMPTS[2], 3.0)
    assert [(column.method.label, column.score) for column in best.columns] == [("base", 2), ("DPO", 5), ("SPO", 5)]
    assert [picture.file for picture in best.columns[1].pictures] == [found.drawn[1].picture(2, i) for i in (0, 1)]
    assert [one.number for kind in shown.values() for one in kind] == [2, 0, 1]


def opened(address):
    kind, content = address.split(";base64,")
    return kind, Image.open(io.BytesIO(base64.b64decode(content)))


def test_small_pictures_are_kept_to_the_bit_and_large_ones_made_smaller(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "small.png")
    Image.new("RGB", (4 * SIDE, 2 * SIDE), (200, 100, 0)).save(tmp_path / "large.png")
    kind, small = opened(embedded(tmp_path, "small.png").address)
    assert kind == "data:image/png"
    assert np.array_equal(np.asarray(small), pixels)
    kind, large = opened(embedded(tmp_path, "large.png").address)
    assert (kind, large.size) == ("data:image/jpeg", (SIDE, SIDE // 2))
    assert [embedded(tmp_path, name).small for name in ("small.png", "large.png")] == [True, False]


def test_a_missing_or_damaged_picture_is_told(tmp_path):
    found = evaluation(drawn("base", BASE, True), drawn("DPO", DPO))
    paint(found, tmp_path)
    (tmp_path / found.drawn[0].picture(2, 0)).unlink()
    (tmp_path / found.drawn[1].picture(2, 1)).write_bytes(b"x")
    page = render(found, tmp_path)
    assert re.findall(r'"missing">(\S+) is missing', page) == [
        found.drawn[0].picture(2, 0),
        found.drawn[1].picture(2, 1),
    ]
    assert page.count("<img") == 3 * 2 * 2 - 2


# ------------------------------------------------------------------------------------------ charts


def scale(chart, style):
    """Number at the axis -> its place, by a line through the first and last."""
    at = "y" if style == "number" else "x"
    pattern = rf'<text class="{style}" x="([\d.]+)" y="([\d.]+)">([-\d.e]+)</text>'
    marks = [(float(value), float(y) - 4 if at == "y" else float(x)) for x, y, value in re.findall(pattern, chart)]
    (v0, p0), (v1, p1) = marks[0], marks[-1]
    return lambda value: p0 + (value - v0) * (p1 - p0) / (v1 - v0)


def test_points_of_a_curve_stand_where_the_axes_say():
    one = Series("a", "s0", (0.5, 0.9, 0.7), (3.0, 5.0, 7.5), (0.4, 0.8, 0.6), (0.6, 1.0, 0.8))
    chart = str(curves([one], "t", "reward"))
    x, y = scale(chart, "axis"), scale(chart, "number")
    dots = [tuple(map(float, dot)) for dot in re.findall(r'cx="([\d.]+)" cy="([\d.]+)"', chart)]
    assert np.allclose(dots, [(x(p), y(h)) for p, h in zip(one.positions, one.values)], atol=0.2)
    whiskers = [tuple(map(float, w)) for w in re.findall(r'whisker s0" d="M([\d.]+) ([\d.]+)L[\d.]+ ([\d.]+)"', chart)]
    expected = [(x(p), y(low), y(high)) for p, low, high in zip(one.positions, one.lows, one.highs)]
    assert np.allclose(whiskers, expected, atol=0.2)
    assert min(height for _, *ends in whiskers for height in ends) >= TOP
    assert max(height for _, *ends in whiskers for height in ends) <= HEIGHT - BOTTOM


def test_outlines_of_a_histogram_have_the_shares_as_heights():
    """Six values at 0 and two at 10: 75% in the first bin, 25% in the last."""
    chart = str(histogram([Series("a", "s0", [0.0] * 6 + [10.0] * 2), Series("b", "s1", [10.0])], "t", "x", mark=0.0))
    y = scale(chart, "number")
    heights = [
        [float(p.split()[1]) for p in re.search(rf'area {style}" d="M([^"]+)"', chart)[1].split("L")]
        for style in ("s0", "s1")
    ]
    assert np.allclose(heights[0][1:3], y(75), atol=0.2)
    assert np.allclose(heights[0][-3:-1], y(25), atol=0.2)
    assert np.allclose(heights[0][3:-3], y(0), atol=0.2)
    assert np.allclose(heights[1][-3:-1], y(100), atol=0.2)
    assert 'class="mark"' in chart


@pytest.mark.parametrize("values", [[1.0], [0.0, 0.0], [-3.0] * 5, [1e9, -1e9] + [0.0] * 50])
def test_charts_of_one_value_or_of_outliers_are_drawn(values):
    chart = str(histogram([Series("a", "s0", values)], "<t>", "x"))
    assert "nan" not in chart
    assert "inf" not in chart
    assert 'aria-label="&lt;t&gt;"' in chart
    assert len(chart) < 10_000
    assert "nan" not in str(curves([Series("a", "s0", values, values, values, values)], "t", "x"))


def test_curves_go_from_the_smallest_guidance_to_the_greatest_and_rates_have_a_line_at_half():
    methods = (("base", BASE, True), ("DPO", DPO, False))
    found = evaluation(*(drawn(*one, guidance) for guidance in (7.5, 3.0) for one in methods))
    (group,) = sweeps(found)
    (_, means), (_, rates) = group.charts
    for chart, styles_of_lines in ((means, ["base", "s0"]), (rates, ["s0"])):
        lines = re.findall(r'class="line (\w+)" d="M([\d.]+) [\d.]+L([\d.]+)', chart)
        assert [style for style, *_ in lines] == styles_of_lines
        assert all(float(left) < float(right) for _, left, right in lines)
    marks = re.findall(r'class="mark" d="M[\d.]+ ([\d.]+)L[\d.]+ ([\d.]+)', rates)
    assert np.allclose(np.asarray(marks, float), scale(str(rates), "number")(50), atol=0.2)
    assert len(marks) == 1
    assert "mark" not in means


def test_baselines_stand_at_the_left(tmp_path):
    page = render(evaluation(drawn("DPO", DPO), drawn("base", BASE, True)), tmp_path)
    assert re.findall(r'</span>(\w+) <span class="score">', page) == ["base", "DPO"] * 3


def test_a_label_has_one_colour_at_all_guidances():
    assert styles(methods(several())) == {"base": "base", "DPO": "s0", "SPO": "s1"}
    two = evaluation(drawn("DPO", DPO), drawn("base", BASE, True), drawn("SFT", SPO, True))
    assert styles(methods(two)) == {"base": "base", "DPO": "s0", "SFT": "s1"}


# ------------------------------------------------------------------------------------------ the page


def test_it_writes_three_files_the_same_bytes_each_time(written):
    names = ("evaluation.csv", "evaluation.md", "index.html")
    before = [(written.parent / name).read_bytes() for name in names]
    assert write_page(several(), written.parent) == written
    assert [(written.parent / name).read_bytes() for name in names] == before
    assert written.name == "index.html"


def test_a_folder_that_takes_nothing_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot write"):
        write_page(evaluation(drawn("base", BASE, True)), tmp_path / "file")


def test_titles_and_protocols_as_text():
    assert title(several()) == "DPO, SPO against base"
    assert title(evaluation(drawn("DPO", DPO))) == "DPO"
    assert list(flat(PROTOCOL)) == [
        ("name", "shapes"), ("sampler.steps", "20"), ("sampler.eta", "0.0"), ("guidance", "5.0, 7.5"),
        ("rewards.HPSv2.name", "HPSv2"), ("rewards.HPSv2.crop", "null"), ("rewards.1.kind", "x")]  # fmt: skip


def test_the_page_says_what_the_intervals_are_for(written):
    page = written.read_text()
    assert "95% intervals for a new draw of prompts" in page
    assert "<dt>sampler.steps</dt><dd>20</dd>" in page


def test_without_a_sweep_or_a_baseline_there_is_no_such_section(tmp_path):
    page = render(evaluation(drawn("DPO", DPO)), tmp_path)
    assert [f'id="{name}"' in page for name in ("results", "scores", "sweeps", "pictures")] == [
        True,
        True,
        False,
        False,
    ]
    assert "<script>document" not in page


# ------------------------------------------------------------------------------------------ in a browser


@pytest.fixture
def shown(browser, written):
    browser.get_log("performance")
    browser.get_log("browser")
    browser.get(written.as_uri())
    return browser


def column(browser, number):
    """First row of every group of the first table, that column."""
    script = "return [...document.querySelector('table').tBodies].map((b) => b.rows[0].cells[arguments[0]].innerText)"
    return browser.execute_script(script, number)


def test_all_pictures_load(shown):
    sizes = shown.execute_script("""for (const one of document.querySelectorAll('details')) one.open = true;
        return Promise.all([...document.images].map((i) => i.decode().then(() => [i.naturalWidth, i.width])))""")
    # two policies by two rewards, three prompts, three methods, two pictures
    assert len(sizes) == 2 * 2 * 3 * 3 * 2
    assert min(natural for natural, _ in sizes) == 16
    assert min(width for _, width in sizes) > 60
    charts = shown.execute_script(
        "return [...document.querySelectorAll('svg')].map((s) => s.getBoundingClientRect().width)"
    )
    assert len(charts) == 2 * 2 + 2 * 2 * 2
    assert min(charts) > 200


def test_a_click_on_a_column_sorts_by_it_and_a_second_one_turns_it(shown):
    heads = shown.find_elements("css selector", "table:first-of-type th")[:4]
    assert [head.text for head in heads] == ["policy", "guidance", "shapes", "Pick"]
    heads[1].find_element("css selector", "button").click()
    assert column(shown, 1) == ["12.5"] * 3 + ["5"] * 3
    heads[1].find_element("css selector", "button").click()
    assert column(shown, 1) == ["5"] * 3 + ["12.5"] * 3
    heads[0].find_element("css selector", "button").click()
    assert [name.split(" ")[0] for name in column(shown, 0)] == ["SPO"] * 2 + ["DPO"] * 2 + ["base"] * 2
    assert [head.get_attribute("aria-sort") for head in heads] == ["descending", None, None, None]


def test_runs_stay_below_their_method(shown):
    script = "return [...document.querySelectorAll('table')[1].rows].slice(1).map((row) => row.cells[0].innerText)"
    before = shown.execute_script(script)
    shown.execute_script("document.querySelectorAll('table')[1].querySelectorAll('th button')[2].click()")
    after = shown.execute_script(script)
    assert sorted(before) == sorted(after)
    assert before != after
    for n, name in enumerate(after):
        if name == "SPO (2 runs)":
            assert after[n + 1 : n + 3] == ["runs/spo0", "runs/spo1"]


def test_nothing_is_asked_of_anybody_and_nothing_complained_of(shown, written):
    events = [json.loads(entry["message"])["message"] for entry in shown.get_log("performance")]
    asked = [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
    assert asked[0] == written.as_uri()
    assert [url[:40] for url in asked[1:] if not url.startswith("data:")] == []
    assert shown.get_log("browser") == []


def test_the_content_policy_stops_what_would_be_added(shown):
    """What a prompt would do, if it could get in: a script, and a picture from elsewhere."""
    shown.execute_script("""window.stopped = [];
        document.addEventListener('securitypolicyviolation', (event) => window.stopped.push(event.effectiveDirective));
        const script = Object.assign(document.createElement('script'), {textContent: "document.title = 'taken'"});
        document.body.append(script);
        document.body.append(Object.assign(new Image(), {src: 'http://127.0.0.1:9/x.png'}))""")
    found = shown.execute_async_script("const done = arguments[0]; setTimeout(() => done(window.stopped), 200)")
    assert sorted(found) == ["img-src", "script-src-elem"]
    assert shown.title == "DPO, SPO against base"


def test_prompts_stay_text(shown):
    texts = [one.text for one in shown.find_elements("css selector", "details[open] .prompt")]
    assert sorted(texts) == sorted(PROMPTS)
    assert shown.title == "DPO, SPO against base"


@pytest.mark.parametrize("width", [390, 1366])
def test_the_page_is_no_wider_than_the_window(shown, width):
    size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": False}
    shown.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        shown.execute_script("for (const one of document.querySelectorAll('details')) one.open = true")
        assert shown.execute_script("return document.documentElement.scrollWidth") <= width
    finally:
        shown.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
