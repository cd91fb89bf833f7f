"""What "the reference" is: the policy without its adapters, or a frozen copy of its denoiser."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lightning_modules.batches import DenoiserQuery
from lightning_modules.errors import ConfigError
from lightning_modules.policies.base import DiffusionPolicy
from lightning_modules.policies.compiling import deep_copy


class Reference(ABC):
    """The model that the policy must not stray from without reason. Never trained, never checkpointed."""

    @abstractmethod
    def attach(self, policy: DiffusionPolicy) -> None:
        """Take what is needed from the policy as it is before training. Called once, before the first step."""

    @abstractmethod
    def predict_noise(self, query: DenoiserQuery) -> Float[Tensor, "n c h w"]:
        """As ``DiffusionPolicy.predict_noise``, without gradient."""

    def own_networks(self) -> list[nn.Module]:
        """Denoisers that it keeps beside the policy's own, once attached; what they compute is a cost of its own."""
        return []


class AdapterOff(Reference):
    """The policy's own network with its LoRA switched off: exact, and costs no memory.

    Only for a policy with adapters. Equal to ``FrozenCopy`` bit for bit.
    """

    def attach(self, policy: DiffusionPolicy) -> None:
        with policy.adapters_disabled():  # raises ConfigError here, not in the first step, if there are none
            self._policy = policy

    @torch.no_grad()
    def predict_noise(self, query: DenoiserQuery) -> Float[Tensor, "n c h w"]:
        with self._policy.adapters_disabled():
            return self._policy.predict_noise(query)


class FrozenCopy(Reference):
    """A deep copy of the denoiser as it was before training; for full fine-tuning. Costs its memory once more.

    Kept in the policy's own dtype: at DPO's beta, a reference in fp16 beside a policy in fp32 moves the loss's
    argument by 0.06 (one standard deviation) where 0 is exact.

    Under bf16-mixed its linear and convolutional layers may be held in bf16 (``dtype``): half the memory of nearly all
    of it. There autocast rounds these layers' weights to bf16 at every pass, and rounded once they are the same: what
    it predicts is equal bit for bit. All other weights (norms) stay as they are.

    Args:
        dtype: number type of its linear and convolutional layers; None is the policy's.

    Raises:
        ConfigError: on ``attach``, a quantised policy, whose adapters can be switched off for nothing; bf16 outside of
            bf16-mixed, when it is first asked.
    """

    def __init__(self, dtype: Literal["bf16"] | None = None) -> None:
        self.dtype = dtype

    def attach(self, policy: DiffusionPolicy) -> None:
        if policy.quantisation is not None:
            raise ConfigError(
                f"FrozenCopy reference: the policy's base is quantised ({type(policy.quantisation).__name__}) to save "
                "memory, which a copy would take again; use AdapterOff"
            )
        self._policy = policy
        self._denoiser: nn.Module = deep_copy(policy.denoiser).requires_grad_(False).eval()
        if self.dtype is not None:
            for layer in self._denoiser.modules():
                if isinstance(layer, nn.Linear | nn.Conv2d):  # what autocast rounds
                    layer.to(torch.bfloat16)

    @torch.no_grad()
    def predict_noise(self, query: DenoiserQuery) -> Float[Tensor, "n c h w"]:
        if self.dtype is not None:
            _check_autocast(query.latents.device.type)
        if next(self._denoiser.parameters()).device != query.latents.device:
            self._denoiser.to(query.latents.device)
        return self._policy.predict_noise(query, denoiser=self._denoiser)

    def own_networks(self) -> list[nn.Module]:
        return [self._denoiser]


def _check_autocast(device: str) -> None:
    if not torch.is_autocast_enabled(device) or torch.get_autocast_dtype(device) != torch.bfloat16:
        raise ConfigError(
            "model.reference.dtype bf16 equals the policy's start under bf16-mixed alone, and this run computes in "
            "another precision; set trainer.precision to bf16-mixed, or leave model.reference.dtype out"
        )
