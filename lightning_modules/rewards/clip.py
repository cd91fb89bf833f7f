"""What every scorer on a transformers ``CLIPModel`` does: tensors in, tensors out.

The projections are written out because ``CLIPModel.get_image_features`` returns a tensor in one version of
transformers and an output object in another, and pictures never leave their device for a processor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from transformers import AutoTokenizer, CLIPImageProcessor

from lightning_modules.prompt_lengths import CutPrompts
from lightning_modules.rewards.preprocessing import SHORT_SIDE, eight_bit_levels, pillow_resize
from lightning_modules.weights.pretrained import Pretrained

CUT_PROMPTS = CutPrompts("CLIP as a judge")
CONTEXT_LENGTH = 77  # tokens CLIP was trained with, begin and end included; smaller models' tokenizers say less


def read_tokenizer(location: str, **options: Any) -> Any:
    """The tokenizer at a location. Code that comes with it is never run, and nobody is asked whether it may."""
    return AutoTokenizer.from_pretrained(location, trust_remote_code=False, **options)


@dataclass(frozen=True)
class ClipPreprocessing:
    """``CLIPImageProcessor`` with Pillow, on tensors: pictures are rounded to 8 bits, then bicubic resize of the short
    side, centre crop, normalisation. The numbers are those that the processor makes of the saved PNG.

    Attributes:
        size: length of the short side after resizing, in pixels.
        crop: side of the square that is cut out of the middle.
        mean, std: of each colour, for pictures in [0, 1].
    """

    size: int
    crop: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @staticmethod
    def load(source: Pretrained) -> ClipPreprocessing:
        """From a folder or hub id with a CLIP image processor's configuration."""
        processor: Any = source.load(CLIPImageProcessor.from_pretrained, kind="processor")
        return ClipPreprocessing(
            size=processor.size["shortest_edge"],
            crop=processor.crop_size["height"],
            mean=tuple(processor.image_mean),
            std=tuple(processor.image_std),
        )

    def as_processor(self) -> CLIPImageProcessor:
        """The processor that ``load`` reads, to be saved beside a model."""
        return CLIPImageProcessor(
            size={"shortest_edge": self.size},
            crop_size={"height": self.crop, "width": self.crop},
            image_mean=list(self.mean),
            image_std=list(self.std),
        )

    def described(self) -> dict[str, Any]:
        """As those of ``preprocessing`` describe themselves."""
        return SHORT_SIDE | {"side": self.size, "crop": self.crop, "crop_offset": "floor"}

    def __call__(self, images: Float[Tensor, "n 3 H W"]) -> Float[Tensor, "n 3 crop crop"]:
        """Pictures in [0, 1] to what the vision tower reads, fp32."""
        height, width = images.shape[-2:]
        short = min(height, width)
        resized = (self.size * height // short, self.size * width // short)
        return self.crop_and_normalise(pillow_resize(eight_bit_levels(images), *resized) / 255)

    def crop_and_normalise(self, images: Float[Tensor, "n 3 H W"]) -> Float[Tensor, "n 3 crop crop"]:
        """The middle of pictures in [0, 1] that are resized already, normalised."""
        top, left = ((side - self.crop) // 2 for side in images.shape[-2:])
        images = images[..., top : top + self.crop, left : left + self.crop]
        mean, std = (torch.tensor(values, device=images.device).view(3, 1, 1) for values in (self.mean, self.std))
        return (images - mean) / std


def tokenize(tokenizer: Any, prompts: Sequence[str]) -> tuple[Int[Tensor, "n l"], Int[Tensor, "n l"]]:
    """Token ids and attention mask, cut to CLIP's length."""
    length = min(CONTEXT_LENGTH, tokenizer.model_max_length)
    batch = tokenizer(list(prompts), padding=True, truncation=True, max_length=length, return_tensors="pt")
    if batch.attention_mask.shape[1] == length:
        CUT_PROMPTS.look(tokenizer, prompts, batch.attention_mask)
    return batch.input_ids, batch.attention_mask


def image_embeds(model: Any, pixels: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n d"]:
    """Unit vectors of preprocessed pictures, fp32."""
    pooled = model.vision_model(pixel_values=pixels.to(model.visual_projection.weight.dtype)).pooler_output
    return F.normalize(model.visual_projection(pooled).float(), dim=-1)


def text_embeds(model: Any, ids: Int[Tensor, "n l"], mask: Int[Tensor, "n l"]) -> Float[Tensor, "n d"]:
    """Unit vectors of tokenised prompts, fp32."""
    pooled = model.text_model(input_ids=ids, attention_mask=mask).pooler_output
    return F.normalize(model.text_projection(pooled).float(), dim=-1)
