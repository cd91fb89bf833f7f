"""Means of named metrics over batches and ranks, reduced with one collective."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor


class RunningMeans:
    """Pair-weighted means of scalars; a NaN says "no such pair in this batch" and is left out.

    Every rank must add the same names in the same order.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def add(self, metrics: Mapping[str, Tensor], pairs: int) -> None:
        """Take a batch's scalars, each a mean over (at most) ``pairs`` pairs."""
        values = torch.stack([value.float() for value in metrics.values()])
        known = (~values.isnan()).double() * pairs
        sums = torch.stack([values.nan_to_num(0.0).double() * known, known], dim=1)
        for name, entry in zip(metrics, sums):
            self._sums[name] = self._sums[name] + entry if name in self._sums else entry

    def compute(self, reduce_sum: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """The means since the last call, over all ranks, in fp32; names without any pair are left out. Starts afresh.

        The device is waited for once.

        Args:
            reduce_sum: sums a tensor over ranks; called once, on every rank.
        """
        if not self._sums:
            return {}
        totals = reduce_sum(torch.stack(list(self._sums.values()))).tolist()
        means = {name: total / count for name, (total, count) in zip(self._sums, totals) if count > 0}
        self._sums = {}
        return dict(zip(means, torch.tensor(list(means.values()), dtype=torch.float32).tolist()))
