"""The head that both LAION's aesthetic predictor and ImageReward were published with."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn


class LinearHead(nn.Module):
    """The published layers, named as in their files. Without an activation between them they are one linear map."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(width, 1024), nn.Dropout(0.2),
            nn.Linear(1024, 128), nn.Dropout(0.2),
            nn.Linear(128, 64), nn.Dropout(0.1),
            nn.Linear(64, 16),
            nn.Linear(16, 1),
        )  # fmt: skip

    def forward(self, features: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
        scores: Tensor = self.layers(features)
        return scores[:, 0]
