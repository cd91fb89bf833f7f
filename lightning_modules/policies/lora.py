"""Low-rank adapters: trained beside the frozen weights, and written as plain diffusers loads them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer

from lightning_modules.errors import ConfigError
from lightning_modules.policies.adaptation import Adaptation
from lightning_modules.policies.base import DiffusionPolicy


@dataclass(frozen=True)
class LoRA(Adaptation):
    """Low-rank adapters on the denoiser (arXiv 2106.09685): W x + alpha / rank * B A x, with B = 0 at the start.

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

    def apply(self, policy: DiffusionPolicy) -> None:
        denoiser: Any = policy.denoiser
        # peft scales by lora_alpha / r, whatever number type it is given; its annotation says int.
        alpha = self.rank if self.alpha is None else self.alpha
        config = LoraConfig(
            r=self.rank,
            lora_alpha=alpha,  # type: ignore[arg-type]
            target_modules=list(self.targets),
            init_lora_weights="gaussian" if self.init == "gaussian" else True,
        )
        try:
            denoiser.add_adapter(config)
        except ValueError as error:
            reason = " ".join(str(error).split())
            raise ConfigError(
                f"LoRA: rank {self.rank}, targets {self.targets} do not fit this denoiser; "
                f"name the ends of its layers, such as to_q. ({reason})"
            ) from error
        for name, parameter in denoiser.named_parameters():
            parameter.requires_grad_(".lora_" in name)
            if parameter.requires_grad:
                # peft gives adapters the dtype of the layer that they adapt; updates need fp32.
                parameter.data = parameter.data.to(torch.float32)

    @contextmanager
    def disabled(self, policy: DiffusionPolicy) -> Iterator[None]:
        layers = [module for module in policy.denoiser.modules() if isinstance(module, BaseTunerLayer)]
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

    def write(self, policy: DiffusionPolicy, folder: Path) -> None:
        name, denoiser = policy.denoiser_name, policy.denoiser
        policy.lora_loader.save_lora_weights(
            folder,
            **{
                f"{name}_lora_layers": convert_state_dict_to_diffusers(get_peft_model_state_dict(denoiser)),
                # Without it a reader assumes alpha = rank.
                f"{name}_lora_adapter_metadata": denoiser.peft_config["default"].to_dict(),  # type: ignore[union-attr,index]
            },
        )
