"""What the pairwise objectives log about their margins."""

from __future__ import annotations

from collections.abc import Mapping

from jaxtyping import Float, Int
from torch import Tensor


def accuracy(margin: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
    """1 where the policy sides with the label, 1/2 where it sides with neither (as at the very start)."""
    return 0.5 * ((margin > 0).float() + (margin >= 0).float())


def by_quarter(
    values: Mapping[str, Float[Tensor, " b"]], timesteps: Int[Tensor, " b"], total: int
) -> dict[str, Float[Tensor, ""]]:
    """Means of per-pair values over each quarter of the ``total`` timesteps, as ``margin/t0-249``, ...

    NaN, which the running means leave out, where a quarter has no pair.
    """
    metrics: dict[str, Tensor] = {}
    for quarter in range(4):
        low, high = quarter * total // 4, (quarter + 1) * total // 4
        inside = (timesteps >= low) & (timesteps < high)
        for name, value in values.items():
            metrics[f"{name}/t{low}-{high - 1}"] = value[inside].mean()
    return metrics
