"""What every reward model answers: how good is this picture for this prompt?"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, Int, Real
from torch import Tensor, nn

from lightning_modules.batches import Conditioning, Record
from lightning_modules.errors import ConfigError
from lightning_modules.schedules.base import ScheduleKind

REMEMBERED = 16384  # prompts whose features a reward keeps: 64 MB of CLIP-H's


class FrozenScorer(nn.Module, ABC):
    """What all rewards have in common, so that a concrete one is its network and its formula.

    A network is frozen when it is assigned as an attribute, and stays in eval mode, whatever module it is part of.
    ``score`` and ``parts`` of every subclass run without gradient and without autocast, whoever calls them; that there
    are as many prompts as pictures, and one score per picture, is checked here. ``remembered`` encodes each prompt
    once.
    """

    def __init__(self) -> None:
        super().__init__()
        self._texts: dict[str, Tensor] = {}
        self._texts_of: tuple[int, ...] = ()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for name in ("score", "parts"):
            if name in vars(cls):
                setattr(cls, name, _exactly(vars(cls)[name]))

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, nn.Module):
            value.requires_grad_(False).eval()
        super().__setattr__(name, value)

    def train(self, mode: bool = True) -> FrozenScorer:
        """Stays in eval mode: a score may not depend on dropout."""
        return super().train(False)

    def _apply(self, *args: Any, **kwargs: Any) -> FrozenScorer:
        self._texts.clear()  # another device or number type
        return super()._apply(*args, **kwargs)

    def remembered(self, prompts: Sequence[str], encode: Callable[[str], Float[Tensor, " d"]]) -> Float[Tensor, "n d"]:
        """One row per prompt; each text is encoded once as long as no weight changes.

        One by one: padded together with others, a text's last bits would depend on its company.
        """
        weights = tuple(parameter._version for parameter in self.parameters())  # counts changes in place
        if weights != self._texts_of:
            self._texts.clear()
            self._texts_of = weights
        rows = {text: self._texts[text] if text in self._texts else encode(text) for text in dict.fromkeys(prompts)}
        self._texts |= rows
        while len(self._texts) > REMEMBERED:
            del self._texts[next(iter(self._texts))]
        return torch.stack([rows[text] for text in prompts])


def _exactly(method: Callable[..., Any]) -> Callable[..., Any]:
    """``score`` or ``parts`` without gradient and autocast, its prompts counted before and its scores after."""

    @wraps(method)
    @torch.no_grad()
    def checked(self: FrozenScorer, images: Tensor, prompts: Sequence[str], *args: Any, **kwargs: Any) -> Any:
        if len(images) != len(prompts):
            raise ValueError(f"{type(self).__name__}: {len(images)} pictures and {len(prompts)} prompts")
        with torch.autocast(images.device.type, enabled=False):
            found = method(self, images, prompts, *args, **kwargs)
        if isinstance(found, dict):
            return {name: _per_picture(self, values, images) for name, values in found.items()}
        return _per_picture(self, found, images)

    return checked


def _per_picture(scorer: FrozenScorer, scores: object, images: Tensor) -> Tensor:
    """
    Raises:
        ConfigError: a reward that gives something else than one number per picture.
    """
    if not isinstance(scores, Tensor) or tuple(scores.shape) != (len(images),) or scores.is_complex():
        name = getattr(scorer, "name", type(scorer).__name__)
        got = f"shape {tuple(scores.shape)}" if isinstance(scores, Tensor) else f"a {type(scores).__name__}"
        raise ConfigError(f"reward {name} must give a tensor of one number per picture, ({len(images)},), got {got}")
    return scores.to(images.device, torch.float32)


class RewardModel(FrozenScorer):
    """Scores pictures against prompts; higher is better.

    A subclass writes ``score``, and sets ``name``, the word that appears in metric names such as
    ``val/win_rate/<name>``.
    """

    name: str

    @abstractmethod
    def score(self, images: Float[Tensor, "n 3 h w"], prompts: Sequence[str]) -> Float[Tensor, " n"]:
        """One score per picture, in fp32 on the pictures' device.

        Args:
            images: pictures in [0, 1], RGB.
            prompts: one prompt per picture.

        Raises:
            UserError: a prompt that this reward cannot judge.
        """

    def parts(self, images: Float[Tensor, "n 3 h w"], prompts: Sequence[str]) -> dict[str, Float[Tensor, " n"]]:
        """The score's named components, where it has any; reported beside it and never trained on."""
        return {}

    def described(self) -> dict[str, Any]:
        """What another would need to give the same scores, as plain values for protocols and results.

        "name" and "class" always; where a reward has them "version", "weights" as the user named them, "scale",
        "preprocessing" (see ``preprocessing``) and "dtype", the network's number type. A subclass adds its own.
        """
        return {"name": self.name, "class": f"{type(self).__module__}.{type(self).__qualname__}"}


class StepRewardModel(FrozenScorer):
    """Scores x0-predictions against prompts, given the timestep they were predicted at; higher is better.

    SPO's step-aware preference model (arXiv 2406.04314, section 3.2) is one.

    Attributes:
        learned_kind: the kind of schedule whose timesteps it has learned; None if it has learned none, or all.
    """

    learned_kind: ScheduleKind | None = None

    @abstractmethod
    def score(
        self, images: Float[Tensor, "n 3 h w"], prompts: Sequence[str], timesteps: Real[Tensor, " n"]
    ) -> Float[Tensor, " n"]:
        """One score per picture, in fp32 on the pictures' device.

        Args:
            images: decoded x0-predictions in [0, 1], RGB.
            prompts: one prompt per picture; the same one comes many times, see ``remembered``.
            timesteps: the t of each prediction; 0 for a finished picture.
        """


class LatentStepRewardModel(FrozenScorer):
    """Scores noisy latents against prompts, given the timestep; higher is better. LPO's (arXiv 2502.01051) is one.

    Attributes:
        latent_channels: c.
        added_conditions: the kind of base model whose latents it knows, by what a UNet of that kind reads besides the
            prompt's tokens: None for Stable Diffusion 1.x and 2.x, "text_time" for SDXL.
        learned_kind: the kind of schedule whose noisy latents and timesteps it knows.
    """

    latent_channels: int
    added_conditions: str | None
    learned_kind: ScheduleKind = "diffusion"

    @abstractmethod
    def score(
        self, latents: Float[Tensor, "n c h w"], prompts: Sequence[str], timesteps: Real[Tensor, " n"]
    ) -> Float[Tensor, " n"]:
        """One score per row, in fp32 on the latents' device.

        Args:
            latents: noisy, scaled as the policy's.
            prompts: one per row; the same ones come at every step of a rollout.
            timesteps: as the policy's schedule counts.
        """


@dataclass(frozen=True)
class ReadPrompts(Record):
    """What a preference model makes of prompts before it sees anything.

    Attributes:
        text: unit vectors that features are compared with.
        context: what the model reads of the prompts while it looks, if it does.
        negative: of the empty prompt, one row, for models with guidance.
    """

    text: Float[Tensor, "n d"]
    context: Conditioning | None = None
    negative: Conditioning | None = None

    def __getitem__(self, rows: Int[Tensor, " m"]) -> ReadPrompts:
        return ReadPrompts(self.text[rows], None if self.context is None else self.context[rows], self.negative)


class PreferenceModel(FrozenScorer):
    """What ``StepAwarePreferenceModule`` trains: exp(logit_scale) cos(what is seen at a timestep, prompt)."""

    @property
    @abstractmethod
    def logit_scale(self) -> Float[Tensor, ""]:
        """What multiplies the cosine; with gradient where the model trains."""

    @abstractmethod
    def read_prompts(self, prompts: Sequence[str]) -> ReadPrompts:
        """One row per prompt, fp32. With gradients where the model trains."""

    @abstractmethod
    def encode_seen(
        self, seen: Float[Tensor, "n ..."], timesteps: Real[Tensor, " n"], prompts: ReadPrompts
    ) -> Float[Tensor, "n d"]:
        """Unit vectors, fp32. With gradients where the model trains.

        Args:
            seen: what a ``View`` makes of noisy pictures.
            timesteps: of each.
            prompts: one row for each.
        """

    @abstractmethod
    def save_pretrained(self, folder: Path, dtype: Literal["fp32", "bf16", "fp16"] = "fp32") -> None:
        """Write a folder that the class loads, whole or not at all."""
