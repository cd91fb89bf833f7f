"""Are these the weights that are wanted? One wording for everything that loads some."""

from __future__ import annotations

import pickle
import struct
from collections.abc import Collection, Mapping
from json import JSONDecodeError

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import Tensor

# What safetensors, torch.load and the libraries around them raise for files that are damaged or of another kind.
UNREADABLE = (
    OSError,
    EOFError,
    RuntimeError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    ArithmeticError,
    AssertionError,
    struct.error,
    pickle.UnpicklingError,
    SafetensorError,
    StrictDataclassError,  # a configuration's entry of another type
)
# Of these, what a file with wrong bytes causes.
DAMAGED = (EOFError, struct.error, pickle.UnpicklingError, SafetensorError, UnicodeDecodeError, JSONDecodeError)


def mismatch(wanted: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> str | None:
    """What of two sets of named tensors differs in name or shape, for a message; None if nothing does."""
    missing, unknown = wanted.keys() - found.keys(), found.keys() - wanted.keys()
    reshaped = [name for name in wanted.keys() & found.keys() if wanted[name].shape != found[name].shape]
    return described(missing, unknown, reshaped)


def described(missing: Collection[str], unknown: Collection[str], reshaped: Collection[str]) -> str | None:
    """How many names of each kind there are, with an example; None if there are none."""
    if not (missing or unknown or reshaped):
        return None
    return f"{_few(missing)} missing, {_few(unknown)} unknown, {_few(reshaped)} of another shape"


def _few(names: Collection[str]) -> str:
    return f"{len(names)} ({min(names)}, ...)" if names else "0"
