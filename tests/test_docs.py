"""What the pages of ``docs`` name exists, and the numbers that they repeat are those of the code."""

import ast
import re
from math import prod
from pathlib import Path

import cost_by_count
import memory_by_count
import pytest
import torch
from torch import nn
from transformers.optimization import Adafactor

ROOT = Path(__file__).parent.parent
VERIFICATION = (ROOT / "docs" / "verification.md").read_text()
MEMORY = (ROOT / "docs" / "memory.md").read_text()


def test_every_file_that_the_page_of_claims_links_to_exists():
    links = set(re.findall(r"\]\(([^)#]+)\)", VERIFICATION))
    assert len(links) > 20
    assert [link for link in sorted(links) if not (ROOT / "docs" / link).exists()] == []


def test_every_test_that_the_page_of_claims_names_exists_in_the_file_that_it_links_to():
    named = set(re.findall(r"(test_\w+\.py)((?:::\w+)+)", VERIFICATION))
    linked = set(re.findall(r"\[(test_\w+\.py)((?:::\w+)+)\]\(\.\./tests/\1\)", VERIFICATION))
    assert len(linked) > 50
    missing = [file + test for file, test in sorted(named) if tuple(test.split("::")[1:]) not in names_in(file)]
    assert missing == []
    by_hand = {("test_objectives.py", "::test_dpo_margin_by_hand")}  # the command that runs one test
    assert named - linked <= by_hand


def names_in(file: str) -> set[tuple[str, ...]]:
    """Names of functions, and of classes' methods, in a file of tests."""
    found: set[tuple[str, ...]] = set()
    for node in ast.parse((ROOT / "tests" / file).read_text()).body:
        if isinstance(node, ast.FunctionDef):
            found.add((node.name,))
        elif isinstance(node, ast.ClassDef):
            found |= {(node.name, child.name) for child in node.body if isinstance(child, ast.FunctionDef)}
    return found


def test_every_known_answer_is_on_the_page_of_claims():
    answers = sorted(path.name for path in (ROOT / "tests" / "golden").iterdir())
    assert [name for name in answers if f"(../tests/golden/{name})" not in VERIFICATION] == []


# Memory


@pytest.mark.parametrize(
    "table", [memory_by_count.network_table, memory_by_count.quantised_table, memory_by_count.training_table]
)
def test_the_tables_of_the_page_on_memory_are_those_that_the_command_prints(table):
    assert table() in MEMORY


@pytest.mark.parametrize(
    ("make", "count"),
    [
        (lambda parameters: torch.optim.AdamW(parameters), memory_by_count.adamw),
        (lambda parameters: Adafactor(parameters, lr=1e-3, relative_step=False), memory_by_count.adafactor),
    ],
)
def test_moments_are_counted_as_optimizers_hold_them(make, count):
    network = nn.Sequential(nn.Conv2d(3, 5, 3), nn.Conv2d(5, 7, 1), nn.Flatten(), nn.LazyLinear(2))
    network(torch.ones(1, 3, 6, 6)).sum().backward()
    optimizer = make(network.parameters())
    optimizer.step()
    tensors = [v for state in optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor)]
    held = sum(v.numel() * v.element_size() for v in tensors if v.dim() > 0)  # scalars are counts of steps
    assert count([tuple(parameter.shape) for parameter in network.parameters()]) == held


def test_eight_bit_moments_by_hand():
    """2 bytes per number and two 4-byte scales per block of 256, begun ones too; below 4096 numbers 8 bytes each."""
    assert memory_by_count.eight_bit_adam([(512, 8)]) == 2 * 4096 + 8 * 16
    assert memory_by_count.eight_bit_adam([(4095,), (4097,)]) == 8 * 4095 + 2 * 4097 + 8 * 17


def test_a_training_is_counted_by_hand(monkeypatch):
    """A UNet of 100 numbers and a VAE of 10. Full: 4 bytes each and 2 frozen; LoRA of 6 numbers: 4 each, 2 frozen."""
    monkeypatch.setattr(memory_by_count, "numbers", {"unet": 100, "VAE": 10}.__getitem__)
    monkeypatch.setattr(memory_by_count, "trained_shapes", lambda unet, rank: [(10, 10)] if rank is None else [(2, 3)])
    full = memory_by_count.Training("unet", "full", None, ("VAE",), copy=True).bytes_held(2)
    assert (full["weights"], full["gradients"], full["copy"], full["AdamW"]) == (420, 400, 400, 8 * prod((10, 10)))
    lora = memory_by_count.Training("unet", "LoRA", 3, ("VAE",)).bytes_held(2)
    assert (lora["weights"], lora["gradients"], lora["copy"], lora["AdamW"]) == (24 + 220, 24, 0, 48)


# Work


def test_the_networks_cost_what_is_published_of_them():
    """TMAC per sample at SD 1.5's sizes, as others count them; a LoRA's backward is 1.13 forwards."""
    assert cost_by_count.unet("SD 1.5") == pytest.approx(0.402, rel=2e-3)
    assert cost_by_count.unet("SD 1.5", "4") == pytest.approx(0.402 * 2.13, rel=0.01)
    assert cost_by_count.vae("SD 1.5", "encode") == pytest.approx(0.558, rel=0.03)
    assert cost_by_count.vae("SD 1.5", "decode") == pytest.approx(1.257, rel=0.01)
    assert cost_by_count.clip("vision") == pytest.approx(0.168, rel=0.02)
    assert cost_by_count.clip("text") == pytest.approx(0.024, rel=0.1)


def test_the_page_says_what_the_recipes_cost():
    page = (ROOT / "docs" / "results.md").read_text()
    for printed in (cost_by_count.network_table(["SD 1.5"]), cost_by_count.recipe_table(["SD 1.5"])):
        assert [line for line in printed.splitlines() if line not in page] == []


def test_recipes_by_hand(monkeypatch):
    """A UNet's forward is 1, with backward 3 (a LoRA's 2), the latent judge's 0.25; codings 10, 20, towers 4, 5."""
    monkeypatch.setattr(cost_by_count, "unet", lambda size, training=None: {None: 1, "full": 3}.get(training, 2))
    monkeypatch.setattr(cost_by_count, "latent_judge", lambda size: 0.25)
    monkeypatch.setattr(cost_by_count, "vae", lambda size, way: {"encode": 10, "decode": 20}[way])
    monkeypatch.setattr(cost_by_count, "clip", {"vision": 4, "text": 5}.__getitem__)
    dpo, spo, lpo = cost_by_count.recipes("SD 1.5")
    # Two pictures: encoded, policy with backward, reference.
    assert dpo.total == pytest.approx(2000 * 2048 * 2 * (10 + 3 + 1) / 1e6)
    # Two pictures: encoded, two branches, decoded, seen with backward; the text once.
    assert spo.judge == pytest.approx(8000 * 64 * (2 * (10 + 2 + 20 + 12) + 15) / 1e6)
    assert spo.pools == pytest.approx(40_000 * (130 + 64 * (20 + 4) + 5) / 1e6)  # 130 calls and 64 decodes a prompt
    assert spo.training == pytest.approx(40_000 * 8 * 2 * (2 + 1) / 1e6)  # half of 16 pairs, two branches
    assert lpo.judge == pytest.approx(4000 * 128 * 2 * (10 + 3 * 2 * 0.25) / 1e6)
    assert lpo.pools == pytest.approx(20_000 * (40 + 160 * 0.25) / 1e6)
    assert lpo.training == pytest.approx(20_000 * 10 * 2 * (2 + 1) / 1e6)
    _, spo, _ = cost_by_count.recipes("SDXL")
    assert spo.pools == pytest.approx(40_000 * (70 + 8 * (20 + 4) + 5) / 1e6)  # two candidates, four times judged
    assert spo.training == pytest.approx(40_000 * 8 * 4 * (2 + 1) / 1e6)  # no shared x_t: two passes a pair
    assert spo.judge == pytest.approx(7000 * 64 * (2 * (10 + 2 + 20 + 12) + 15) / 1e6)
