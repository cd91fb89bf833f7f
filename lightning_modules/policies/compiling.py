"""Networks compiled part by part, in place: ``policy.compile``."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable
from typing import TypeVar

from torch import nn

Network = TypeVar("Network", bound=nn.Module)

# torch keeps what it compiled of all parts in one list, by shape and by whether gradients are wanted: a UNet's blocks
# alone are dozens, and beyond the limit (8) it would compile no more.
MOST_VARIANTS = 1024


def blocks_of(network: nn.Module, kinds: tuple[type[nn.Module], ...]) -> list[nn.Module]:
    """The parts of a network that are of some classes."""
    return [part for part in network.modules() if isinstance(part, kinds)]


def compile_parts(parts: Iterable[nn.Module]) -> None:
    """Have each part compiled by ``torch.compile`` when it is first called, and again for every other shape.

    In place: modules, names and weights stay what they are. For every shape on its own, and not once for shapes that
    vary: what is computed then depends on the shapes alone, and not on those that the process met before, which a
    resumed run's did not.
    """
    import torch._dynamo.config as limits  # takes a second

    limits.recompile_limit = max(limits.recompile_limit, MOST_VARIANTS)
    limits.accumulated_recompile_limit = max(limits.accumulated_recompile_limit, MOST_VARIANTS)
    # torch itself asks for it when it traces a part that lies behind another one
    warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf Tensor is being accessed")
    for part in parts:
        part.compile(dynamic=False)


def is_compiled(part: nn.Module) -> bool:
    """Whether a call of it runs what ``torch.compile`` made."""
    return part._compiled_call_impl is not None


def deep_copy(network: Network) -> Network:
    """A deep copy whose parts are compiled where the network's are, which torch forgets in copying."""
    copied = copy.deepcopy(network)
    compile_parts(twin for part, twin in zip(network.modules(), copied.modules()) if is_compiled(part))
    return copied
