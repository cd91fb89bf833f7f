"""What the rest of the framework may ask of a text-to-image diffusion model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lightning_modules.batches import Conditioning, DenoiserQuery
from lightning_modules.policies.quantisation import Quantisation
from lightning_modules.schedules.base import Schedule


class DiffusionPolicy(nn.Module, ABC):
    """A denoiser with its autoencoder, text encoders and noise schedule. Only subclasses know networks.

    Attributes:
        schedule: the noise schedule that the checkpoint was trained with.
        latent_channels: c.
        downscale: pixels per latent cell, along one side.
        image_size: side of the pictures it makes, in pixels, unless told otherwise.
        denoiser_name: the denoiser's name in a diffusers pipeline's folder.
        lora_loader: diffusers' mixin that reads and writes LoRA files of this kind of model.
        lora_targets: names' ends of the denoiser's layers that get an adapter where none are named.
        writes_kohya: whether other programs read its LoRA files under kohya's names, which for transformers are others.
        blocks: classes of the denoiser's repeating blocks: what is gathered at a time where weights are sharded, and
            whose linear layers are quantised.
        quantisation: how the denoiser's frozen weights are held; None as they are loaded.
    """

    schedule: Schedule
    latent_channels: int
    downscale: int
    image_size: int
    denoiser_name: ClassVar[str] = "unet"
    lora_loader: ClassVar[Any]
    lora_targets: ClassVar[tuple[str, ...]] = ("to_q", "to_k", "to_v", "to_out.0")
    writes_kohya: ClassVar[bool] = True
    blocks: tuple[type[nn.Module], ...] = ()
    quantisation: Quantisation | None = None

    @property
    @abstractmethod
    def denoiser(self) -> nn.Module:
        """The network under training; what a ``FrozenCopy`` reference copies."""

    @abstractmethod
    def encoders(self) -> Mapping[str, nn.Module]:
        """What turns pictures and prompts into latents and conditioning, by name in a diffusers pipeline's folder:
        the autoencoder, ``vae``, and then every ``text_encoder...``, which are read again where a text cache has freed
        them."""

    def encoding_settings(self) -> Mapping[str, Any]:
        """What the encoders' outputs depend on besides their weights and configurations, as plain values."""
        return {}

    @property
    def device(self) -> torch.device:
        return next(self.denoiser.parameters()).device

    @abstractmethod
    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """One row per prompt, padded or cut to the tokenizer's length.

        Gradients flow only if the text encoder trains.
        """

    @abstractmethod
    def encode_images(
        self, images: Float[Tensor, "n 3 H W"], generators: Sequence[torch.Generator] | None = None
    ) -> Float[Tensor, "n c h w"]:
        """VAE latents times the scaling factor, fp32, without gradient.

        Args:
            images: RGB in [-1, 1].
            generators: one per picture, to draw from the VAE's posterior; None takes its mean.
        """

    @abstractmethod
    def decode(self, latents: Float[Tensor, "n c h w"]) -> Float[Tensor, "n 3 H W"]:
        """RGB in [0, 1], fp32, without gradient."""

    @abstractmethod
    def predict_noise(self, query: DenoiserQuery, denoiser: nn.Module | None = None) -> Float[Tensor, "n c h w"]:
        """The denoiser's raw output (noise, or velocity for a v-prediction model) with guidance applied, in fp32.

        Guidance contrasts with the negative (by default empty) prompt and carries gradient through both branches.

        Args:
            query: where to evaluate it.
            denoiser: a copy of ``self.denoiser`` to use in its place; None uses the policy's own.
        """

    @abstractmethod
    def adapters_disabled(self) -> AbstractContextManager[None]:
        """Within it the policy computes as it did before training; ``requires_grad`` is afterwards as it was.

        Raises:
            ConfigError: the policy has no adapters.
        """

    @abstractmethod
    def save_pretrained(self, folder: Path) -> None:
        """Write what plain diffusers loads: LoRA weights for ``load_lora_weights``, or the denoiser's folder."""
