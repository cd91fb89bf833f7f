"""What a preference model sees of two noised pictures before it says which one is preferred."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from lightning_modules.batches import DenoiserQuery
from lightning_modules.policies.base import DiffusionPolicy


class View(ABC):
    """Noisy latents as the preference model reads them, as a strategy: subclass it as a frozen dataclass."""

    @abstractmethod
    def __call__(
        self,
        policy: DiffusionPolicy,
        query: DenoiserQuery,
        decode: Callable[[Float[Tensor, "n c h w"]], Float[Tensor, "n 3 H W"]],
    ) -> Float[Tensor, "n ..."]:
        """
        Args:
            policy: frozen.
            query: where the policy would be asked: noisy latents, t, conditioning and guidance.
            decode: latents to pictures in [0, 1].
        """


@dataclass(frozen=True)
class DecodedPrediction(View):
    """The picture that the policy expects behind the noise, SPO's (arXiv 2406.04314, section 3.2): its x0-prediction,
    decoded, in [0, 1]."""

    def __call__(
        self,
        policy: DiffusionPolicy,
        query: DenoiserQuery,
        decode: Callable[[Float[Tensor, "n c h w"]], Float[Tensor, "n 3 H W"]],
    ) -> Float[Tensor, "n 3 H W"]:
        output = policy.predict_noise(query)
        clean, _ = policy.schedule.predict_clean(output, query.latents, query.timesteps)
        return decode(clean)
