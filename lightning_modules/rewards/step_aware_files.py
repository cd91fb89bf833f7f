"""Files of step-aware preference models: the published checkpoints, and folders of our own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import CLIPConfig, CLIPModel

from lightning_modules.errors import ConfigError
from lightning_modules.files import atomic_folder
from lightning_modules.rewards.clip import ClipPreprocessing
from lightning_modules.rewards.time_conditioning import add_time_conditioning
from lightning_modules.schedules.base import ScheduleKind
from lightning_modules.weights.audit import UNREADABLE, mismatch
from lightning_modules.weights.pretrained import Pretrained
from lightning_modules.weights.state_dicts import damaged, find_weights, read_state_dict

_WHOSE = "step-aware preference model"
KIND = "learned_kind"  # in the weights' file, of whose timesteps they have learned


def load_clip(source: Pretrained, checkpoint: str | None) -> tuple[Any, ScheduleKind | None]:
    """A time-conditioned ``CLIPModel`` in fp32, or in the number type of its file; and the kind of schedule whose
    timesteps it has learned, None where it has learned none. A file that says nothing, as the published ones, is
    Stable Diffusion's.

    Args:
        source: a plain CLIP model, which it then still computes, or a folder of our own. With ``checkpoint`` only its
            configuration is read.
        checkpoint: file, or ``organisation/name/file`` on the hub.

    Raises:
        ConfigError: missing or damaged weights, or weights of a model of another size.
    """
    weights = _own_weights(source) if checkpoint is None else find_weights(checkpoint, _WHOSE)
    return (_plain_clip(source), None) if weights is None else (_time_conditioned_clip(source, weights), _kind(weights))


def save_folder(
    folder: Path,
    clip: Any,
    tokenizer: Any,
    processing: ClipPreprocessing,
    dtype: torch.dtype,
    learned_kind: ScheduleKind | None,
) -> None:
    """Write weights, configuration, tokenizer and image processor into one folder, whole or not at all."""
    with atomic_folder(folder) as new:
        weights = clip.state_dict()
        save_file(
            {name: value.detach().to("cpu", dtype).contiguous() for name, value in weights.items()},
            new / "model.safetensors",
            metadata=None if learned_kind is None else {KIND: learned_kind},
        )
        clip.config.save_pretrained(new)
        tokenizer.save_pretrained(new)
        processing.as_processor().save_pretrained(new)


def _plain_clip(source: Pretrained) -> Any:
    clip: Any = source.load_model(CLIPModel, torch.float32)
    add_time_conditioning(clip)
    return clip


def _time_conditioned_clip(source: Pretrained, file: Path) -> Any:
    clip: Any = CLIPModel(source.load(_read_config))
    add_time_conditioning(clip)
    found = read_state_dict(file, _WHOSE)
    if all(name.startswith("model.") for name in found):
        found = {name.removeprefix("model."): value for name, value in found.items()}
    # Buffers that older versions of transformers stored: 0, 1, 2, ...
    found = {name: value for name, value in found.items() if not name.endswith(".position_ids")}
    difference = mismatch(clip.state_dict(), found)
    if difference is not None:
        raise ConfigError(
            f"{_WHOSE}: {file} does not fit the CLIP model {source.name!r}: {difference}; "
            "give `pretrained` the model that it was trained from, or another checkpoint"
        )
    clip.load_state_dict(found)
    return clip


def _kind(file: Path) -> ScheduleKind:
    if file.suffix != ".safetensors":
        return "diffusion"
    with safe_open(file, "pt") as weights:
        return "flow" if (weights.metadata() or {}).get(KIND) == "flow" else "diffusion"


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
        raise damaged(file, _WHOSE, error) from error
