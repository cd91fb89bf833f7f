"""Policies: text-to-image diffusion models behind one interface."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_modules.policies.adaptation import Adaptation, Frozen, FullFineTuning
    from lightning_modules.policies.as_flow import StableDiffusionAsFlow
    from lightning_modules.policies.base import DiffusionPolicy
    from lightning_modules.policies.flux import Flux
    from lightning_modules.policies.latent_diffusion import LatentDiffusion
    from lightning_modules.policies.lora import LoRA
    from lightning_modules.policies.quantisation import NF4, Fp8Casting, Quantisation, TorchAo
    from lightning_modules.policies.sd3 import StableDiffusion3
    from lightning_modules.policies.sdxl import StableDiffusionXL
    from lightning_modules.policies.stable_diffusion import StableDiffusion
    from lightning_modules.policies.tiny_decoder import TinyDecoder

__all__ = [
    "NF4",
    "Adaptation",
    "DiffusionPolicy",
    "Flux",
    "Fp8Casting",
    "Frozen",
    "FullFineTuning",
    "LatentDiffusion",
    "LoRA",
    "Quantisation",
    "StableDiffusion",
    "StableDiffusion3",
    "StableDiffusionAsFlow",
    "StableDiffusionXL",
    "TinyDecoder",
    "TorchAo",
]

# diffusers, peft and transformers take seconds to import: a name brings in its own module alone.
_MODULES = {
    "Adaptation": "adaptation",
    "DiffusionPolicy": "base",
    "Flux": "flux",
    "Fp8Casting": "quantisation",
    "Frozen": "adaptation",
    "FullFineTuning": "adaptation",
    "LatentDiffusion": "latent_diffusion",
    "LoRA": "lora",
    "NF4": "quantisation",
    "Quantisation": "quantisation",
    "StableDiffusion": "stable_diffusion",
    "StableDiffusion3": "sd3",
    "StableDiffusionAsFlow": "as_flow",
    "StableDiffusionXL": "sdxl",
    "TinyDecoder": "tiny_decoder",
    "TorchAo": "quantisation",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
