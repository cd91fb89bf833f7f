"""Trains the autoencoder of a latent diffusion pipeline, so that an embedded world can be made from scratch."""

from __future__ import annotations

from math import cos, pi
from pathlib import Path
from typing import Any

import lightning as L
import torch
from diffusers import AutoencoderKL
from jaxtyping import Float
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from lightning_modules.batches import PreferencePairs
from lightning_modules.errors import ConfigError
from lightning_modules.files import atomic_folder
from lightning_modules.randomness import generator, randn
from lightning_modules.weights.pretrained import Pretrained


def psnr(reconstruction: Float[Tensor, "n 3 h w"], images: Float[Tensor, "n 3 h w"]) -> Float[Tensor, " n"]:
    """Peak signal-to-noise ratio of each picture in decibel; both in [-1, 1], clamped there."""
    error = (reconstruction.clamp(-1, 1) - images).square().mean(dim=(1, 2, 3))
    return 10 * torch.log10(4 / error.clamp_min(1e-12))  # 4: the squared peak of the range [-1, 1]


class AutoencoderModule(L.LightningModule):
    """Trains the ``vae`` of a diffusers pipeline folder on the chosen pictures, and saves it back when it is done.

    The loss is mean |error| + mean error^2 over pixels in [-1, 1], plus the mean |difference of the errors of two
    neighbouring pixels|, because blurred edges are what such a small autoencoder gets wrong, plus ``kl_weight`` times
    the mean over latent elements of KL(posterior || N(0, 1)): just enough to keep the latents bounded (Rombach et al.,
    arXiv 2112.10752, section 3.1). The learning rate warms up and falls to 0 along a cosine.

    At the end ``scaling_factor`` becomes 1 / (standard deviation of the validation pictures' latents), and the folder
    gets the weights in fp16.

    Args:
        pipeline: the pipeline's folder; its ``vae`` says the architecture and where training starts.
        learning_rate: peak of AdamW's rate.
        warmup_steps: optimiser steps to the peak.
        kl_weight: see above.
        freeze_encoder_after: optimizer steps after which the decoder alone trains; None for never. The decoder is
            the bottleneck, and without the encoder's backward a step is cheaper.
        seed: seed of the posterior's noise, which is keyed by sample.

    Raises:
        ConfigError: ``pipeline`` holds no autoencoder, or other weights than its configuration describes.
    """

    def __init__(
        self,
        pipeline: str,
        learning_rate: float = 2e-3,
        warmup_steps: int = 100,
        kl_weight: float = 1e-4,
        freeze_encoder_after: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.folder = Path(pipeline)
        if not (self.folder / "vae" / "config.json").is_file():
            raise ConfigError(
                f"no autoencoder in {self.folder}: want a diffusers pipeline folder with vae/config.json; "
                "make one with python -m experiments.shapes.build_pipeline --output FOLDER"
            )
        self.vae = Pretrained.find(str(self.folder)).component("vae").load_model(AutoencoderKL, torch.float32)
        self.vae.to(memory_format=torch.channels_last).train()  # a fifth of the CPU time of convolutions
        self.learning_rate, self.warmup_steps, self.kl_weight = learning_rate, warmup_steps, kl_weight
        self.freeze_encoder_after, self.seed = freeze_encoder_after, seed
        self._moments = torch.zeros(3, dtype=torch.float64)  # count, sum, sum of squares of the latents

    def training_step(self, batch: PreferencePairs, batch_index: int) -> Tensor:
        if self.freeze_encoder_after is not None and self.global_step >= self.freeze_encoder_after:
            self.vae.encoder.requires_grad_(False)
            self.vae.quant_conv.requires_grad_(False)
        images = batch.chosen.contiguous(memory_format=torch.channels_last)
        posterior = self.vae.encode(images).latent_dist
        noise = randn(posterior.mean.shape[1:], [generator(self.seed, "posterior", n) for n in batch.indices.tolist()])
        error = self.vae.decode(posterior.mean + posterior.std * noise.to(images.device)).sample - images
        divergence = posterior.kl().mean() / posterior.mean[0].numel()
        edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
        loss = error.abs().mean() + error.square().mean() + edges + self.kl_weight * divergence
        self.log_dict({"train/loss": loss.detach(), "train/kl": divergence.detach()}, prog_bar=True)
        return loss

    def on_validation_epoch_start(self) -> None:
        self._moments.zero_()

    def validation_step(self, batch: PreferencePairs, batch_index: int) -> None:
        latents = self.vae.encode(batch.chosen).latent_dist.mean
        quality = psnr(self.vae.decode(latents).sample, batch.chosen).mean()
        self.log("val/psnr", quality, batch_size=len(batch), sync_dist=True, prog_bar=True)
        z = latents.double().cpu()
        self._moments += torch.stack([torch.tensor(float(z.numel()), dtype=z.dtype), z.sum(), z.square().sum()])

    def on_validation_epoch_end(self) -> None:
        count, total, squares = self._moments.tolist()
        variance = squares / count - (total / count) ** 2
        self.vae.register_to_config(scaling_factor=round(variance**-0.5, 5))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.vae.parameters(), lr=self.learning_rate, weight_decay=0.0, fused=True)
        total = int(self.trainer.estimated_stepping_batches)

        def rate(step: int) -> float:
            return min(1.0, (step + 1) / self.warmup_steps) * (1 + cos(pi * min(1.0, step / total))) / 2

        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": LambdaLR(optimizer, rate), "interval": "step"}}

    def on_train_end(self) -> None:
        if self.trainer.is_global_zero:
            self.save(self.folder)

    def save(self, folder: Path) -> None:
        """Puts the autoencoder in fp16 into a pipeline folder, whole or not at all."""
        clone = AutoencoderKL.from_config(self.vae.config)
        clone.load_state_dict(self.vae.state_dict())
        with atomic_folder(folder / "vae") as new:
            clone.to(torch.float16).save_pretrained(new)
