"""SPO's step-aware preference model: CLIP that knows how noisy its picture was (arXiv 2406.04314, section 3.2)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from huggingface_hub import hf_hub_download
from jaxtyping import Float, Int
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel

from lightning_modules.errors import ConfigError
from lightning_modules.files import atomic_folder
from lightning_modules.rewards.base import RewardModel, StepRewardModel
from lightning_modules.rewards.clip import ClipPreprocessing, read_tokenizer, text_embeds, tokenize
from lightning_modules.weights.audit import UNREADABLE, mismatch
from lightning_modules.weights.pretrained import DTYPES, Pretrained

FREQUENCIES = 256  # numbers a timestep becomes before the MLP; the published models' size


class TimeEmbedder(nn.Module):
    """Timesteps to vectors: cosines and sines of 128 frequencies from 1 to 1/10000, then an MLP (DiT's embedder,
    arXiv 2212.09748)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        layers = nn.Linear(FREQUENCIES, width), nn.Linear(width, width)
        for layer in layers:
            nn.init.normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
        self.mlp = nn.Sequential(layers[0], nn.SiLU(), layers[1])

    def forward(self, timesteps: Int[Tensor, " n"]) -> Float[Tensor, "n width"]:
        half = FREQUENCIES // 2
        steps = torch.arange(half, dtype=torch.float32, device=timesteps.device)
        angles = timesteps.float()[:, None] * torch.exp(-math.log(10000) * steps / half)
        waves = torch.cat([angles.cos(), angles.sin()], dim=-1)
        return self.mlp(waves.to(next(self.parameters()).dtype))


def add_time_conditioning(clip: Any) -> None:
    """Give a ``CLIPModel``'s vision tower its time conditioning, such that it still computes what it did.

    Every layer and the last norm get a linear map from the time embedding to shifts, scales and gates (adaLN); its
    weights are 0 and its biases are what changes nothing: 1 for gates, 0 for the others. The modules are named as in
    the published checkpoints.
    """
    vision, width = clip.vision_model, clip.config.vision_config.hidden_size
    clip.t_embedder = TimeEmbedder(width)
    vision.adaLN_modulation = _modulation(width, 2)
    for layer in vision.encoder.layers:
        layer.adaLN_modulation = _modulation(width, 6)
        biases = layer.adaLN_modulation[1].bias.data.view(6, width)
        biases[2] = biases[5] = 1.0


def _modulation(width: int, parts: int) -> nn.Sequential:
    linear = nn.Linear(width, parts * width)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return nn.Sequential(nn.SiLU(), linear)


def modulated_layer(
    layer: Any, hidden: Float[Tensor, "n l width"], time: Float[Tensor, "n width"]
) -> Float[Tensor, "n l width"]:
    """One transformer layer of CLIP with adaLN: x + gate f(norm(x) (1 + scale) + shift), for attention, then MLP."""
    modulation = layer.adaLN_modulation(time)[:, None].chunk(6, dim=-1)
    attention_shift, attention_scale, attention_gate, mlp_shift, mlp_scale, mlp_gate = modulation
    attended, _ = layer.self_attn(
        hidden_states=layer.layer_norm1(hidden) * (1 + attention_scale) + attention_shift, attention_mask=None
    )
    hidden = hidden + attention_gate * attended
    return hidden + mlp_gate * layer.mlp(layer.layer_norm2(hidden) * (1 + mlp_scale) + mlp_shift)


class StepAwarePreferenceModel(StepRewardModel, RewardModel):
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
        weights = _own_weights(source) if checkpoint is None else _find_checkpoint(checkpoint)
        self.model: Any = _plain_clip(source) if weights is None else _time_conditioned_clip(source, weights)
        self.model.to(DTYPES[dtype])
        self.tokenizer: Any = processor_source.load(read_tokenizer, kind="tokenizer")
        self.processing = ClipPreprocessing.load(processor_source)
        self._remembered: dict[str, Tensor] = {}
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> StepAwarePreferenceModel:
        """Stays in eval mode, also under training: a score may not depend on dropout."""
        return super().train(False)

    def _apply(self, *args: Any, **kwargs: Any) -> StepAwarePreferenceModel:
        self._remembered.clear()  # another device or number type
        return super()._apply(*args, **kwargs)

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

    def encode_images(self, images: Float[Tensor, "n 3 H W"], timesteps: Int[Tensor, " n"]) -> Float[Tensor, "n d"]:
        """Unit vectors of pictures in [0, 1], fp32. With gradients where the model trains."""
        return self.encode_pixels(self.preprocess(images), timesteps)

    def encode_pixels(
        self, pixels: Float[Tensor, "n 3 crop crop"], timesteps: Int[Tensor, " n"]
    ) -> Float[Tensor, "n d"]:
        """As ``encode_images``, for pictures that went through ``preprocess``."""
        vision = self.model.vision_model
        time = self.model.t_embedder(timesteps)
        hidden = vision.pre_layrnorm(vision.embeddings(pixels))
        for layer in vision.encoder.layers:
            hidden = modulated_layer(layer, hidden, time)
        shift, scale = vision.adaLN_modulation(time).chunk(2, dim=-1)
        pooled = vision.post_layernorm(hidden[:, 0]) * (1 + scale) + shift
        return F.normalize(self.model.visual_projection(pooled).float(), dim=-1)

    @property
    def logit_scale(self) -> Float[Tensor, ""]:
        """What multiplies the cosine, about 100 for a trained CLIP; with gradient where the model trains."""
        return self.model.logit_scale.float().exp()

    # Scores

    @torch.no_grad()
    def score(
        self,
        images: Float[Tensor, "n 3 h w"],
        prompts: Sequence[str],
        timesteps: Int[Tensor, " n"] | None = None,
    ) -> Float[Tensor, " n"]:
        """One score a picture, fp32, whatever autocast says.

        Args:
            images: x0-predictions, or finished pictures, in [0, 1].
            prompts: one a picture; each text is encoded once as long as the model is frozen.
            timesteps: t of each prediction; None means finished pictures, t = 0.
        """
        if len(images) != len(prompts):
            raise ValueError(f"step-aware preference model: {len(images)} pictures and {len(prompts)} prompts")
        if timesteps is None:
            timesteps = torch.zeros(len(images), dtype=torch.int64, device=images.device)
        with torch.autocast(images.device.type, enabled=False):
            cosine = (self.encode_images(images, timesteps) * self._remember(prompts)).sum(dim=-1)
            return self.logit_scale * cosine

    def _remember(self, prompts: Sequence[str]) -> Float[Tensor, "n d"]:
        if self.model.logit_scale.requires_grad:
            self._remembered.clear()  # weights that change between two calls
        for prompt in dict.fromkeys(prompts):
            # One by one: padded together with others its last bits would depend on its company.
            if prompt not in self._remembered:
                self._remembered[prompt] = self.encode_text([prompt])[0]
        return torch.stack([self._remembered[prompt] for prompt in prompts])

    # Storage

    def save_pretrained(self, folder: Path, dtype: Literal["fp32", "bf16", "fp16"] = "fp32") -> None:
        """Write weights, configuration, tokenizer and image processor into one folder, whole or not at all.

        It is read by ``StepAwarePreferenceModel(pretrained=folder, processor=None)``; the weights are named as in
        the published checkpoints without their ``model.``.
        """
        with atomic_folder(Path(folder)) as new:
            weights = self.model.state_dict()
            save_file(
                {name: value.detach().to("cpu", DTYPES[dtype]).contiguous() for name, value in weights.items()},
                new / "model.safetensors",
            )
            self.model.config.save_pretrained(new)
            self.tokenizer.save_pretrained(new)
            self.processing.as_processor().save_pretrained(new)


def _plain_clip(source: Pretrained) -> Any:
    clip: Any = source.load(partial(CLIPModel.from_pretrained, dtype=torch.float32))
    add_time_conditioning(clip)
    return clip


def _time_conditioned_clip(source: Pretrained, file: Path) -> Any:
    clip: Any = CLIPModel(source.load(_read_config))
    add_time_conditioning(clip)
    found = _read_weights(file)
    if all(name.startswith("model.") for name in found):
        found = {name.removeprefix("model."): value for name, value in found.items()}
    # Buffers that older versions of transformers stored: 0, 1, 2, ...
    found = {name: value for name, value in found.items() if not name.endswith(".position_ids")}
    difference = mismatch(clip.state_dict(), found)
    if difference is not None:
        raise ConfigError(
            f"step-aware preference model: {file} does not fit the CLIP model {source.name!r}: {difference}; "
            "give `pretrained` the model that it was trained from, or another checkpoint"
        )
    clip.load_state_dict(found)
    return clip


def _read_config(location: str, **options: Any) -> CLIPConfig:
    return CLIPConfig.from_pretrained(location, **options)


def _own_weights(source: Pretrained) -> Path | None:
    """The weights' file of a folder that ``save_pretrained`` wrote; None for a plain CLIP model."""
    file = Path(source.location) / source.subfolder / "model.safetensors"
    if not source.local or not file.is_file():
        return None
    try:
        with safe_open(file, "pt") as weights:
            return file if "t_embedder.mlp.0.weight" in weights.keys() else None  # noqa: SIM118  # no iterator
    except UNREADABLE as error:
        raise _damaged(file, error) from error


def _find_checkpoint(name: str) -> Path:
    path = Path(name).expanduser()
    if path.is_file():
        return path
    try:
        source = Pretrained.find(str(path.parent))
    except ConfigError:
        source = None
    if source is None or source.local or path.suffix not in (".bin", ".safetensors"):
        raise ConfigError(
            f"step-aware preference model: no checkpoint {name!r}; give a .bin or .safetensors file, or a file on the "
            "hub as organisation/name/file"
        )

    def fetch(location: str, local_files_only: bool, **options: Any) -> str:
        return hf_hub_download(location, path.name, **options)

    return Path(source.load(fetch))


def _read_weights(file: Path) -> dict[str, Tensor]:
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        weights = torch.load(file, map_location="cpu", weights_only=True)
    except UNREADABLE as error:
        raise _damaged(file, error) from error
    if not isinstance(weights, dict) or not all(_is_plain(*item) for item in weights.items()):
        raise _damaged(file, "it holds no state dict")
    return weights


def _is_plain(name: object, value: object) -> bool:
    if not isinstance(name, str) or not isinstance(value, Tensor):
        return False
    return value.layout == torch.strided and value.device.type == "cpu" and not value.is_quantized


def _damaged(file: Path, reason: object) -> ConfigError:
    said = " ".join(str(reason).split())[:200]
    return ConfigError(f"step-aware preference model: {file} cannot be read; download it again. ({said})")
