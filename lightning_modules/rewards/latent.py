"""LPO's latent reward model: how good will the picture be that comes of these noisy latents? (arXiv 2502.01051)"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Real
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from lightning_modules.batches import Conditioning
from lightning_modules.errors import ConfigError
from lightning_modules.prompt_lengths import CutPrompts
from lightning_modules.rewards.base import LatentStepRewardModel, PreferenceModel, ReadPrompts
from lightning_modules.rewards.down_part import feature_widths, stage_means
from lightning_modules.rewards.latent_files import load_down_part, load_heads, read_text_projection, save_folder
from lightning_modules.weights.pretrained import DTYPES, Pretrained
from lightning_modules.weights.tokenizers import read_tokenizer

CUT_PROMPTS = CutPrompts("the latent reward model")
PIXELS_PER_LATENT = 8  # of SDXL's time ids, which the official code makes of the UNet's sample_size
INITIAL_SCALE = 1 / 0.07  # CLIP's
INITIAL_STD = 0.02  # of the visual projection; official


class LatentRewardModel(LatentStepRewardModel, PreferenceModel):
    """exp(logit_scale) cos(latents, prompt), the latents' features being those of a diffusion UNet on its way down.

    The UNet's down and middle part reads x_t, t and the prompt. Means over the picture of each stage and of the middle,
    the latter with classifier-free guidance, are projected. What they are compared with is the text encoder's pooled
    output, projected (Stable Diffusion), or the second text encoder's text embedding as it is (SDXL). Official
    sd15_preference_model.py:94-263 and sdxl_base_preference_model.py:107-338 of Kwai-Kolors/LPO@9c2e8b8, which score in
    fp16, so that gaps are off by up to 0.007; here means, projections and cosine are fp32 whatever the networks are.

    It comes frozen; its trainer switches gradients on.

    Args:
        pretrained: folder or hub id in the published form (see ``latent_files``). The UNet's up part is not loaded.
        tokenizer: folder or hub id of the pipeline whose tokenizers the text encoders know. For a model that judges
            SD 2.1 this is SD 1.5's: it is the reward model's own text encoder that reads.
        guidance_scale: classifier-free guidance against the empty prompt, of the middle block alone; 1 turns it off,
            which halves the cost.
        guided: "all" guides the stages, too, SDXL's first excepted (official ``multi_scale_cfg``, off as published).
        dtype: number type of the networks. Training wants fp32.
        untrained: ``pretrained`` is a Stable Diffusion or SDXL pipeline, whose networks a new model starts from.
        text_projection: where an untrained SD model's text projection starts: ``.safetensors`` file of the CLIP model
            that its text encoder is of, ``openai/clip-vit-large-patch14/model.safetensors`` for SD 1.5. None draws one.
        export_up_part: exports also hold the UNet's up part as it lies in ``pretrained``. No score depends on it, but
            the official code loads no UNet without; it is more than half of the file.

    Raises:
        ConfigError: missing or damaged files, weights of a model of another size or kind.
    """

    visual_projection: nn.Linear
    text_projection: nn.Linear  # of SD alone

    def __init__(
        self,
        pretrained: str,
        tokenizer: str,
        guidance_scale: float = 7.5,
        dtype: Literal["fp32", "bf16", "fp16"] = "fp32",
        untrained: bool = False,
        text_projection: str | None = None,
        export_up_part: bool = True,
        guided: Literal["middle", "all"] = "middle",
    ) -> None:
        super().__init__()
        if guidance_scale < 1:
            raise ConfigError(f"latent reward model: guidance_scale must be at least 1, got {guidance_scale}")
        source, number_type = Pretrained.find(pretrained), DTYPES[dtype]
        self.guidance_scale, self.guided, self.export_up_part = guidance_scale, guided, export_up_part
        self._down_part = load_down_part(source, number_type)
        self.unet: Any = self._down_part.network
        self.latent_channels = self.unet.config.in_channels
        self.added_conditions = self.unet.config.addition_embed_type
        if self.added_conditions not in (None, "text_time"):
            raise ConfigError(
                f"latent reward model: the UNet of {pretrained!r} has addition_embed_type {self.added_conditions!r}; "
                "give one of Stable Diffusion or SDXL"
            )
        if text_projection is not None and (self.is_xl or not untrained):
            raise ConfigError(
                "latent reward model: text_projection is where an untrained model of Stable Diffusion 1.x or 2.x "
                f"starts; {pretrained!r} is {'of SDXL, which has none' if self.is_xl else 'trained'}: leave it out"
            )
        self._load_text(source, Pretrained.find(tokenizer), number_type)
        self._load_heads(None if untrained else source, text_projection)
        self._last_read: tuple[Any, ReadPrompts] | None = None

    @property
    def is_xl(self) -> bool:
        """Whether it is of SDXL's kind: two text encoders, no text projection of its own."""
        return self.added_conditions is not None

    def text_encoders(self) -> dict[str, Any]:
        """By the names of their folders."""
        return {name: child for name, child in self.named_children() if name.startswith("text_encoder")}

    def requires_grad_(self, requires_grad: bool = True) -> LatentRewardModel:
        """Of all that the features depend on: SDXL's first text encoder is read before its last layer."""
        super().requires_grad_(requires_grad)
        if self.is_xl:
            first = getattr(self.text_encoder, "text_model", self.text_encoder)  # transformers 4 nests it
            for unused in (first.encoder.layers[-1], first.final_layer_norm):
                unused.requires_grad_(False)
        return self

    # Loading

    def _load_text(self, source: Pretrained, pipeline: Pretrained, dtype: torch.dtype) -> None:
        self.text_encoder: Any = source.component("text_encoder").load_model(CLIPTextModel, dtype)
        self.tokenizer = read_tokenizer(pipeline, "tokenizer", self.text_encoder)
        if self.is_xl:
            second = source.component("text_encoder_2")
            self.text_encoder_2: Any = second.load_model(CLIPTextModelWithProjection, dtype)
            self.tokenizer_2 = read_tokenizer(pipeline, "tokenizer_2", self.text_encoder_2)
        width = sum(encoder.config.hidden_size for encoder in self.text_encoders().values())
        wanted = self.unet.config.cross_attention_dim
        if wanted != width:
            raise ConfigError(
                f"latent reward model: its UNet reads text of width {wanted} and its text encoders give {width}; give "
                "a UNet and text encoders of one kind"
            )

    def _load_heads(self, source: Pretrained | None, text_projection: str | None) -> None:
        """The projections and the scale that lie in ``source``, or new ones."""
        widths = {"visual_projection": sum(feature_widths(self.unet))}
        out = self.text_encoder_2.config.projection_dim if self.is_xl else None
        if not self.is_xl:
            widths["text_projection"] = self.text_encoder.config.hidden_size
        heads = self._new_heads(widths, out, text_projection) if source is None else load_heads(source, widths, out)
        self.log_scale = nn.Parameter(heads.pop("logit_scale"), requires_grad=False)
        for name, weight in heads.items():
            projection = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
            projection.weight.data.copy_(weight)
            setattr(self, name, projection)

    def _new_heads(self, widths: dict[str, int], out: int | None, text_projection: str | None) -> dict[str, Tensor]:
        heads = {"logit_scale": torch.tensor(math.log(INITIAL_SCALE))}
        if not self.is_xl:
            width = widths["text_projection"]
            drawn = width**-0.5 * torch.randn(width, width)  # CLIP's own way to start
            heads["text_projection"] = (
                drawn if text_projection is None else read_text_projection(text_projection, width)
            )
            out = len(heads["text_projection"])
        heads["visual_projection"] = INITIAL_STD * torch.randn(out or 0, widths["visual_projection"])
        return heads

    # Features

    def read_prompts(self, prompts: Sequence[str]) -> ReadPrompts:
        guided = self.guidance_scale != 1
        texts = [*prompts, ""] if guided else list(prompts)
        context, pooled = self._encode_text(texts)
        n = len(prompts)
        with self._exact():
            text = pooled[:n].float() if self.is_xl else self.text_projection(pooled[:n].float())
            unit = F.normalize(text, dim=-1)
        return ReadPrompts(unit, context[:n], context[n:] if guided else None)

    def _encode_text(self, texts: list[str]) -> tuple[Conditioning, Float[Tensor, "n p"]]:
        """What the UNet reads of each, and what the prompt's own features are made of."""
        ids = self._tokenize("tokenizer", texts)
        if not self.is_xl:
            found = self.text_encoder(ids)
            return Conditioning(found.last_hidden_state), found.pooler_output
        first = self.text_encoder(ids, output_hidden_states=True)
        second = self.text_encoder_2(self._tokenize("tokenizer_2", texts), output_hidden_states=True)
        embeds = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)
        side = PIXELS_PER_LATENT * self.unet.config.sample_size  # whatever the latents' size
        row = torch.tensor([side, side, 0, 0, side, side], dtype=torch.float32, device=embeds.device)
        return Conditioning(embeds, second.text_embeds, row.expand(len(texts), 6)), second.text_embeds

    def _tokenize(self, name: str, texts: list[str]) -> Tensor:
        tokenizer = getattr(self, name)
        length = tokenizer.model_max_length
        batch = tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        CUT_PROMPTS.look(tokenizer, texts, batch.attention_mask)
        return batch.input_ids.to(self.log_scale.device)

    def encode_seen(
        self, seen: Float[Tensor, "n c h w"], timesteps: Real[Tensor, " n"], prompts: ReadPrompts
    ) -> Float[Tensor, "n d"]:
        """Unit vectors of noisy latents, fp32; ``prompts`` has one row for each of them."""
        pooled = self.pooled(seen, timesteps, prompts)
        with self._exact():
            return F.normalize(self.visual_projection(pooled), dim=-1)

    def pooled(
        self, latents: Float[Tensor, "n c h w"], timesteps: Real[Tensor, " n"], prompts: ReadPrompts
    ) -> Float[Tensor, "n widths"]:
        """What is projected: the stages' means and the middle's, of which the middle's is guided; fp32."""
        assert prompts.context is not None, "prompts were read by another model"
        n = len(latents)
        if self.guidance_scale == 1:
            return torch.cat(stage_means(self.unet, latents, timesteps, prompts.context), dim=1)
        assert prompts.negative is not None, "prompts were read by another model"
        both = Conditioning.cat([prompts.context, prompts.negative.repeat_interleave(n)])
        *stages, middle = stage_means(self.unet, latents.repeat(2, 1, 1, 1), timesteps.repeat(2), both)
        alone = len(stages) if self.guided == "middle" else int(self.is_xl)
        down = [means[:n] for means in stages[:alone]] + [self._guide(means) for means in stages[alone:]]
        return torch.cat([*down, self._guide(middle)], dim=1)

    def _guide(self, means: Float[Tensor, "rows width"]) -> Float[Tensor, "half width"]:
        """Of the means with prompts, and then without."""
        conditional, unguided = means.chunk(2)
        return unguided + self.guidance_scale * (conditional - unguided)

    @property
    def logit_scale(self) -> Float[Tensor, ""]:
        return self.log_scale.float().exp()

    def _exact(self) -> torch.autocast:
        return torch.autocast(self.log_scale.device.type, enabled=False)

    # Scores

    def score(
        self, latents: Float[Tensor, "n c h w"], prompts: Sequence[str], timesteps: Real[Tensor, " n"]
    ) -> Float[Tensor, " n"]:
        texts = tuple(dict.fromkeys(prompts))
        places = {text: place for place, text in enumerate(texts)}
        rows = torch.tensor([places[prompt] for prompt in prompts], device=latents.device)
        read = self._read_once(texts)[rows]
        return self.logit_scale * (self.encode_seen(latents, timesteps, read) * read.text).sum(dim=-1)

    def _read_once(self, texts: tuple[str, ...]) -> ReadPrompts:
        """The same prompts come at every step of a rollout: the last ones are kept as long as no weight changes."""
        key = (texts, tuple(parameter._version for parameter in self.parameters()))
        if self._last_read is None or self._last_read[0] != key:
            self._last_read = (key, self.read_prompts(texts))
        return self._last_read[1]

    def _apply(self, *args: Any, **kwargs: Any) -> LatentRewardModel:
        self._last_read = None  # another device or number type
        super()._apply(*args, **kwargs)
        return self

    # Export

    def save_pretrained(self, folder: Path, dtype: Literal["fp32", "bf16", "fp16"] = "fp32") -> None:
        """Write the published form into a folder, whole or not at all; see ``export_up_part``.

        The projections and the scale stay fp32.
        """
        names = ("visual_projection",) if self.is_xl else ("visual_projection", "text_projection")
        heads: dict[str, Any] = {name: {"weight": getattr(self, name).weight.detach().cpu()} for name in names}
        heads["logit_scale"] = self.log_scale.detach().cpu()
        encoders = self.text_encoders()
        save_folder(Path(folder), self._down_part, self.export_up_part, encoders, heads, DTYPES[dtype])
