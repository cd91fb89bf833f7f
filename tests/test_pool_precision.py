"""A pool's manifest says what it was computed in: the trainer's precision, and products in TF32 where torch may."""

import pytest
import torch
from test_step_pool import data, fit, pools_in

from datamodules.pools.folder import read_manifest


@pytest.fixture
def products():
    yield torch.set_float32_matmul_precision
    torch.set_float32_matmul_precision("highest")


def test_pools_in_another_precision_are_others_and_say_so(pipelines, tmp_path, products):
    found = {}
    for name, options in (("highest", {}), ("high", {}), ("mixed", {"precision": "bf16-mixed"})):
        products("highest" if name == "mixed" else name)
        fit(pipelines, tmp_path / name, data(), **options)
        (pool,) = pools_in(tmp_path / name)
        found[pool.name] = read_manifest(pool).settings["precision"]
    assert list(found.values()) == ["32-true", "32-true, products high", "bf16-mixed"]
