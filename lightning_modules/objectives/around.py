"""What objectives that go around another one on pairs share: what it needs, what it keeps, and the checks of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_modules.errors import ConfigError
from lightning_modules.objectives.pairwise import PairwiseObjective


class AroundObjective(PairwiseObjective):
    """Asks where every pairwise objective asks; a subclass computes the loss with the help of ``objective``'s.

    Attributes:
        objective: on pairs, compared with a reference; what it keeps over a run is kept with it.
    """

    objective: PairwiseObjective

    def check_objective(self) -> None:
        """
        Raises:
            ConfigError: ``objective`` reads the chosen picture alone, or has no reference.
        """
        if not (self.objective.needs_reference and self.objective.needs_rejected):
            raise ConfigError(
                f"{type(self).__name__} goes around an objective that compares pairs with a reference, such as DPO, "
                f"and {type(self.objective).__name__} does not"
            )

    def observe(self, metrics: Mapping[str, float]) -> None:
        self.objective.observe(metrics)

    def state_dict(self) -> dict[str, Any]:
        return self.objective.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.objective.load_state_dict(state)
