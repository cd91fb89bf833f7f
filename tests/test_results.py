"""The tables of results are those that ``experiments.compare`` makes of the files that the final runs left."""

import re
from pathlib import Path

import pytest

from experiments import compare
from experiments.ablate import read_ablation

DOCS = Path(__file__).parent.parent / "docs"


def folders(ablation, *labels):
    """Label -> the name of its runs' folders without the seed; of all variants, if none is named."""
    variants = read_ablation(ablation)[1]
    return {
        label: f"{ablation}-{re.sub('[^a-z]+', '-', label.lower())}"
        for label in variants
        if label in labels or not labels
    }


FAIR = folders("fair_tiny", "DPO", "DPO, pairs ordered by a coin", "SPO", "SPO, scores shuffled")
TUNED = folders(
    "fair_tiny",
    "DPO with a lower beta",
    "DPO with a lower beta, pairs ordered by a coin",
    "SPO with inner steps",
    "SPO with inner steps, scores shuffled",
    "LPO",
    "LPO, scores shuffled",
)
ABLATION = folders("spo_tiny")
# Named as experiments.demo names them.
SHIPPED = {"spo": "spo", "lpo": "lpo"}
EXACT = {"dpo": "dpo_exact", "spo_exact": "spo_exact", "spo_exact_shuffled": "spo_exact_shuffled"}


def rows_and_page(tmp_path, name, runs):
    """The rows that ``compare`` makes of runs (label and folder), and the page ``name``, whose folder they are in."""
    words = [f"{label}={DOCS / name / folder}" for label, folder in runs]
    compare.main([*words, "--split", "test", "--output", str(tmp_path)])
    rows = [line for line in (tmp_path / "tables.md").read_text().splitlines() if line.startswith("|")]
    assert len(rows) > 2 * len(words)
    return rows, (DOCS / f"{name}.md").read_text()


@pytest.mark.parametrize(
    ("name", "methods", "seeds"),
    [
        ("results", TUNED, 5),
        ("results", FAIR, 5),
        ("results", EXACT, 3),
        ("results", SHIPPED, 3),
        ("results_first_weights", FAIR, 5),
        ("results_first_weights", EXACT, 3),
    ],
    ids=[
        "people",
        "people, former settings",
        "exact reward",
        "judges that ship",
        "people, first weights",
        "exact reward, first weights",
    ],
)
def test_every_row_of_the_final_runs_is_on_the_page(tmp_path, name, methods, seeds):
    runs = [(label, f"{folder}-seed{seed}") for label, folder in methods.items() for seed in range(seeds)]
    rows, page = rows_and_page(tmp_path, name, runs)
    assert [row for row in rows if row not in page] == []


def test_every_row_of_a_control_at_50_is_on_the_page(tmp_path):
    """Beside the rows that the comparison above it has."""
    seeds = {"DPO": 5, "DPO gently": 5, "DPO gently, pairs ordered by a coin": 5, "SPO": 5}
    names = folders("fair_tiny", *seeds)
    runs = [(label, f"{names[label]}-seed{seed}") for label in seeds for seed in range(seeds[label])]
    rows, page = rows_and_page(tmp_path, "results_first_weights", runs)
    assert len([row for row in rows if "gently" in row]) >= 10
    assert [row for row in rows if row not in page and "SPO - DPO gently, pairs" not in row] == []


def test_every_row_of_the_ablations_is_on_the_page(tmp_path):
    """But for differences between two variants: those from SPO are there."""
    runs = [(label, f"{folder}-seed{seed}") for label, folder in ABLATION.items() for seed in range(2)]
    rows, page = rows_and_page(tmp_path, "results_first_weights", runs)
    between = [row for row in rows if " - " in row.split("|")[1] and " - SPO |" not in row]
    assert len(rows) - len(between) > 40
    assert [row for row in rows if row not in between and row not in page] == []
