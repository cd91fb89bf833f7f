"""The records that flow through a run. Frozen, typed, movable; no behaviour beyond that.

Letters in shapes: b pairs, n queries (network evaluations), c h w latent, H W pixels, l tokens, d width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

Self = TypeVar("Self", bound="Record")


class Record:
    """Moves and pins every tensor of a frozen dataclass; Lightning calls ``to`` and ``pin_memory``."""

    def _map(self: Self, function: Any) -> Self:
        changed = {}
        for field in fields(self):  # type: ignore[arg-type]  # every subclass is a dataclass
            value = getattr(self, field.name)
            if isinstance(value, (Tensor, Record)):
                changed[field.name] = function(value)
        return replace(self, **changed)  # type: ignore[type-var]

    def to(self: Self, *args: Any, **kwargs: Any) -> Self:
        return self._map(lambda value: value.to(*args, **kwargs))

    def pin_memory(self: Self) -> Self:
        return self._map(lambda value: value.pin_memory())


@dataclass(frozen=True)
class Conditioning(Record):
    """What the denoiser is told besides latents and time; the same type for SD 1.x/2.x and SDXL.

    Attributes:
        embeds: text tokens' hidden states.
        pooled: SDXL's pooled text embedding; None for SD.
        time_ids: SDXL's micro-conditioning (original height, width, crop top, left, target height, width),
            in pixels; None where it is not known or not used.
    """

    embeds: Float[Tensor, "n l d"]
    pooled: Float[Tensor, "n p"] | None = None
    time_ids: Float[Tensor, "n 6"] | None = None

    def __len__(self) -> int:
        return self.embeds.shape[0]

    def __getitem__(self, rows: slice | Tensor) -> Conditioning:
        return self._map(lambda value: value[rows])

    def with_time_ids(self, time_ids: Float[Tensor, "n 6"] | None) -> Conditioning:
        return replace(self, time_ids=time_ids)

    def repeat_interleave(self, times: int) -> Conditioning:
        """Every row ``times`` times in a row: a a b b for times = 2."""
        return self._map(lambda value: value.repeat_interleave(times, dim=0))

    @staticmethod
    def cat(parts: Sequence[Conditioning]) -> Conditioning:
        """Rows of all parts, in order. A field must be set in all parts or in none."""

        def joined(name: str) -> Tensor | None:
            values = [getattr(part, name) for part in parts]
            return None if all(value is None for value in values) else torch.cat(values)

        return Conditioning(torch.cat([part.embeds for part in parts]), joined("pooled"), joined("time_ids"))


@dataclass(frozen=True)
class PreferencePairs(Record):
    """Pairs of pictures for one prompt each, as a DataModule gives them.

    Attributes:
        chosen, rejected: RGB in [-1, 1]; row i of both belongs to prompt i and went through the same flip.
        prompts: captions, length b.
        chosen_time_ids, rejected_time_ids: per picture (original height, original width, crop top, crop left,
            target height, target width) in pixels, the order of SDXL's ``add_time_ids``; the crop offsets are
            those of the resized picture, as SDXL was trained with.
        indices: position of each pair in the run's stream of samples; all its random draws are keyed by it.
        labels: probability that ``chosen`` is the preferred one: 1, or 0.5 for a tie; None means 1 for all.
        weights: what each pair counts, 1 / (number of pairs of its prompt in the data set); None means 1 for all.
    """

    chosen: Float[Tensor, "b 3 H W"]
    rejected: Float[Tensor, "b 3 H W"]
    prompts: tuple[str, ...]
    chosen_time_ids: Float[Tensor, "b 6"]
    rejected_time_ids: Float[Tensor, "b 6"]
    indices: Int[Tensor, " b"]
    labels: Float[Tensor, " b"] | None = None
    weights: Float[Tensor, " b"] | None = None

    def __len__(self) -> int:
        return self.chosen.shape[0]


@dataclass(frozen=True)
class LatentPairs(Record):
    """Pairs of VAE latents: what the offline objectives (SFT, DPO, ...) train on.

    Attributes:
        chosen, rejected: latents multiplied by the VAE's scaling factor. ``rejected`` is None where the
            objective reads the chosen picture alone and encoding the other would be waste.
        prompts: captions, length b.
        chosen_time_ids, rejected_time_ids, indices: as in ``PreferencePairs``.
        cond: the prompts' embeddings where they come from cached shards, else None.
    """

    chosen: Float[Tensor, "b c h w"]
    rejected: Float[Tensor, "b c h w"] | None
    prompts: tuple[str, ...]
    chosen_time_ids: Float[Tensor, "b 6"]
    rejected_time_ids: Float[Tensor, "b 6"]
    indices: Int[Tensor, " b"]
    cond: Conditioning | None = None

    def __len__(self) -> int:
        return self.chosen.shape[0]


@dataclass(frozen=True)
class StepPairs(Record):
    """Pairs of one denoising step: two ways to go on from the same noisy latents (SPO, arXiv 2406.04314).

    Attributes:
        latents: x_t of the chosen step, and of the rejected one unless ``rejected_latents`` is given.
        chosen, rejected: the two x_{t-1}.
        timesteps: t, int64.
        prev_timesteps: the timestep that the step arrives at, int64; negative where it ends at clean latents.
        prompts: captions, length b.
        score_gap: softmax([score of chosen, score of rejected])[0] - [1], in [0, 1].
        indices: position of each pair in the run's stream of samples.
        rejected_latents: the rejected step's own x_t, where a group of several inner steps has moved apart.
        cond: the prompts' embeddings where they are stored with the pair, else None.
    """

    latents: Float[Tensor, "b c h w"]
    chosen: Float[Tensor, "b c h w"]
    rejected: Float[Tensor, "b c h w"]
    timesteps: Int[Tensor, " b"]
    prev_timesteps: Int[Tensor, " b"]
    prompts: tuple[str, ...]
    score_gap: Float[Tensor, " b"]
    indices: Int[Tensor, " b"]
    rejected_latents: Float[Tensor, "b c h w"] | None = None
    cond: Conditioning | None = None

    def __len__(self) -> int:
        return self.chosen.shape[0]


@dataclass(frozen=True)
class DenoiserQuery(Record):
    """Where to evaluate the denoiser. An objective may subclass it to carry its target.

    Attributes:
        latents: noisy latents x_t.
        timesteps: t, int64 in 0 .. T - 1.
        cond: one row a query.
        guidance_scale: w of eps = eps_negative + w (eps_cond - eps_negative); 1 means one pass without guidance.
    """

    latents: Float[Tensor, "n c h w"]
    timesteps: Int[Tensor, " n"]
    cond: Conditioning
    guidance_scale: float = 1.0
