"""SPO's step-aware preference model: CLIP that knows how noisy its picture was (arXiv 2406.04314, section 3.2)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Real
from torch import Tensor

from lightning_modules.rewards.base import PreferenceModel, ReadPrompts, RewardModel, StepRewardModel
from lightning_modules.rewards.clip import ClipPreprocessing, read_tokenizer, text_embeds, tokenize
from lightning_modules.rewards.step_aware_files import load_clip, save_folder
from lightning_modules.rewards.time_conditioning import time_conditioned_embeds
from lightning_modules.weights.pretrained import DTYPES, Pretrained, dtype_name


class StepAwarePreferenceModel(StepRewardModel, RewardModel, PreferenceModel):
    """exp(logit_scale) cos(picture, prompt), where the picture's features depend on its timestep.

    It judges x0-predictions: the picture that a denoiser expects behind noise of timestep t. Without timesteps it is
    an ordinary reward of finished pictures, at t = 0. It comes frozen; its trainer switches gradients on.

    Args:
        pretrained: folder or hub id of a CLIP model, from which it starts as that model exactly, or a folder that
            ``save_pretrained`` wrote. With ``checkpoint`` only its configuration is read.
        processor: folder or hub id of tokenizer and image processor; None takes ``pretrained``.
        checkpoint: weights of a step-aware model, ``.bin`` (a state dict, read without unpickling code) or
            ``.safetensors``: a file, or ``organisation/name/file`` on the hub, such as
            ``SPO-Diffusion-Models/Step-Aware_Preference_Models/sd-v1-5_step-aware_preference_model.bin``.
        dtype: number type of the network; features and scores are fp32. Training wants fp32.

    Raises:
        ConfigError: missing or damaged weights, or weights of a model of another size.
    """

    name = "step_aware"

    def __init__(
        self,
        pretrained: str = "yuvalkirstain/PickScore_v1",
        processor: str | None = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        checkpoint: str | None = None,
        dtype: Literal["fp32", "bf16", "fp16"] = "fp32",
    ) -> None:
        super().__init__()
        source = Pretrained.find(pretrained)
        processor_source = source if processor is None else Pretrained.find(processor)
        clip, self.learned_kind = load_clip(source, checkpoint)
        self.model: Any = clip.to(DTYPES[dtype])
        self.tokenizer: Any = processor_source.load(read_tokenizer, kind="tokenizer")
        self.processing = ClipPreprocessing.load(processor_source)
        self._weights, self._processor = checkpoint or pretrained, processor or pretrained

    # Features

    def preprocess(self, images: Float[Tensor, "n 3 H W"]) -> Float[Tensor, "n 3 crop crop"]:
        """Pictures to what the vision tower reads: bicubic without antialiasing, clamp, centre crop, normalisation.

        The same in training and in scoring. The official code clamps to [0, 1] before resizing in training and not
        in scoring; pictures that ``DiffusionPolicy.decode`` made are clamped, so here both do. It doesn't antialias
        as CLIP's own processor does, and the published weights have learned from that.
        """
        height, width = images.shape[-2:]
        short = min(height, width)
        size = (self.processing.size * height // short, self.processing.size * width // short)
        resized = F.interpolate(images.float(), size, mode="bicubic", align_corners=False)
        return self.processing.crop_and_normalise(resized.clamp(0, 1))

    def encode_text(self, prompts: Sequence[str]) -> Float[Tensor, "n d"]:
        """Unit vectors, fp32; the same for all timesteps. With gradients where the model trains."""
        ids, mask = tokenize(self.tokenizer, prompts)
        device = self.model.logit_scale.device
        return text_embeds(self.model, ids.to(device), mask.to(device))

    def encode_images(self, images: Float[Tensor, "n 3 H W"], timesteps: Real[Tensor, " n"]) -> Float[Tensor, "n d"]:
        """Unit vectors of pictures in [0, 1], fp32. With gradients where the model trains."""
        return self.encode_pixels(self.preprocess(images), timesteps)

    def encode_pixels(
        self, pixels: Float[Tensor, "n 3 crop crop"], timesteps: Real[Tensor, " n"]
    ) -> Float[Tensor, "n d"]:
        """As ``encode_images``, for pictures that went through ``preprocess``."""
        return time_conditioned_embeds(self.model, pixels, timesteps)

    def read_prompts(self, prompts: Sequence[str]) -> ReadPrompts:
        return ReadPrompts(self.encode_text(prompts))

    def encode_seen(
        self, seen: Float[Tensor, "n 3 H W"], timesteps: Real[Tensor, " n"], prompts: ReadPrompts
    ) -> Float[Tensor, "n d"]:
        return self.encode_images(seen, timesteps)

    @property
    def logit_scale(self) -> Float[Tensor, ""]:
        """What multiplies the cosine, about 100 for a trained CLIP; with gradient where the model trains."""
        return self.model.logit_scale.float().exp()

    # Scores

    def score(
        self,
        images: Float[Tensor, "n 3 h w"],
        prompts: Sequence[str],
        timesteps: Real[Tensor, " n"] | None = None,
    ) -> Float[Tensor, " n"]:
        """One score per picture, fp32.

        Args:
            images: x0-predictions, or finished pictures, in [0, 1].
            prompts: one per picture; each text is encoded once as long as no weight changes.
            timesteps: t of each prediction; None means finished pictures, t = 0.
        """
        if timesteps is None:
            timesteps = torch.zeros(len(images), dtype=torch.int64, device=images.device)
        texts = self.remembered(prompts, lambda text: self.encode_text([text])[0])
        return self.logit_scale * (self.encode_images(images, timesteps) * texts).sum(dim=-1)

    def described(self) -> dict[str, Any]:
        return {
            **super().described(),
            "weights": self._weights,
            "processor": self._processor,
            "scale": "logit",
            "preprocessing": {
                "family": "short_side",
                "antialias": False,
                "rounded_to_8_bit": "never",
                "side": self.processing.size,
                "crop": self.processing.crop,
                "crop_offset": "floor",
            },
            "dtype": dtype_name(self.model),
        }

    def save_pretrained(self, folder: Path, dtype: Literal["fp32", "bf16", "fp16"] = "fp32") -> None:
        """Write weights, configuration, tokenizer and image processor into one folder, whole or not at all.

        It is read by ``StepAwarePreferenceModel(pretrained=folder, processor=None)``; the weights are named as in
        the published checkpoints without their ``model.``.
        """
        save_folder(Path(folder), self.model, self.tokenizer, self.processing, DTYPES[dtype], self.learned_kind)
