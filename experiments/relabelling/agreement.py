"""How a reward's scores agree with what people chose."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

THRESHOLDS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)  # among which PickScore's authors choose
GROUPS = 4


@dataclass(frozen=True)
class Judged:
    """A pair, as people and as the reward see it.

    Attributes:
        label: how much people preferred the first picture: 1, 0, or 0.5 for a tie.
        first, second: the reward's scores.
    """

    label: float
    first: float
    second: float


@dataclass(frozen=True)
class GapGroup:
    """Pairs whose scores lie about as far apart.

    Attributes:
        low, high: the smallest and the largest distance.
        pairs: how many.
        agreement: see ``agreement``.
    """

    low: float
    high: float
    pairs: int
    agreement: float


@dataclass(frozen=True)
class Agrees:
    """Which of people's pairs a reward agrees with; all others are dropped. Several rewards are asked in turn.

    LPO's filter (arXiv 2502.01051; official lrm/lrm_15/trainer/datasets/step_sd_hf_dataset.py:161-171 of
    Kwai-Kolors/LPO@9c2e8b8): aesthetic score -0.5 and 0.2, CLIP score 0 and 0.03, VQAScore 0 and 0.07. It compares the
    ties' gaps with their sign, and so does this.

    Attributes:
        above: the preferred picture's score less the other's must be more than this.
        ties_below: where people saw a tie, the first score less the second must be less than this.
    """

    above: float
    ties_below: float

    def keeps(self, label: float, gap: float) -> bool:
        """
        Args:
            label: 1, or 0.5 for a tie.
            gap: score of the picture that comes first less the other's.
        """
        return gap < self.ties_below if label == 0.5 else gap > self.above


def agreement(pairs: Sequence[Judged]) -> float:
    """The share of pairs whose higher score is the picture that people preferred; equal scores count half."""
    labels, gaps = _arrays(pairs)
    return float(np.mean(1 - np.abs((np.sign(gaps) + 1) / 2 - labels)))


def by_gap(pairs: Sequence[Judged], groups: int = GROUPS) -> list[GapGroup]:
    """Agreement in groups of as equal numbers of pairs as there can be, from the closest scores to the most distant."""
    ordered = sorted(pairs, key=lambda pair: abs(pair.first - pair.second))
    found = []
    for part in np.array_split(np.arange(len(ordered)), min(groups, len(ordered))):
        members = [ordered[i] for i in part]
        gaps = [abs(pair.first - pair.second) for pair in members]
        found.append(GapGroup(gaps[0], gaps[-1], len(members), agreement(members)))
    return found


def accuracy(pairs: Sequence[Judged], threshold: float) -> float:
    """PickScore's rule (arXiv 2305.01569, appendix; PickScore f79607f): of the softmax of both scores.

    Args:
        pairs: with scores that are logits.
        threshold: probabilities closer than that, or as close, predict a tie.

    Returns:
        The mean of 1 for a right prediction, 0.5 where only one of prediction and label is a tie, and 0.
    """
    labels, gaps = _arrays(pairs)
    difference = np.tanh(gaps / 2)  # of the two probabilities
    predicted = np.where(np.abs(difference) <= threshold, 0.5, (np.sign(difference) + 1) / 2)
    return float(np.mean(1 - np.abs(predicted - labels)))


def _arrays(pairs: Sequence[Judged]) -> tuple[np.ndarray, np.ndarray]:
    return np.array([pair.label for pair in pairs]), np.array([pair.first - pair.second for pair in pairs])
