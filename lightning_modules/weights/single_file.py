"""Checkpoints of one file in the original layout of Stable Diffusion, as people share them: one network out of many."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.single_file_utils import (
    SingleFileComponentError,
    create_diffusers_clip_model_from_ldm,
    load_single_file_checkpoint,
)

from lightning_modules.errors import ConfigError
from lightning_modules.weights.audit import UNREADABLE, described


def read_single_file(model_class: Any, file: Path, dtype: torch.dtype, **layout: Any) -> Any:
    """A network of a diffusers class, or a CLIP text model of transformers, in the given number type.

    Args:
        model_class: which of the networks in the file.
        file: a ``.safetensors``.
        dtype: what the weights become.
        layout: ``config``, ``subfolder`` and ``local_files_only``: where the network's configuration lies.

    Raises:
        ConfigError: a damaged file, or one that lacks weights of this network or has them in other shapes.
    """
    try:
        if hasattr(model_class, "from_single_file"):
            model = model_class.from_single_file(str(file), torch_dtype=dtype, **layout)
        else:
            content = load_single_file_checkpoint(str(file), local_files_only=True)
            model = create_diffusers_clip_model_from_ldm(model_class, content, torch_dtype=dtype, **layout).to(dtype)
    except (*UNREADABLE, SingleFileComponentError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ConfigError(
            f"Pretrained weights: {file} is damaged or holds no {model_class.__name__} such as "
            f"{layout['config']!r} describes it; set the policy's `layout` to a pipeline of the file's kind. ({reason})"
        ) from error
    # What the file does not hold was never made.
    difference = described([name for name, value in model.state_dict().items() if value.is_meta], (), ())
    if difference is not None:
        raise ConfigError(
            f"Pretrained weights: {file} does not hold all weights of the {model_class.__name__}: {difference}; give a "
            "complete checkpoint"
        )
    return model
