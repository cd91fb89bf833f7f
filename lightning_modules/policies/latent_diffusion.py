"""What Stable Diffusion 1.x, 2.x, XL and their successors have in common: a denoiser in the latent space of a VAE."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from diffusers import AutoencoderKL, DDIMScheduler
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from jaxtyping import Float
from torch import Tensor, nn

from lightning_modules.batches import Conditioning, DenoiserQuery
from lightning_modules.errors import ConfigError
from lightning_modules.files import resolved_path
from lightning_modules.policies.adaptation import Adaptation
from lightning_modules.policies.compiling import blocks_of, compile_parts
from lightning_modules.policies.merged_upsampling import merge_upsampling
from lightning_modules.policies.quantisation import Quantisation
from lightning_modules.policies.text_conditioned import TextConditioned
from lightning_modules.randomness import randn
from lightning_modules.schedules.base import Schedule
from lightning_modules.schedules.discrete import NoiseSchedule
from lightning_modules.weights.pretrained import DTYPES, Pretrained

# What a CPU's autoencoder takes at once: the activations of more are so large that malloc has them mapped and cleared
# anew for every layer, which made up a fifth of the time.
CPU_PIXELS = 2**17


class LatentDiffusion(TextConditioned):
    """A diffusers pipeline taken apart. Networks that don't train stay frozen and in eval mode.

    A new kind of base model sets ``denoiser_class``, ``denoiser_name``, ``lora_loader`` and ``blocks``, and writes
    ``_load_text``, ``_encode_text`` and ``_denoise``. Its networks are attributes named as in the pipeline's folder:
    the denoiser, ``vae``, and every ``text_encoder...``.

    The VAE and frozen text encoders compute in ``frozen_dtype`` whatever autocast says, so that their results
    are the same in training, in validation and when data is encoded beforehand. The denoiser follows autocast.

    Args:
        pretrained: the pipeline: a folder, a folder of the installed ``experiments`` package
            (``embedded/shapes``), or a hub id; or a single ``.safetensors`` file, with ``layout``.
        adaptation: what trains.
        revision: branch, tag or commit of ``pretrained`` on the hub.
        variant: the weights' file variant, such as "fp16".
        denoiser: another denoiser: the folder or ``organisation/name/subfolder`` that holds its config.json.
        vae: another VAE, likewise, such as ``madebyollin/sdxl-vae-fp16-fix``.
        frozen_dtype: number type of the VAE, frozen text encoders and the denoiser's frozen weights. What trains is
            fp32 always.
        gradient_checkpointing: recompute the denoiser's activations in the backward pass: less memory, more time.
        layout: for a single file: folder or hub id of a pipeline of the same kind, from which the configurations,
            tokenizers and scheduler come. Its weights are not read.
        negative_prompt: what guidance contrasts with. None is what the diffusers pipelines do when none is given:
            the empty prompt for SD, zeros for SDXL.
        quantisation: how the denoiser's weights are held while a LoRA trains beside them (``Fp8Casting``, ``TorchAo``,
            ``NF4``); None as ``frozen_dtype`` says. It rounds them, so that the base is another one.
        text_cache: folder of embeddings by caption, filled by ``experiments.encode_prompts``, in place of the text
            encoders, which are freed before anything goes to a GPU. A caption that it lacks ends the run; every caption
            that the config names is in it.
        compile: compile the denoiser's blocks and the VAE's decoder when they are first called: minutes, once for each
            shape. What they compute moves by rounding, in sampling and training alike; not with fsdp2.
        channels_last: hold the denoiser's and the VAE's weights with channels innermost, as a GPU's convolutions want
            them. What they compute moves by rounding; files and checkpoints hold the same. Not with fsdp2.
        merged_upsampling: have the VAE's decoder double a map and convolve it as one convolution of the small map, with
            15% fewer products in all. Pictures move by rounding.

    Raises:
        ConfigError: missing or damaged weights, a base model of another kind, a VAE with normalisation that is not
            supported, a text cache of other encoders, or ``merged_upsampling`` where nothing can be merged.
    """

    denoiser_class: ClassVar[Any]

    def __init__(
        self,
        pretrained: str,
        adaptation: Adaptation,
        revision: str | None = None,
        variant: str | None = None,
        denoiser: str | None = None,
        vae: str | None = None,
        frozen_dtype: Literal["fp32", "bf16", "fp16"] = "fp32",
        gradient_checkpointing: bool = False,
        negative_prompt: str | None = "",
        layout: str | None = None,
        quantisation: Quantisation | None = None,
        text_cache: str | None = None,
        compile: bool = False,
        channels_last: bool = False,
        merged_upsampling: bool = False,
    ) -> None:
        super().__init__()
        if quantisation is not None:
            check_quantisation(quantisation, adaptation)
        if text_cache is not None and adaptation.trains_text_encoders:
            raise ConfigError("model.policy.text_cache holds embeddings that training the text encoders would change")
        self.quantisation = quantisation
        self.adaptation = adaptation
        self.negative_prompt = negative_prompt
        self._frozen_dtype = DTYPES[frozen_dtype]
        pipeline = Pretrained.find(pretrained, revision, layout)
        trained_dtype = torch.float32 if adaptation.trains_denoiser_weights else self._frozen_dtype
        denoiser_source = component_source(pipeline, self.denoiser_name, denoiser)
        self._check_denoiser(denoiser_source.load(self.denoiser_class.load_config))
        network = denoiser_source.load_model(self.denoiser_class, trained_dtype, None if denoiser else variant)
        self.add_module(self.denoiser_name, network)
        vae_source = component_source(pipeline, "vae", vae)
        self.vae = vae_source.load_model(AutoencoderKL, self._vae_dtype(vae_source), None if vae else variant)
        text_dtype = torch.float32 if adaptation.trains_text_encoders else self._frozen_dtype
        self._text_source = pipeline, variant, text_dtype
        self._load_text(*self._text_source)
        self.schedule = self._load_schedule(pipeline)
        self._read_sizes()
        if gradient_checkpointing:
            network.enable_gradient_checkpointing()
        self.requires_grad_(False)
        if quantisation is not None:  # first: adapters are of the kind of the layers that they adapt
            quantisation.apply(network, self.blocks)
        adaptation.apply(self)
        if text_cache is not None:
            self.use_texts(resolved_path(text_cache))
        self._set_levers(network, channels_last, merged_upsampling, compile)
        self.train()

    def _set_levers(self, network: Any, channels_last: bool, merged_upsampling: bool, compile: bool) -> None:
        """Other layouts and kernels of the same computation. What names pools after the policy sees them."""
        if channels_last:
            self.channels_last = True
            for part in (network, self.vae):
                part.to(memory_format=torch.channels_last)
        if merged_upsampling and not merge_upsampling(self.vae.decoder):
            raise ConfigError(
                "model.policy.merged_upsampling: the VAE's decoder has no upsampling layer to merge; leave it out"
            )
        if compile:
            self.compiled = True
            compile_parts([*blocks_of(network, self.blocks), self.vae.decoder])

    # What a kind of base model has of its own

    @abstractmethod
    def _denoise(
        self, network: Any, latents: Float[Tensor, "n c h w"], timesteps: Tensor, cond: Conditioning
    ) -> Float[Tensor, "n c h w"]:
        """The raw output of ``network``, which is the denoiser or a copy of it, without guidance; fp32."""

    def _completed(self, cond: Conditioning, latents: Float[Tensor, "n c h w"]) -> Conditioning:
        """The conditioning reduced or filled up to what the denoiser reads."""
        return cond

    def _load_schedule(self, pipeline: Pretrained) -> Schedule:
        self.scheduler_config = self._read_scheduler_config(pipeline)
        return NoiseSchedule.from_scheduler_config(self.scheduler_config)

    def _read_scheduler_config(self, pipeline: Pretrained) -> Mapping[str, Any]:
        """The scheduler's configuration as diffusers' pipeline of this kind takes it."""
        config: Mapping[str, Any] = pipeline.component("scheduler").load(DDIMScheduler.load_config, kind="scheduler")
        return config

    def _check_denoiser(self, config: Mapping[str, Any]) -> None:
        """
        Raises:
            ConfigError: the denoiser of another kind of base model.
        """

    def _vae_dtype(self, source: Pretrained) -> torch.dtype:
        return self._frozen_dtype

    def _read_sizes(self) -> None:
        config = self.vae.config
        if getattr(config, "latents_mean", None) is not None:
            raise ConfigError("VAE: per-channel latents_mean and latents_std are not supported; use another VAE.")
        self.latent_channels = config.latent_channels
        channels = self._channels_read()
        if channels != self.latent_channels:
            raise ConfigError(
                f"base model: its {self.denoiser_name} reads {channels} channels and its VAE's latents have "
                f"{self.latent_channels}; models for inpainting, editing or upscaling are not supported, give one for "
                "text to image"
            )
        self.downscale = 2 ** (len(config.block_out_channels) - 1)
        self.image_size = self._own_size()

    def _channels_read(self) -> int:
        """How many of the latents' channels the denoiser is made for."""
        return self.denoiser.config.in_channels

    def _own_size(self) -> int:
        return self.denoiser.config.sample_size * self.downscale

    # Networks

    @property
    def denoiser(self) -> Any:
        return getattr(self, self.denoiser_name)

    def train(self, mode: bool = True) -> LatentDiffusion:
        super().train(mode)
        self.vae.eval()
        for encoder in self._text_encoders().values():
            encoder.train(mode and self.adaptation.trains_text_encoders)
        return self

    # Pictures

    @torch.no_grad()
    def encode_images(
        self, images: Float[Tensor, "n 3 H W"], generators: Sequence[torch.Generator] | None = None
    ) -> Float[Tensor, "n c h w"]:
        with self._without_autocast():
            parts = self._parts(images.to(self.vae.dtype), images.shape[-2] * images.shape[-1])
            moments = torch.cat([self.vae.encode(part).latent_dist.parameters for part in parts])
        posterior = DiagonalGaussianDistribution(moments)
        latents = posterior.mean.float()
        if generators is not None:
            latents = latents + posterior.std.float() * randn(latents.shape[1:], generators, latents.device)
        config = self.vae.config
        return (latents - (config.shift_factor or 0.0)) * config.scaling_factor

    @torch.no_grad()
    def decode(self, latents: Float[Tensor, "n c h w"]) -> Float[Tensor, "n 3 H W"]:
        config = self.vae.config
        unscaled = latents.float() / config.scaling_factor + (config.shift_factor or 0.0)
        with self._without_autocast():
            pixels = latents.shape[-2] * latents.shape[-1] * self.downscale**2
            parts = self._parts(unscaled.to(self.vae.dtype), pixels)
            images = torch.cat([self.vae.decode(part).sample for part in parts])
        return (images.float() / 2 + 0.5).clamp(0, 1)

    def _parts(self, batch: Tensor, pixels: int) -> Sequence[Tensor]:
        """What the autoencoder takes at once of pictures, or latents of pictures, of that many pixels each."""
        return batch.split(max(1, CPU_PIXELS // pixels)) if batch.device.type == "cpu" else (batch,)

    # Denoising

    def predict_noise(self, query: DenoiserQuery, denoiser: nn.Module | None = None) -> Float[Tensor, "n c h w"]:
        network = self.denoiser if denoiser is None else denoiser
        cond = self._completed(query.cond, query.latents)
        if query.guidance_scale == 1:
            return self._denoise(network, query.latents, query.timesteps, cond)
        negative = self._completed(self._negative(len(cond)).with_time_ids(cond.time_ids), query.latents)
        both = self._denoise(
            network,
            torch.cat([query.latents, query.latents]),
            torch.cat([query.timesteps, query.timesteps]),
            Conditioning.cat([negative, cond]),
        )
        unguided, conditional = both.chunk(2)
        return unguided + query.guidance_scale * (conditional - unguided)

    # Training and export

    def adapters_disabled(self) -> AbstractContextManager[None]:
        return self.adaptation.disabled(self)

    def save_pretrained(self, folder: Path) -> None:
        self.adaptation.save(self, Path(folder))


def check_quantisation(quantisation: Quantisation, adaptation: Adaptation) -> None:
    """
    Raises:
        ConfigError: a package is missing, or the weights that it rounds are to train.
    """
    if adaptation.trains_denoiser_weights:
        raise ConfigError(
            f"model.policy.quantisation {type(quantisation).__name__} rounds the denoiser's weights, and "
            f"{type(adaptation).__name__} trains them; use the LoRA adaptation, or leave quantisation out"
        )
    quantisation.check()


def component_source(pipeline: Pretrained, name: str, override: str | None) -> Pretrained:
    """Where a component comes from: the pipeline, or the place that ``override`` names."""
    return pipeline.component(name) if override is None else Pretrained.find(override)
