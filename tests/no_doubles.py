"""A device without fp64, as Apple's, on any machine."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

MPS = torch.device("mps")


class NoDoubles(TorchFunctionMode):
    """Within it some tensors say that they lie on such a device, and what is moved there, too; both refuse fp64.

    What is computed of them is not followed.
    """

    def __init__(self, *there: Tensor) -> None:
        super().__init__()
        self.there = list(there)

    def holds(self, value: Any) -> bool:
        return any(value is held for held in self.there)

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is Tensor.to and args[1:2] == (MPS,):
            assert args[0].dtype != torch.float64
            self.there.append(args[0].clone())
            return self.there[-1]
        if args and self.holds(args[0]):
            if function == Tensor.device.__get__:  # type: ignore[attr-defined]
                return MPS
            if function is Tensor.cpu:
                return args[0].clone()
            if function is Tensor.double:
                raise TypeError("this device has no fp64")
        return function(*args, **(kwargs or {}))
