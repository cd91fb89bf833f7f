"""How a frozen denoiser's weights are held in fewer bits, so that a LoRA of a large model fits a smaller GPU.

All of them hold the weights of the linear layers in the denoiser's blocks, which of a transformer are nearly all, and
leave biases, norms, convolutions and what lies around the blocks as they are. What is computed follows the policy's
``frozen_dtype`` and autocast as before; activations are not quantised.
"""

from __future__ import annotations

import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import linear

from lightning_modules.errors import ConfigError

FP8 = torch.float8_e4m3fn


class Quantisation(ABC):
    """How the weights are held, as a strategy: subclass it as a frozen dataclass.

    Attributes:
        package: what must be installed for it besides this package's own requirements.
    """

    package: ClassVar[str | None] = None

    def check(self) -> None:
        """
        Raises:
            ConfigError: the package that it needs is not installed.
        """
        if self.package is not None and importlib.util.find_spec(self.package) is None:
            raise ConfigError(
                f"{type(self).__name__} needs the package {self.package}, which is not installed: pip install "
                f"{self.package}, or use Fp8Casting, which needs none"
            )

    @abstractmethod
    def apply(self, network: nn.Module, blocks: tuple[type[nn.Module], ...]) -> None:
        """Quantise in place, on the device where the network is.

        Args:
            network: loaded, and without adapters.
            blocks: classes of its blocks.
        """


@dataclass(frozen=True)
class Fp8Casting(Quantisation):
    """Stored as fp8 (e4m3), one byte a number, without a scale; cast to the type of the pass where they are used.

    The weights are those of diffusers' ``enable_layerwise_casting``, which rounds biases, too, and cannot train beside
    them: its backward pass meets fp8 where it needs the cast weights and fails for most number types. Here they are
    cast once more. It needs no package. Weights below 2^-6 lose precision, which ``TorchAo``'s scales avoid.
    """

    def apply(self, network: nn.Module, blocks: tuple[type[nn.Module], ...]) -> None:
        for name, layer in linear_layers(network, blocks):
            network.set_submodule(name, CastLinear(layer))


@dataclass(frozen=True)
class TorchAo(Quantisation):
    """torchao's weight-only quantisation, one byte a number and a scale a row; expanded where they are used.

    Attributes:
        weights: "int8", or "fp8" (e4m3).
    """

    weights: Literal["int8", "fp8"] = "int8"

    package = "torchao"

    def apply(self, network: nn.Module, blocks: tuple[type[nn.Module], ...]) -> None:
        from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, quantize_

        layers = {id(layer) for _, layer in linear_layers(network, blocks)}
        config = Int8WeightOnlyConfig() if self.weights == "int8" else Float8WeightOnlyConfig()
        quantize_(network, config, filter_fn=lambda module, name: id(module) in layers)


@dataclass(frozen=True)
class NF4(Quantisation):
    """bitsandbytes' 4-bit NormalFloat (arXiv 2305.14314) with doubly quantised scales: about 0.52 bytes a number."""

    package = "bitsandbytes"

    def apply(self, network: nn.Module, blocks: tuple[type[nn.Module], ...]) -> None:
        from bitsandbytes.nn import Linear4bit, Params4bit

        for name, layer in linear_layers(network, blocks):
            dtype, device = layer.weight.dtype, layer.weight.device
            with torch.device("meta"):
                held = Linear4bit(
                    layer.in_features, layer.out_features, layer.bias is not None, compute_dtype=dtype, quant_type="nf4"
                )
            held.bias = layer.bias
            held.weight = Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4").to(device)
            network.set_submodule(name, held)


def linear_layers(network: nn.Module, blocks: Sequence[type[nn.Module]]) -> list[tuple[str, nn.Linear]]:
    """The linear layers inside the network's blocks, by name."""
    return list(_linear_layers(network, tuple(blocks), ""))


def _linear_layers(part: Any, blocks: tuple[type[nn.Module], ...], prefix: str) -> Iterator[tuple[str, nn.Linear]]:
    if isinstance(part, blocks):
        for name, module in part.named_modules(prefix=prefix):
            if isinstance(module, nn.Linear):
                yield name, module
        return
    for name, child in part.named_children():
        yield from _linear_layers(child, blocks, f"{prefix}.{name}" if prefix else name)


class CastLinear(nn.Linear):
    """A frozen linear layer whose weight is stored as fp8.

    Args:
        layer: whose weights it takes over; its bias stays as it is.
    """

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        self.compute_dtype = layer.weight.dtype  # peft makes adapters of this type
        self.weight = nn.Parameter(layer.weight.detach().to(FP8), requires_grad=False)
        self.bias = layer.bias

    def forward(self, input: Float[Tensor, "*n {self.in_features}"]) -> Float[Tensor, "*n {self.out_features}"]:
        device = input.device.type
        if torch.is_autocast_enabled(device):
            input = input.to(torch.get_autocast_dtype(device))
        bias = None if self.bias is None else self.bias.to(input.dtype)
        output: Tensor = _CastLinear.apply(input, self.weight, bias)
        return output


class _CastLinear(torch.autograd.Function):
    """Keeps the stored weight for the backward pass, not the expanded one."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return linear(input, weight.to(input.dtype), bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return gradient @ weight.to(gradient.dtype), None, None
