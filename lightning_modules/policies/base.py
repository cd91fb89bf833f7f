"""What the rest of the framework may ask of a text-to-image diffusion model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lightning_modules.batches import Conditioning, DenoiserQuery
from lightning_modules.schedules.base import Schedule


class DiffusionPolicy(nn.Module, ABC):
    """A denoiser with its autoencoder, text encoders and noise schedule. Only subclasses know networks.

    Attributes:
        schedule: the noise schedule that the checkpoint was trained with.
        latent_channels: c.
        downscale: pixels a latent cell, along one side.
        image_size: side of the pictures it makes, in pixels, unless told otherwise.
        blocks: classes of the denoiser's repeating blocks: what is gathered at a time where weights are sharded.
    """

    schedule: Schedule
    latent_channels: int
    downscale: int
    image_size: int
    blocks: tuple[type[nn.Module], ...] = ()

    @property
    @abstractmethod
    def denoiser(self) -> nn.Module:
        """The network under training; what a ``FrozenCopy`` reference copies."""

    @property
    def device(self) -> torch.device:
        return next(self.denoiser.parameters()).device

    @abstractmethod
    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """One row a prompt, padded or cut to the tokenizer's length. Gradients flow only if the text encoder trains."""

    @abstractmethod
    def encode_images(
        self, images: Float[Tensor, "n 3 H W"], generators: Sequence[torch.Generator] | None = None
    ) -> Float[Tensor, "n c h w"]:
        """VAE latents times the scaling factor, fp32, without gradient.

        Args:
            images: RGB in [-1, 1].
            generators: one a picture to draw from the VAE's posterior; None takes its mean.
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

    @property
    def trainable_names(self) -> tuple[str, ...]:
        """Names of the parameters under training, as in ``named_parameters()``."""
        return tuple(name for name, parameter in self.named_parameters() if parameter.requires_grad)

    def trainable_parameters(self) -> Iterable[nn.Parameter]:
        """The parameters under training, in the order of ``trainable_names``; fp32 whatever the rest is."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    @abstractmethod
    def save_pretrained(self, folder: Path) -> None:
        """Write what plain diffusers loads: LoRA weights for ``load_lora_weights``, or a ``unet`` folder."""
