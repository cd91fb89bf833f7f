"""Metrics are means over pairs, whatever their batches and ranks."""

import torch

from lightning_modules.running_means import RunningMeans


def test_batches_weigh_by_their_pairs_and_nan_says_nothing():
    """(3 pairs at 1, 1 pair at 5) -> 2; b has only the second batch; c never had a pair."""
    means, nan = RunningMeans(), torch.tensor(float("nan"))
    means.add({"a": torch.tensor(1.0), "b": nan, "c": nan}, pairs=3)
    means.add({"a": torch.tensor(5.0), "b": torch.tensor(7.0), "c": nan}, pairs=1)
    assert means.compute(lambda sums: sums) == {"a": 2.0, "b": 7.0}
    assert means.compute(lambda sums: sums) == {}


def test_one_reduction_serves_all_ranks():
    """Two ranks with the same sums: the sums double and the means stay."""
    means, calls = RunningMeans(), []
    means.add({"a": torch.tensor(4.0), "b": torch.tensor(6.0)}, pairs=2)
    assert means.compute(lambda sums: calls.append(1) or sums * 2) == {"a": 4.0, "b": 6.0}
    assert calls == [1]
