"""The records that flow through a run: frozen, typed, moved and joined whole.

Letters in shapes: b pairs, n queries (network evaluations), c h w latent, H W pixels, l tokens, d width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar, get_type_hints

import torch
from jaxtyping import Bool, Float, Int, Real
from torch import Tensor

Self = TypeVar("Self", bound="Record")


class Record:
    """What a frozen dataclass of tensors, texts and other records can do: every field that one has is moved, joined and
    written with it, so that a new one is added in one place.

    The first dimension of every tensor counts rows, as does the length of a tuple of texts. Lightning calls ``to`` and
    ``pin_memory``. ``indices`` stay where they are: draws are keyed by them on the host, which would wait for a device.
    """

    def _map(self: Self, function: Any) -> Self:
        changed = {}
        for field in fields(self):  # type: ignore[arg-type]  # every subclass is a dataclass
            value = getattr(self, field.name)
            if isinstance(value, (Tensor, Record)):
                changed[field.name] = function(value)
        return replace(self, **changed)  # type: ignore[type-var]

    def to(self: Self, *args: Any, **kwargs: Any) -> Self:
        moved = self._map(lambda value: value.to(*args, **kwargs))
        return replace(moved, indices=self.indices) if hasattr(self, "indices") else moved  # type: ignore[type-var]

    def pin_memory(self: Self) -> Self:
        return self._map(lambda value: value.pin_memory())

    @classmethod
    def cat(cls: type[Self], parts: Sequence[Self]) -> Self:
        """Rows of all parts, in order. What is neither tensor, text nor record (a guidance scale) must be one for all.

        Raises:
            ValueError: no parts, a field that some have and others do not, or tensors of different shapes.
        """
        if not parts:
            raise ValueError(f"{cls.__name__}.cat wants at least one part")
        names = [field.name for field in fields(parts[0])]  # type: ignore[arg-type]
        joined = {name: _joined(name, [getattr(part, name) for part in parts]) for name in names}
        return replace(parts[0], **joined)  # type: ignore[type-var]

    def to_json(self) -> dict[str, Any]:
        """Tensors as nested lists, by field."""
        return {field.name: getattr(self, field.name).tolist() for field in fields(self)}  # type: ignore[arg-type]

    @classmethod
    def from_json(cls: type[Self], value: Mapping[str, Any]) -> Self:
        """What ``to_json`` made; number types and ranks are the annotations'.

        Raises:
            KeyError, TypeError, ValueError, RuntimeError: it is something else.
        """
        hints = get_type_hints(cls)
        found = {}
        for field in fields(cls):  # type: ignore[arg-type]
            hint = hints[field.name]
            tensor = torch.tensor(value[field.name], dtype=_STORED_DTYPES[hint.dtype])
            if tensor.ndim != len(hint.dims):
                raise ValueError(f"{field.name} has {tensor.ndim} dimensions, not {len(hint.dims)}")
            found[field.name] = tensor
        if len({len(tensor) for tensor in found.values()}) > 1:
            raise ValueError(f"fields of different lengths, { ({name: len(rows) for name, rows in found.items()}) }")
        return cls(**found)


_STORED_DTYPES = {Float: torch.float32, Int: torch.int64, Bool: torch.bool, Real: None}  # None: as the numbers are


def _joined(name: str, values: Sequence[Any]) -> Any:
    first = values[0]
    kinds = {type(value) for value in values}
    if len(kinds) > 1:
        raise ValueError(f"{name} is {' in some and '.join(sorted(kind.__name__ for kind in kinds))} in others")
    if isinstance(first, Tensor):
        shapes = {tuple(value.shape[1:]) for value in values}
        if len(shapes) > 1:
            raise ValueError(f"{name} has different shapes, {' and '.join(map(str, sorted(shapes)))}")
        return torch.cat(list(values))
    if isinstance(first, Record):
        return type(first).cat(values)
    if isinstance(first, tuple):
        return tuple(text for texts in values for text in texts)
    if any(value != first for value in values):
        raise ValueError(f"{name} differs, {' and '.join(sorted({str(value) for value in values}))}")
    return first


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
class LabelledPictures(Record):
    """Single pictures, each liked or not, as a DataModule gives them.

    Attributes:
        pictures: RGB in [-1, 1].
        liked: whether the picture is one to learn, else one to turn away from.
        prompts: captions, length b.
        time_ids: as ``chosen_time_ids`` of ``PreferencePairs``.
        indices: position of each picture in the run's stream of samples; all its random draws are keyed by it.
    """

    pictures: Float[Tensor, "b 3 H W"]
    liked: Bool[Tensor, " b"]
    prompts: tuple[str, ...]
    time_ids: Float[Tensor, "b 6"]
    indices: Int[Tensor, " b"]

    def __len__(self) -> int:
        return self.pictures.shape[0]


@dataclass(frozen=True)
class LabelledLatents(Record):
    """VAE latents of single pictures, multiplied by its scaling factor; what ``KTO`` trains on.

    Attributes:
        latents: of each picture.
        liked, prompts, time_ids, indices: as in ``LabelledPictures``.
    """

    latents: Float[Tensor, "b c h w"]
    liked: Bool[Tensor, " b"]
    prompts: tuple[str, ...]
    time_ids: Float[Tensor, "b 6"]
    indices: Int[Tensor, " b"]

    def __len__(self) -> int:
        return self.latents.shape[0]


@dataclass(frozen=True)
class StepPairs(Record):
    """Pairs of one denoising step: two ways to go on from the same noisy latents (SPO, arXiv 2406.04314).

    Attributes:
        latents: x_t of the chosen step, and of the rejected one unless ``rejected_latents`` is given.
        chosen, rejected: the two x_{t-1}.
        timesteps: t, where the step starts.
        next_timesteps: where it ends; the schedule's ``clean`` where that is at clean latents.
        prompts: captions, length b.
        score_gap: softmax([score of chosen, score of rejected])[0] - [1], in [0, 1].
        indices: position of each pair in the run's stream of samples.
        rejected_latents: the rejected step's own x_t, where a group of several inner steps has moved apart.
    """

    latents: Float[Tensor, "b c h w"]
    chosen: Float[Tensor, "b c h w"]
    rejected: Float[Tensor, "b c h w"]
    timesteps: Real[Tensor, " b"]
    next_timesteps: Real[Tensor, " b"]
    prompts: tuple[str, ...]
    score_gap: Float[Tensor, " b"]
    indices: Int[Tensor, " b"]
    rejected_latents: Float[Tensor, "b c h w"] | None = None

    def __len__(self) -> int:
        return self.chosen.shape[0]


@dataclass(frozen=True)
class DenoiserQuery(Record):
    """Where to evaluate the denoiser. An objective may subclass it to carry its target.

    Attributes:
        latents: noisy latents x_t.
        timesteps: t, as the policy's schedule counts.
        cond: one row per query.
        guidance_scale: w of eps = eps_negative + w (eps_cond - eps_negative); 1 means one pass without guidance.
    """

    latents: Float[Tensor, "n c h w"]
    timesteps: Real[Tensor, " n"]
    cond: Conditioning
    guidance_scale: float = 1.0
