"""Ways are timed in turn, and the page on performance says what was measured."""

import json

from alternating import alternate
from performance_page import DOCS, page, table


def test_the_table_of_the_page_on_performance_is_made_of_its_rows():
    rows = json.loads((DOCS / "performance.json").read_text())
    text = (DOCS / "performance.md").read_text()
    assert page(text, rows) == text


def test_a_row_by_hand():
    context = {"size": "mid", "rounds": 2, "date": "2026-01-02", "device": "CPU"}
    own = {
        "peer": "plain",
        "ratio": [1, 2, 3],
        "peer_seconds": [2, 4, 6],
        "own_seconds": [2, 2, 2],
        "memory_ratio": 0.5,
    }
    lines = table({"A": own | context, "B": {"milliseconds": [0.5, 1.25, 2.0], **context}}).splitlines()
    assert lines[2] == "| A; memory 0.50 of theirs | plain | 1.00 / **2.00** / 3.00 | 4, 2 | mid, 2, 2026-01-02, CPU |"
    assert lines[-1] == "| B | milliseconds 0.5 / 1.25 / 2 | mid, 2, 2026-01-02, CPU |"


def test_a_row_says_what_it_moves():
    row = {"peer": "plain", "ratio": [1, 2, 3], "peer_seconds": [2, 4, 6], "own_seconds": [2, 2, 2], "moves": "nothing",
           "size": "mid", "rounds": 2, "date": "2026-01-02", "device": "CPU"}  # fmt: skip
    assert table({"A": row}).splitlines()[2].startswith("| A; moves nothing | plain |")


def test_ways_are_timed_in_turn_and_the_first_round_is_left_out():
    now, calls = [0.0], []

    def way(name, seconds):
        def run():
            calls.append(name)
            now[0] += seconds[calls.count(name) - 1]
            return name

        return run

    clock = type("Hand", (), {"now": lambda self: now[0]})()
    timings = alternate({"slow": way("slow", [90, 2, 6]), "fast": way("fast", [80, 2, 1])}, 2, clock)
    assert calls == ["fast", "slow", "slow", "fast", "fast", "slow"]
    assert timings.seconds == {"slow": [2, 6], "fast": [2, 1]}
    assert timings.ratios("slow", "fast") == (1, 3.5, 6)
