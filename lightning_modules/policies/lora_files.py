"""Files of LoRA weights: diffusers' own kind, and the kind that kohya's scripts write and most other programs read.

Whatever is written has alpha = rank: the scale is part of B, so that no reader can get it wrong.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import convert_unet_state_dict_to_peft
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from lightning_modules.errors import ConfigError
from lightning_modules.policies.base import DiffusionPolicy
from lightning_modules.weights.audit import UNREADABLE
from lightning_modules.weights.state_dicts import find_weights

FILE = "pytorch_lora_weights.safetensors"  # the name that diffusers looks for


def write_lora(folder: Path, policy: DiffusionPolicy, weights: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    """Write adapters for plain diffusers and, as ``kohya/lora.safetensors``, for programs that read kohya's kind.

    Keys are peft's as they are. diffusers' own conversion, which renames some for UNets, would make its loader of SD3
    drop half of a transformer's with no more than a warning. ComfyUI reads a transformer's file under these names, too.

    Args:
        folder: exists; ``load_lora_weights(folder)`` reads the first.
        policy: whose adapters they are.
        weights: ``<layer>.lora_A.weight`` and ``<layer>.lora_B.weight`` of every layer, with scale 1.
        config: peft's configuration of them, which goes into the file's metadata.
    """
    name = policy.denoiser_name
    plain = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
    policy.lora_loader.save_lora_weights(
        folder, **{f"{name}_lora_layers": dict(weights), f"{name}_lora_adapter_metadata": plain}
    )
    _sort_metadata(folder / FILE)
    if not policy.writes_kohya:
        return
    (folder / "kohya").mkdir()
    save_file(_as_kohya(weights), folder / "kohya" / "lora.safetensors", metadata={"format": "pt"})


def _sort_metadata(file: Path) -> None:
    """safetensors writes the metadata's entries in an order that differs from process to process."""
    with file.open("r+b") as opened:
        size = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        opened.seek(8)
        opened.write(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(size))


def _as_kohya(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``lora_unet_<layer with underscores>.lora_down.weight``, ``.lora_up.weight`` and ``.alpha``, in the layers' names
    of diffusers, as kohya's scripts write them for SD 1.x and as readers take them for SDXL, too."""
    found = {}
    for key, value in weights.items():
        layer, _, kind = key.removesuffix(".weight").rpartition(".")
        other = "lora_unet_" + layer.replace(".", "_")
        found[f"{other}.lora_{'down' if kind == 'lora_A' else 'up'}.weight"] = value.contiguous()
        if kind == "lora_A":
            found[f"{other}.alpha"] = torch.tensor(float(value.shape[0]))
    return found


def read_lora(name: str, policy: DiffusionPolicy) -> dict[str, Tensor]:
    """``read_lora_of`` for a policy's denoiser."""
    denoiser: Any = policy.denoiser
    return read_lora_of(name, type(policy), denoiser.config)


def read_lora_of(name: str, kind: type[DiffusionPolicy], config: Any) -> dict[str, Tensor]:
    """Adapters of a denoiser out of a file of either kind: ``<layer>.lora_A.weight``, ``.lora_B.weight``, fp32, with
    scale 1.

    Args:
        kind: the policy's class.
        config: the denoiser's configuration.
        name: a ``.safetensors`` file, a folder that holds one, or ``organisation/name/file`` on the hub.

    Raises:
        ConfigError: no such file, damaged, or it adapts other networks than the denoiser.
    """
    file = _find(name)
    try:
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata() or {}
            tensors = {key: opened.get_tensor(key).float() for key in opened.keys()}  # noqa: SIM118  # no iterator
        settings = json.loads(metadata.get("lora_adapter_metadata", "{}"))
        if kind.writes_kohya:
            _fold_alphas(tensors)
            found, _ = kind.lora_loader.lora_state_dict(dict(tensors), unet_config=config)
        else:
            found = tensors
    except UNREADABLE as error:
        reason = " ".join(str(error).split())[:300]
        raise ConfigError(
            f"LoRA weights {file}: damaged or of a kind that diffusers does not know. ({reason})"
        ) from error
    prefix = f"{kind.denoiser_name}."
    others = sorted({key.split(".")[0] for key in found if not key.startswith(prefix)})
    if others:
        raise ConfigError(
            f"LoRA weights {file}: they adapt {', '.join(others)}, too, and only the {kind.denoiser_name} is adapted "
            f"here; give a file with its layers alone"
        )
    weights = {key.removeprefix(prefix): value for key, value in found.items()}
    if kind.writes_kohya:
        weights = convert_unet_state_dict_to_peft(weights)
    elif not all(key.endswith((".lora_A.weight", ".lora_B.weight")) for key in weights):
        raise ConfigError(
            f"LoRA weights {file}: for a {kind.denoiser_name} they are read under peft's names alone, "
            f"{kind.denoiser_name}.<layer>.lora_A.weight; give a file of diffusers' newer kind"
        )
    if (
        settings.get(f"{prefix}alpha_pattern")
        or settings.get(f"{prefix}use_rslora")
        or settings.get(f"{prefix}use_dora")
    ):
        raise ConfigError(f"LoRA weights {file}: alphas of single layers, rsLoRA and DoRA are not supported")
    if f"{prefix}lora_alpha" in settings:
        for key in (key for key in weights if ".lora_B." in key):
            weights[key] = weights[key] * (settings[f"{prefix}lora_alpha"] / weights[key].shape[1])
    return weights


def _fold_alphas(tensors: dict[str, Tensor]) -> None:
    """Make kohya's alphas a part of B: without one the scale is 1."""
    for key in [key for key in tensors if key.endswith(".alpha")]:
        layer, alpha = key.removesuffix(".alpha"), tensors.pop(key).item()
        tensors[f"{layer}.lora_up.weight"] *= alpha / tensors[f"{layer}.lora_down.weight"].shape[0]


def _find(name: str) -> Path:
    path = Path(name).expanduser()
    if path.is_dir():
        inside = sorted(path.glob("*.safetensors"))
        named = [file for file in inside if file.name == FILE] or inside
        if len(named) == 1:
            return named[0]
        raise ConfigError(f"LoRA weights {name!r}: the folder holds {len(inside)} .safetensors files; name one of them")
    return find_weights(name, "LoRA weights", (".safetensors",))
