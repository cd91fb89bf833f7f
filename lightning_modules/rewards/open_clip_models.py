"""Scorers on open_clip's networks: HPS v2 and CLIPScore, the cosine of picture and prompt."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, Literal

import open_clip
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from lightning_modules.errors import ConfigError
from lightning_modules.prompt_lengths import CutPrompts
from lightning_modules.rewards.base import RewardModel
from lightning_modules.rewards.preprocessing import Letterbox, ShortSide
from lightning_modules.weights.audit import mismatch
from lightning_modules.weights.pretrained import DTYPES, dtype_name
from lightning_modules.weights.state_dicts import find_weights, read_state_dict

PreprocessingName = Literal["letterbox", "letterbox_without_antialias", "short_side"]
PREPROCESSING: dict[str, Letterbox | ShortSide] = {
    "letterbox": Letterbox(),
    "letterbox_without_antialias": Letterbox(antialias=False),
    "short_side": ShortSide(),
}


class OpenClipReward(RewardModel):
    """cos(picture, prompt) in the space of an open_clip model; texts are tokenised as open_clip does.

    Args:
        pretrained: file of a state dict, or ``organisation/name/file`` on the hub.
        architecture: open_clip's name of the network.
        preprocessing: how a picture becomes the network's input: "short_side" is open_clip's own, "letterbox" the
            hpsv2 package's with torchvision 0.17 or later, "letterbox_without_antialias" with an earlier one.
        dtype: number type of the network; the score is fp32.

    Raises:
        ConfigError: an unknown architecture, missing or damaged weights, or weights of another architecture.
    """

    def __init__(
        self,
        pretrained: str,
        architecture: str = "ViT-H-14",
        preprocessing: PreprocessingName = "short_side",
        dtype: Literal["fp32", "bf16", "fp16"] = "fp32",
    ) -> None:
        super().__init__()
        whose = type(self).__name__
        if architecture not in open_clip.list_models():
            raise ConfigError(f"{whose}: open_clip has no architecture {architecture!r}; ViT-H-14 is HPS v2's")
        file = find_weights(pretrained, whose)
        weights = read_state_dict(file, whose)
        self.model: Any = _untrained(architecture)
        difference = mismatch(self.model.state_dict(), weights)
        if difference is not None:
            raise ConfigError(f"{whose}: {file} is no {architecture}: {difference}; name its own architecture")
        self.model.load_state_dict(weights)
        self.model.to(DTYPES[dtype])
        self.tokenizer: Any = open_clip.get_tokenizer(architecture)
        self.preprocess, self.preprocessing = PREPROCESSING[preprocessing], preprocessing
        self._weights, self._architecture = pretrained, architecture
        self._cut_prompts = CutPrompts(whose)

    def score(self, images: Float[Tensor, "n 3 h w"], prompts: Sequence[str]) -> Float[Tensor, " n"]:
        pixels = self.preprocess(images).to(self.model.logit_scale.dtype)
        pictures = F.normalize(self.model.encode_image(pixels).float(), dim=-1)
        return (pictures * self.remembered(prompts, self._encode_text)).sum(dim=-1)

    def described(self) -> dict[str, Any]:
        return {
            **super().described(),
            "weights": self._weights,
            "architecture": self._architecture,
            "scale": "cosine",
            "preprocessing": self.preprocess.described(),
            "dtype": dtype_name(self.model),
        }

    def _encode_text(self, prompt: str) -> Float[Tensor, " d"]:
        ids = self.tokenizer([prompt])
        self._cut_prompts.note(prompt, _length(self.tokenizer, prompt), ids.shape[1])
        ids = ids.to(self.model.logit_scale.device)
        return F.normalize(self.model.encode_text(ids).float(), dim=-1)[0]


def _length(tokenizer: Any, prompt: str) -> int:
    """How many tokens a prompt has for one of open_clip's tokenizers, before any are cut off."""
    if hasattr(tokenizer, "encode"):
        return len(tokenizer.encode(prompt)) + 2  # begin and end
    return len(tokenizer.tokenizer(tokenizer.clean_fn(prompt), verbose=False).input_ids)


def _untrained(architecture: str) -> Any:
    """The network with weights that are about to be replaced; open_clip's warning of it is not shown."""
    logging.getLogger().addFilter(_is_no_warning_of_random_weights)
    try:
        with torch.random.fork_rng(devices=[]):
            return open_clip.create_model(architecture, pretrained=None, precision="fp32")
    finally:
        logging.getLogger().removeFilter(_is_no_warning_of_random_weights)


def _is_no_warning_of_random_weights(record: logging.LogRecord) -> bool:
    return "No pretrained weights" not in record.getMessage()


class HPSv2(OpenClipReward):
    """Human Preference Score v2 (arXiv 2306.09341): CLIP ViT-H/14 fine-tuned on people's choices.

    Scores of 2.0 and 2.1 do not compare, nor do those of different preprocessing: papers' numbers are of either. The
    published benchmark multiplies them by 100.

    Args:
        version: "2.1" or "2.0": which published weights, where ``pretrained`` is None; and the word in metric names.
        pretrained: as in ``OpenClipReward``; None takes ``xswu/HPSv2``'s of the version.
        architecture, preprocessing, dtype: as in ``OpenClipReward``; "letterbox" is what the current package gives.
    """

    def __init__(
        self,
        version: Literal["2.0", "2.1"] = "2.1",
        pretrained: str | None = None,
        architecture: str = "ViT-H-14",
        preprocessing: PreprocessingName = "letterbox",
        dtype: Literal["fp32", "bf16", "fp16"] = "fp32",
    ) -> None:
        published = {"2.0": "HPS_v2_compressed.pt", "2.1": "HPS_v2.1_compressed.pt"}[version]
        super().__init__(pretrained or f"xswu/HPSv2/{published}", architecture, preprocessing, dtype)
        self.name, self._published = f"hpsv{version}", version

    def described(self) -> dict[str, Any]:
        return {**super().described(), "version": self._published}


class CLIPScore(OpenClipReward):
    """The cosine itself, neither scaled nor cut at 0 (arXiv 2104.08718 scales it by 2.5 and cuts it).

    Args:
        pretrained: as in ``OpenClipReward``; the model that Diffusion-DPO and Diffusion-SDPO score with by default.
        architecture, dtype: as in ``OpenClipReward``; OpenAI's weights want a name that ends in ``-quickgelu``.
        preprocessing: "short_side" as Diffusion-SDPO, "letterbox" as Diffusion-DPO.
    """

    name = "clip_score"

    def __init__(
        self,
        pretrained: str = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K/open_clip_pytorch_model.bin",
        architecture: str = "ViT-H-14",
        preprocessing: PreprocessingName = "short_side",
        dtype: Literal["fp32", "bf16", "fp16"] = "fp32",
    ) -> None:
        super().__init__(pretrained, architecture, preprocessing, dtype)
