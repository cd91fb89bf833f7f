"""A beta that follows the margins of the run: SimpleTuner's rule, for any objective on pairs that has a beta."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from jaxtyping import Float
from torch import Tensor

from lightning_modules.batches import LatentPairs
from lightning_modules.errors import ConfigError
from lightning_modules.objectives.around import AroundObjective
from lightning_modules.objectives.base import LossOutput
from lightning_modules.objectives.pairwise import Gains, NoisedPairs, PairwiseObjective
from lightning_modules.schedules.base import Schedule

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class AutomaticBeta(AroundObjective):
    """``objective`` with beta = -2 logit(gradient_share) / M, where M is the running mean of |m|.

    So a pair of mean margin, on the right side, has DPO's gradient times ``gradient_share``: sigmoid(-beta M / 2). M is
    updated once an optimizer step, for the next, by the mean |m| over all its batches and ranks; a step whose margins
    are all 0, as the first one's are, or not finite leaves it alone. It begins with the first other step's; until then
    beta is the highest. Checkpoints keep M. Source: SimpleTuner's rule, for errors summed over c, h, w; how M begins
    and that it moves once a step are ours.

    Args:
        objective: DPO, DMPO or another that has a ``beta``, which is not used.
        gradient_share: 0.2 there.
        decay: of the running mean, 0.99 there.
        lowest, highest: bounds of beta for errors **summed** over c, h, w, as there: [0.001, 1]. Times c h w they bound
            the beta of mean errors: 16 to 16384 for SD 1.5's 4x64x64 latents.

    Logged: what ``objective`` logs, ``beta`` (of mean errors) and ``margin_size`` (|m|).
    """

    objective: PairwiseObjective
    gradient_share: float = 0.2
    decay: float = 0.99
    lowest: float = 0.001
    highest: float = 1.0
    _kept: dict[str, float] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        self.check_objective()
        if "beta" not in [setting.name for setting in fields(self.objective)]:  # type: ignore[arg-type]  # a dataclass
            raise ConfigError(f"AutomaticBeta sets beta, and {type(self.objective).__name__} has none; use DPO or DMPO")
        if not (0 < self.gradient_share < 0.5 and 0 <= self.decay < 1 and 0 < self.lowest <= self.highest):
            raise ConfigError(
                "objective wants gradient_share in (0, 0.5), decay in [0, 1) and 0 < lowest <= highest, got "
                f"{self.gradient_share}, {self.decay}, {self.lowest} and {self.highest}"
            )

    def beta(self, numbers: int) -> float:
        """For the mean errors of latents of so many numbers, c h w."""
        size = self._kept.get("margin_size", 0.0)
        wanted = 2 * math.log(1 / self.gradient_share - 1) / size if size else math.inf
        return min(max(wanted, self.lowest * numbers), self.highest * numbers)

    def loss(
        self,
        batch: LatentPairs,
        query: NoisedPairs,
        policy_output: Float[Tensor, "n c h w"],
        reference_output: Float[Tensor, "n c h w"] | None,
        schedule: Schedule,
    ) -> LossOutput:
        beta = self.beta(query.target[0].numel())
        set_so: PairwiseObjective = replace(self.objective, beta=beta)  # type: ignore[type-var]  # a dataclass
        output = set_so.loss(batch, query, policy_output, reference_output, schedule)
        margin = Gains.of(query, policy_output.detach(), reference_output).margin
        own = {"beta": margin.new_tensor(beta), "margin_size": margin.abs().mean()}
        return LossOutput(output.loss, output.metrics | own)

    def observe(self, metrics: Mapping[str, float]) -> None:
        super().observe(metrics)
        size = float(metrics.get("margin_size", 0.0))
        if size and math.isfinite(size):
            before = self._kept.get("margin_size", size)
            self._kept["margin_size"] = self.decay * before + (1 - self.decay) * size

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | self._kept

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        rest = dict(state)
        size = rest.pop("margin_size", None)
        super().load_state_dict(rest)
        self._kept.clear()
        if size is None:
            log.warning("the checkpoint holds no mean of margins: AutomaticBeta begins a new one here")
        else:
            self._kept["margin_size"] = float(size)
