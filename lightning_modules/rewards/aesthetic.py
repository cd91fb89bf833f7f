"""LAION's aesthetic predictor, version 2: a linear head on CLIP ViT-L/14's picture embedding; it reads no prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from jaxtyping import Float
from torch import Tensor
from transformers import CLIPModel

from lightning_modules.errors import ConfigError
from lightning_modules.rewards.base import RewardModel
from lightning_modules.rewards.clip import ClipPreprocessing, image_embeds
from lightning_modules.rewards.linear_head import LinearHead
from lightning_modules.weights.audit import mismatch
from lightning_modules.weights.pretrained import DTYPES, Pretrained, dtype_name
from lightning_modules.weights.state_dicts import find_weights, read_state_dict


class AestheticPredictor(RewardModel):
    """How people would rate a picture's look from 1 to 10, whatever the prompt (christophschuhmann/
    improved-aesthetic-predictor, commit 6934dd8).

    Args:
        head: file of the published head, ``sac+logos+ava1-l14-linearMSE.pth``: that path, or
            ``organisation/name/file`` on the hub. ``ava+logos-l14-reluMSE.pth`` is another network.
        pretrained: folder or hub id of the CLIP model with its image processor.
        dtype: number type of the CLIP model; head and score are fp32.

    Raises:
        ConfigError: missing or damaged weights, or a head of another form.
    """

    name = "aesthetic"

    def __init__(
        self,
        head: str,
        pretrained: str = "openai/clip-vit-large-patch14",
        dtype: Literal["fp32", "bf16", "fp16"] = "fp32",
    ) -> None:
        super().__init__()
        source = Pretrained.find(pretrained)
        self.model: Any = source.load_model(CLIPModel, DTYPES[dtype])
        self.preprocess = ClipPreprocessing.load(source)
        self.head = LinearHead(self.model.visual_projection.out_features)
        file = find_weights(head, "AestheticPredictor")
        weights = read_state_dict(file, "AestheticPredictor")
        difference = mismatch(self.head.state_dict(), weights)
        if difference is not None:
            raise ConfigError(
                f"AestheticPredictor: {file} is no linear head on {pretrained!r}: {difference}; "
                "give sac+logos+ava1-l14-linearMSE.pth, and the CLIP model that it was trained on"
            )
        self.head.load_state_dict(weights)
        self._weights, self._clip = head, pretrained

    def score(self, images: Float[Tensor, "n 3 h w"], prompts: Sequence[str]) -> Float[Tensor, " n"]:
        scores: Tensor = self.head(image_embeds(self.model, self.preprocess(images)))
        return scores

    def described(self) -> dict[str, Any]:
        return {
            **super().described(),
            "weights": self._weights,
            "clip": self._clip,
            "scale": "rating of 1 to 10",
            "preprocessing": self.preprocess.described(),
            "dtype": dtype_name(self.model),
        }
