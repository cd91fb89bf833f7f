"""Policies: text-to-image diffusion models behind one interface."""

from lightning_modules.policies.adaptation import Adaptation, Frozen, FullFineTuning, LoRA
from lightning_modules.policies.base import DiffusionPolicy
from lightning_modules.policies.sdxl import StableDiffusionXL
from lightning_modules.policies.stable_diffusion import StableDiffusion
from lightning_modules.policies.tiny_decoder import TinyDecoder

__all__ = [
    "Adaptation",
    "DiffusionPolicy",
    "Frozen",
    "FullFineTuning",
    "LoRA",
    "StableDiffusion",
    "StableDiffusionXL",
    "TinyDecoder",
]
