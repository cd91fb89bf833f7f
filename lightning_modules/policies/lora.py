"""Low-rank adapters: trained beside the frozen weights, and written as plain diffusers loads them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from lightning_modules.errors import ConfigError
from lightning_modules.policies.adaptation import Adaptation
from lightning_modules.policies.base import DiffusionPolicy
from lightning_modules.policies.lora_files import read_lora, write_lora
from lightning_modules.weights.audit import mismatch


@dataclass(frozen=True)
class LoRA(Adaptation):
    """Low-rank adapters on the denoiser (arXiv 2106.09685): W x + alpha / rank * B A x, with B = 0 at the start.

    Attributes:
        rank: rows of A.
        alpha: numerator of the scale; None takes ``rank``, that is, scale 1.
        targets: names' ends of the layers that get an adapter; None is what the policy's kind of model has: to_q, to_k,
            to_v and to_out.0 for Stable Diffusion and SDXL, those of the official recipes for SD3 and FLUX.
        init: distribution of A: "gaussian" (std 1 / rank, as the diffusers examples and SPO have it) or
            "kaiming" (uniform, peft's default).
        weights: LoRA weights to start from, of diffusers' or kohya's kind: a file, a folder that holds one, or
            ``organisation/name/file`` on the hub. The policy then computes what they compute, whatever their alpha;
            rank and layers must be those of the file. A reference with adapters off is the base without them.

    Raises:
        ConfigError: targets that the denoiser does not have, or weights of other layers or of another rank.
    """

    rank: int = 4
    alpha: float | None = None
    targets: tuple[str, ...] | None = None
    init: Literal["gaussian", "kaiming"] = "gaussian"
    weights: str | None = None

    @property
    def scale(self) -> float:
        """alpha / rank."""
        return 1.0 if self.alpha is None else self.alpha / self.rank

    def _targets(self, policy: DiffusionPolicy) -> tuple[str, ...]:
        return policy.lora_targets if self.targets is None else self.targets

    def apply(self, policy: DiffusionPolicy) -> None:
        denoiser: Any = policy.denoiser
        # peft scales by lora_alpha / r, whatever number type it is given; its annotation says int.
        config = LoraConfig(
            r=self.rank,
            lora_alpha=self.rank if self.alpha is None else self.alpha,  # type: ignore[arg-type]
            target_modules=list(self._targets(policy)),
            init_lora_weights="gaussian" if self.init == "gaussian" else True,
        )
        try:
            with warnings.catch_warnings():  # of peft, that adapters of torchao's layers cannot be merged; none are
                warnings.filterwarnings("ignore", message=".*without `get_apply_tensor_subclass`")
                denoiser.add_adapter(config)
        except ValueError as error:
            reason = " ".join(str(error).split())
            raise ConfigError(
                f"LoRA: rank {self.rank}, targets {self._targets(policy)} do not fit this denoiser; "
                f"name the ends of its layers, such as to_q. ({reason})"
            ) from error
        for name, parameter in denoiser.named_parameters():
            parameter.requires_grad_(".lora_" in name)
            if parameter.requires_grad:
                # peft gives adapters the dtype of the layer that they adapt; updates need fp32.
                parameter.data = parameter.data.to(torch.float32)

        if self.weights is not None:
            self._start_from(self.weights, policy)

    def _start_from(self, name: str, policy: DiffusionPolicy) -> None:
        found = read_lora(name, policy)
        denoiser: Any = policy.denoiser
        difference = mismatch(get_peft_model_state_dict(denoiser), found)
        if difference is not None:
            ranks = sorted({value.shape[0] for key, value in found.items() if ".lora_A." in key})
            layers = sorted({key.split(".lora_")[0] for key in found})
            theirs = f"rank {', '.join(map(str, ranks))} and adapt {len(layers)} layers, {layers[0]} the first"
            raise ConfigError(
                f"LoRA: the weights {name} don't fit rank {self.rank} and targets {', '.join(self._targets(policy))}: "
                f"{difference}; they are of {theirs}"
            )
        rescaled = {key: value / self.scale if ".lora_B." in key else value for key, value in found.items()}
        set_peft_model_state_dict(denoiser, rescaled)

    @contextmanager
    def disabled(self, policy: DiffusionPolicy) -> Iterator[None]:
        layers = _adapted(policy.denoiser)
        before = [layer._disable_adapters for layer in layers]
        # Not by peft's enable_adapters, which goes through all weights and changes requires_grad, at every step.
        for layer in layers:
            layer._disable_adapters = True
        try:
            yield
        finally:
            for layer, flag in zip(layers, before):
                layer._disable_adapters = flag

    def write(self, policy: DiffusionPolicy, folder: Path) -> None:
        denoiser: Any = policy.denoiser
        weights = get_peft_model_state_dict(denoiser)
        folded = {key: value * self.scale if ".lora_B." in key else value for key, value in weights.items()}
        config = denoiser.peft_config["default"].to_dict() | {"lora_alpha": self.rank}
        write_lora(folder, policy, folded, config)


_LAYERS: WeakKeyDictionary[nn.Module, list[BaseTunerLayer]] = WeakKeyDictionary()


def _adapted(network: nn.Module) -> list[BaseTunerLayer]:
    """The layers of an adapted network that have adapters; looked for once, among its thousands of modules."""
    if network not in _LAYERS:
        _LAYERS[network] = [module for module in network.modules() if isinstance(module, BaseTunerLayer)]
    return _LAYERS[network]
