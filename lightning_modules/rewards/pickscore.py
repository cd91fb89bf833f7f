"""PickScore (arXiv 2305.01569): CLIP-H fine-tuned on the choices people made in Pick-a-Pic."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from jaxtyping import Float
from torch import Tensor
from transformers import CLIPModel

from lightning_modules.rewards.base import RewardModel
from lightning_modules.rewards.clip import ClipPreprocessing, image_embeds, read_tokenizer, text_embeds, tokenize
from lightning_modules.weights.pretrained import DTYPES, Pretrained, dtype_name


class PickScore(RewardModel):
    """Cosine between picture and prompt in PickScore's space, on one of the two scales in use.

    Args:
        pretrained: folder or hub id of the CLIP model.
        processor: folder or hub id of its tokenizer and image processor; None takes ``pretrained``.
        scale: "logit" is exp(logit_scale) cos, about 21 for a good picture, as papers' tables have it; "cosine"
            is the cosine itself, about 0.21, as the Diffusion-DPO code prints it.
        dtype: number type of the network; the score is fp32.

    Raises:
        ConfigError: missing or damaged weights.
    """

    name = "pickscore"

    def __init__(
        self,
        pretrained: str = "yuvalkirstain/PickScore_v1",
        processor: str | None = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        scale: Literal["logit", "cosine"] = "logit",
        dtype: Literal["fp32", "bf16", "fp16"] = "fp32",
    ) -> None:
        super().__init__()
        self.scale = scale
        self._weights, self._processor = pretrained, processor or pretrained
        source = Pretrained.find(pretrained)
        processor_source = source if processor is None else Pretrained.find(processor)
        self.model: Any = source.load_model(CLIPModel, DTYPES[dtype])
        self.tokenizer: Any = processor_source.load(read_tokenizer, kind="tokenizer")
        self.preprocess = ClipPreprocessing.load(processor_source)

    def score(self, images: Float[Tensor, "n 3 h w"], prompts: Sequence[str]) -> Float[Tensor, " n"]:
        pictures = image_embeds(self.model, self.preprocess(images))
        cosine = (pictures * self.remembered(prompts, self._encode_text)).sum(dim=-1)
        return cosine * self.model.logit_scale.float().exp() if self.scale == "logit" else cosine

    def described(self) -> dict[str, Any]:
        return {
            **super().described(),
            "weights": self._weights,
            "processor": self._processor,
            "scale": self.scale,
            "preprocessing": self.preprocess.described(),
            "dtype": dtype_name(self.model),
        }

    def _encode_text(self, prompt: str) -> Float[Tensor, " d"]:
        ids, mask = (tensor.to(self.model.logit_scale.device) for tensor in tokenize(self.tokenizer, [prompt]))
        return text_embeds(self.model, ids, mask)[0]
