"""The contract between an objective and the module that runs the networks for it.

``query`` says where to look, ``loss`` what it costs, from tensors alone. The module does the forwards, so that
no objective can run the reference with gradients or a network twice on one input, and every loss can be tested
with three numbers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_modules.batches import Conditioning, DenoiserQuery
from lightning_modules.errors import ConfigError
from lightning_modules.schedules.base import Schedule


@dataclass(frozen=True)
class LossOutput:
    """What an objective returns.

    Attributes:
        loss: scalar, the mean over the batch's pairs, fp32, with gradient.
        metrics: detached scalars, each a mean over the pairs it speaks of (NaN where there are none); logged as
            ``train/<name>``. The same names at every call, so that ranks agree on what they reduce.
    """

    loss: Float[Tensor, ""]
    metrics: dict[str, Float[Tensor, ""]]


class Objective(ABC):
    """A preference objective as a strategy: subclass it as a frozen dataclass of its hyper-parameters.

    Attributes:
        needs_reference: whether ``loss`` reads ``reference_output``.
        needs_rejected: whether it reads the rejected picture.
        single_pictures: whether its batches are ``LabelledLatents`` and not pairs.
    """

    needs_reference: bool = True
    needs_rejected: bool = True
    single_pictures: bool = False

    @abstractmethod
    def query(
        self, batch: Any, cond: Conditioning, schedule: Schedule, generators: Sequence[torch.Generator]
    ) -> DenoiserQuery:
        """Choose noise and timesteps and say where the denoiser has to be evaluated.

        Args:
            batch: b pairs, on the device of the networks.
            cond: one row per pair.
            schedule: the diffusion schedule.
            generators: one CPU generator per pair; every draw for pair i comes from ``generators[i]``.
        """

    @abstractmethod
    def loss(
        self,
        batch: Any,
        query: Any,
        policy_output: Float[Tensor, "n c h w"],
        reference_output: Float[Tensor, "n c h w"] | None,
        schedule: Schedule,
    ) -> LossOutput:
        """The loss from the networks' outputs at ``query``, in fp32.

        Args:
            batch: as in ``query``.
            query: what ``query`` returned.
            policy_output: the policy's raw prediction (noise or velocity, after guidance), with gradient.
            reference_output: the reference's, without; None if ``needs_reference`` is False.
            schedule: the diffusion schedule.
        """

    def observe(self, metrics: Mapping[str, float]) -> None:  # noqa: B027  # most follow nothing
        """Hear, once an optimizer step and before it, what ``loss`` reported: means over the step's batches and ranks.

        For an objective that follows its run. What it keeps is the same on all ranks and belongs into ``state_dict``.
        """

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps of it: plain numbers by name, none by default."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take what ``state_dict`` gave.

        Raises:
            ConfigError: another objective gave it.
        """
        if state:
            raise ConfigError(
                f"the checkpoint keeps {', '.join(sorted(state))} of its objective, and {type(self).__name__} keeps "
                "nothing; resume with the objective that wrote it, or start a new run from the exported weights"
            )
