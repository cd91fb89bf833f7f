"""ImageReward (arXiv 2304.05977): BLIP, fine-tuned on people's rankings of pictures of one prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from jaxtyping import Float, Int
from torch import Tensor

from lightning_modules.prompt_lengths import CutPrompts
from lightning_modules.rewards.base import RewardModel
from lightning_modules.rewards.clip import read_tokenizer
from lightning_modules.rewards.image_reward_files import load_network
from lightning_modules.rewards.preprocessing import ShortSide
from lightning_modules.weights.pretrained import DTYPES, Pretrained, dtype_name

MEAN, STD = 0.16717362830052426, 1.0333394966054072  # of the published network's raw scores
CONTEXT_LENGTH = 35  # tokens that it was trained with, begin and end included


class ImageReward(RewardModel):
    """How well people would rank a picture among others of its prompt; 0 is an average picture, most lie in [-2, 2].

    The text network attends to the picture in every layer, so that, other than with CLIP, no text's features can be
    kept: each pair of picture and prompt goes through both networks (THUDM/ImageReward, commit c1392c6,
    ``ImageReward/ImageReward.py``).

    Args:
        pretrained: file of the published weights, or ``organisation/name/file`` on the hub.
        med_config: file of the text network's sizes, ``med_config.json``, or the same on the hub.
        tokenizer: folder or hub id of BERT's uncased vocabulary. The two tokens that the official code adds are never
            used in a score.
        vision_heads: of the vision network, which no file says; its other sizes are those of its weights.
        dtype: number type of the networks; head and score are fp32.

    Raises:
        ConfigError: missing or damaged files, or weights with other keys or of other sizes.
    """

    name = "image_reward"

    def __init__(
        self,
        pretrained: str = "THUDM/ImageReward/ImageReward.pt",
        med_config: str = "THUDM/ImageReward/med_config.json",
        tokenizer: str = "google-bert/bert-base-uncased",
        vision_heads: int = 16,
        dtype: Literal["fp32", "bf16", "fp16"] = "fp32",
    ) -> None:
        super().__init__()
        self.tokenizer: Any = Pretrained.find(tokenizer).load(read_tokenizer, kind="tokenizer")
        self.model = load_network(pretrained, med_config, vision_heads)
        self.model.vision.to(DTYPES[dtype])
        self.model.text.to(DTYPES[dtype])
        self.preprocess = ShortSide()
        self._weights, self._vocabulary = pretrained, tokenizer
        self._cut_prompts = CutPrompts("ImageReward")

    def score(self, images: Float[Tensor, "n 3 h w"], prompts: Sequence[str]) -> Float[Tensor, " n"]:
        ids, mask = self.tokenize(prompts)
        raw = self.model(self.preprocess(images), ids.to(images.device), mask.to(images.device))
        return (raw - MEAN) / STD

    def tokenize(self, prompts: Sequence[str]) -> tuple[Int[Tensor, "n 35"], Int[Tensor, "n 35"]]:
        """Token ids and attention mask, padded and cut to 35."""
        batch = self.tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=CONTEXT_LENGTH, return_tensors="pt"
        )
        self._cut_prompts.look(self.tokenizer, prompts, batch.attention_mask)
        return batch.input_ids, batch.attention_mask

    def described(self) -> dict[str, Any]:
        return {
            **super().described(),
            "weights": self._weights,
            "tokenizer": self._vocabulary,
            "scale": "standardised",
            "preprocessing": self.preprocess.described(),
            "dtype": dtype_name(self.model.vision),
        }
