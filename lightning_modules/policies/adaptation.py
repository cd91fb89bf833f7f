"""What of a policy trains, and how the result is written for plain diffusers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from diffusers.loaders import StableDiffusionLoraLoaderMixin
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from lightning_modules.errors import ConfigError
from lightning_modules.files import atomic_folder


class Adaptation(ABC):
    """Which weights train, as a strategy: subclass it as a frozen dataclass.

    ``networks`` in the methods maps a pipeline's component names (``unet``, ``text_encoder``,
    ``text_encoder_2``) to its networks.

    Attributes:
        trains_unet_weights: whether the UNet's own weights train (and therefore are held in fp32).
        trains_text_encoders: whether the text encoders' weights do.
    """

    trains_unet_weights: bool = False
    trains_text_encoders: bool = False

    @abstractmethod
    def apply(self, networks: Mapping[str, nn.Module]) -> None:
        """Make exactly the trained weights of the frozen networks require gradients; they are fp32 afterwards.

        Networks whose own weights train are loaded in fp32, see the attributes.
        """

    @abstractmethod
    def disabled(self, networks: Mapping[str, nn.Module]) -> AbstractContextManager[None]:
        """Within it the networks compute as if they had never been adapted.

        Raises:
            ConfigError: the adaptation overwrites the weights, so that there is nothing to switch off.
        """

    @abstractmethod
    def write(self, networks: Mapping[str, nn.Module], folder: Path) -> None:
        """Write the trained weights into an empty folder, as plain diffusers reads them."""

    def save(self, networks: Mapping[str, nn.Module], folder: Path) -> None:
        """``write``, but never leaving a half-written file under its final name."""
        with atomic_folder(folder) as new:
            self.write(networks, new)


@dataclass(frozen=True)
class Frozen(Adaptation):
    """Nothing trains: the policy draws pictures for something else that does, such as a preference model."""

    def apply(self, networks: Mapping[str, nn.Module]) -> None:
        """Loaded networks are frozen already."""

    def disabled(self, networks: Mapping[str, nn.Module]) -> AbstractContextManager[None]:
        return nullcontext()

    def write(self, networks: Mapping[str, nn.Module], folder: Path) -> None:
        raise ConfigError("Frozen adaptation: no weight of the policy was trained; remove the callback that exports it")


@dataclass(frozen=True)
class LoRA(Adaptation):
    """Low-rank adapters on the UNet (arXiv 2106.09685): W x + alpha / rank * B A x, with B = 0 at the start.

    Attributes:
        rank: rows of A.
        alpha: numerator of the scale; None takes ``rank``, that is, scale 1.
        targets: names' ends of the layers that get an adapter.
        init: distribution of A: "gaussian" (std 1 / rank, as the diffusers examples and SPO have it) or
            "kaiming" (uniform, peft's default).
    """

    rank: int = 4
    alpha: float | None = None
    targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
    init: Literal["gaussian", "kaiming"] = "gaussian"

    def apply(self, networks: Mapping[str, nn.Module]) -> None:
        unet = networks["unet"]
        # peft scales by lora_alpha / r, whatever number type it is given; its annotation says int.
        alpha = self.rank if self.alpha is None else self.alpha
        config = LoraConfig(
            r=self.rank,
            lora_alpha=alpha,  # type: ignore[arg-type]
            target_modules=list(self.targets),
            init_lora_weights="gaussian" if self.init == "gaussian" else True,
        )
        try:
            unet.add_adapter(config)  # type: ignore[operator]
        except ValueError as error:
            reason = " ".join(str(error).split())
            raise ConfigError(
                f"LoRA: rank {self.rank}, targets {self.targets} do not fit this UNet; "
                f"name the ends of its layers, such as to_q. ({reason})"
            ) from error
        for name, parameter in unet.named_parameters():
            parameter.requires_grad_(".lora_" in name)
            if parameter.requires_grad:
                # peft gives adapters the dtype of the layer that they adapt; updates need fp32.
                parameter.data = parameter.data.to(torch.float32)

    @contextmanager
    def disabled(self, networks: Mapping[str, nn.Module]) -> Iterator[None]:
        layers = [module for module in networks["unet"].modules() if isinstance(module, BaseTunerLayer)]
        # peft clears and sets requires_grad as it switches: put back what was there, frozen or not.
        flags = [(parameter, parameter.requires_grad) for layer in layers for parameter in layer.parameters()]
        for layer in layers:
            layer.enable_adapters(False)
        try:
            yield
        finally:
            for layer in layers:
                layer.enable_adapters(True)
            for parameter, flag in flags:
                parameter.requires_grad_(flag)

    def write(self, networks: Mapping[str, nn.Module], folder: Path) -> None:
        unet = networks["unet"]
        StableDiffusionLoraLoaderMixin.save_lora_weights(
            folder,
            unet_lora_layers=convert_state_dict_to_diffusers(get_peft_model_state_dict(unet)),
            # Without it a reader assumes alpha = rank.
            unet_lora_adapter_metadata=unet.peft_config["default"].to_dict(),  # type: ignore[union-attr,index]
        )


@dataclass(frozen=True)
class FullFineTuning(Adaptation):
    """Every weight of the UNet trains, in fp32.

    Attributes:
        text_encoder: whether the text encoder (both of SDXL) trains too.
    """

    text_encoder: bool = False

    trains_unet_weights = True

    @property
    def trains_text_encoders(self) -> bool:  # type: ignore[override]
        return self.text_encoder

    def apply(self, networks: Mapping[str, nn.Module]) -> None:
        for network in self._trained(networks).values():
            network.requires_grad_(True)

    def disabled(self, networks: Mapping[str, nn.Module]) -> AbstractContextManager[None]:
        raise ConfigError(
            "AdapterOff reference: full fine-tuning has no adapters to switch off; "
            "use the FrozenCopy reference, or the LoRA adaptation."
        )

    def write(self, networks: Mapping[str, nn.Module], folder: Path) -> None:
        for name, network in self._trained(networks).items():
            network.save_pretrained(folder / name)  # type: ignore[operator]

    def _trained(self, networks: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
        return {name: network for name, network in networks.items() if name == "unet" or self.text_encoder}
