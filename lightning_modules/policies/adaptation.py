"""What of a policy trains, and how the result is written for plain diffusers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from lightning_modules.errors import ConfigError
from lightning_modules.files import atomic_folder
from lightning_modules.policies.base import DiffusionPolicy


class Adaptation(ABC):
    """Which weights train, as a strategy: subclass it as a frozen dataclass.

    Attributes:
        trains_denoiser_weights: whether the denoiser's own weights train (and therefore are held in fp32).
        trains_text_encoders: whether the text encoders' weights do.
    """

    trains_denoiser_weights: bool = False
    trains_text_encoders: bool = False

    @abstractmethod
    def apply(self, policy: DiffusionPolicy) -> None:
        """Make exactly the trained weights of the frozen policy require gradients; they are fp32 afterwards.

        Networks whose own weights train are loaded in fp32, see the attributes.
        """

    @abstractmethod
    def disabled(self, policy: DiffusionPolicy) -> AbstractContextManager[None]:
        """Within it the policy computes as if it had never been adapted.

        Raises:
            ConfigError: the adaptation overwrites the weights, so that there is nothing to switch off.
        """

    @abstractmethod
    def write(self, policy: DiffusionPolicy, folder: Path) -> None:
        """Write the trained weights into an empty folder, as plain diffusers reads them."""

    def save(self, policy: DiffusionPolicy, folder: Path) -> None:
        """``write``, but never leaving a half-written file under its final name."""
        with atomic_folder(folder) as new:
            self.write(policy, new)


@dataclass(frozen=True)
class Frozen(Adaptation):
    """Nothing trains: the policy draws pictures for something else that does, such as a preference model."""

    def apply(self, policy: DiffusionPolicy) -> None:
        """Loaded networks are frozen already."""

    def disabled(self, policy: DiffusionPolicy) -> AbstractContextManager[None]:
        return nullcontext()

    def write(self, policy: DiffusionPolicy, folder: Path) -> None:
        raise ConfigError("Frozen adaptation: no weight of the policy was trained; remove the callback that exports it")


@dataclass(frozen=True)
class FullFineTuning(Adaptation):
    """Every weight of the denoiser trains, in fp32.

    Attributes:
        text_encoder: whether the text encoder (both of SDXL) trains too.
    """

    text_encoder: bool = False

    trains_denoiser_weights = True

    @property
    def trains_text_encoders(self) -> bool:  # type: ignore[override]
        return self.text_encoder

    def apply(self, policy: DiffusionPolicy) -> None:
        for network in self._trained(policy).values():
            network.requires_grad_(True)

    def disabled(self, policy: DiffusionPolicy) -> AbstractContextManager[None]:
        raise ConfigError(
            "AdapterOff reference: full fine-tuning has no adapters to switch off; "
            "use the FrozenCopy reference, or the LoRA adaptation."
        )

    def write(self, policy: DiffusionPolicy, folder: Path) -> None:
        for name, network in self._trained(policy).items():
            network.save_pretrained(folder / name)  # type: ignore[operator]

    def _trained(self, policy: DiffusionPolicy) -> dict[str, nn.Module]:
        found = {policy.denoiser_name: policy.denoiser}
        if self.text_encoder:
            found |= {name: network for name, network in policy.encoders().items() if name != "vae"}
        return found
