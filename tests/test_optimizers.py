"""The optimizer of 8-bit moments is bitsandbytes', with the settings that it is given."""

import sys
from types import ModuleType

import pytest
import torch

from lightning_modules.errors import ConfigError
from lightning_modules.optimizers import AdamW8bit


def test_it_is_made_by_the_package(monkeypatch):
    class Kept(torch.optim.Optimizer):
        def __init__(self, params, **settings):
            vars(self).update(params=params, **settings)

    package = ModuleType("bitsandbytes.optim")
    package.AdamW8bit = Kept
    monkeypatch.setitem(sys.modules, "bitsandbytes", ModuleType("bitsandbytes"))
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", package)
    weights = [torch.zeros(2)]
    made = AdamW8bit(weights, lr=0.1, betas=(0.5, 0.75), eps=1e-3, weight_decay=0.2)
    assert vars(made) == {"params": weights, "lr": 0.1, "betas": (0.5, 0.75), "eps": 1e-3, "weight_decay": 0.2}


def test_without_the_package_one_line_says_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(ConfigError, match="AdamW8bit needs the package bitsandbytes: pip install bitsandbytes, or use"):
        AdamW8bit([torch.zeros(1)])
