"""Draws are functions of their key alone."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_modules.randomness import derive_seed, generator, rand, randint, randn, seed_global_generators

keys = st.lists(st.one_of(st.integers(), st.text()), min_size=1, max_size=4)


@given(keys, keys)
def test_seeds_differ_exactly_where_keys_do(one, other):
    assert (derive_seed(*one) == derive_seed(*other)) == (one == other)


def test_seeds_are_the_same_in_every_version():
    """A pinned value: a change here breaks resuming of runs begun before it."""
    assert derive_seed(0, "noise", 1) == 2376061928063757211
    assert 0 <= derive_seed("x") < 2**63


def test_a_row_depends_on_its_own_generator_only():
    many = randn((2, 3), [generator(0, i) for i in range(4)])
    assert many.shape == (4, 2, 3)
    assert torch.equal(randn((2, 3), [generator(0, 2)])[0], many[2])
    assert torch.equal(randint(1000, [generator(0, 2)]), randint(1000, [generator(0, i) for i in range(4)])[2:3])
    assert torch.equal(rand([generator(0, 2)]), rand([generator(0, i) for i in range(4)])[2:3])


@given(st.integers(0, 2**63 - 1))
def test_the_global_generator_draws_as_after_torchs_own_seeding(seed):
    torch.manual_seed(seed)
    expected = torch.rand(4)
    seed_global_generators(seed, torch.device("cpu"))
    assert torch.equal(torch.rand(4), expected)


def test_the_device_in_use_is_seeded_too_and_no_other(monkeypatch):
    seeded = []
    for name in ("cuda", "mps", "xpu"):
        monkeypatch.setattr(getattr(torch, name), "manual_seed", lambda seed, name=name: seeded.append((name, seed)))
    seed_global_generators(7, torch.device("cuda", 0))
    seed_global_generators(8, torch.device("cpu"))
    assert seeded == [("cuda", 7)]
