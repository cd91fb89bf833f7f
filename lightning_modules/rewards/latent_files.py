"""Files of latent reward models in the form that LPO's authors publish (casiatao/LRM), and of the pipelines that such a
model starts from.

``unet/{config.json, diffusion_pytorch_model.safetensors}``, ``text_encoder/{config.json, model.safetensors}``, SDXL
also ``text_encoder_2/``, and ``state_dict.pt`` with the projections and the logarithm of the scale. The UNet is there
whole, of which no score depends on the up part: it is never loaded.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from huggingface_hub import snapshot_download
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lightning_modules.errors import ConfigError
from lightning_modules.files import atomic_folder
from lightning_modules.rewards.down_part import without_weights
from lightning_modules.weights.audit import UNREADABLE, described
from lightning_modules.weights.pretrained import Pretrained
from lightning_modules.weights.state_dicts import damaged, find_weights, read_keys

WHOSE = "latent reward model"
HEADS = "state_dict.pt"
UNET_FILES = (
    "config.json",
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model-?????-of-?????.safetensors",
)


@dataclass(frozen=True)
class DownPart:
    """A UNet without its up part, and where the whole one lies.

    Attributes:
        network: a ``UNet2DConditionModel``.
        config: as its file has it.
        files: those with its weights.
        left_out: names of the up part's weights; empty where the files don't hold it.
    """

    network: Any
    config: Mapping[str, Any]
    files: tuple[Path, ...]
    left_out: frozenset[str]

    def read_up_part(self) -> dict[str, Tensor]:
        """The weights that were left out.

        Raises:
            ConfigError: the files are gone or damaged.
        """
        return _read(self.files, self.left_out)


def load_down_part(source: Pretrained, dtype: torch.dtype) -> DownPart:
    """The down and middle part of the UNet that lies in ``source``.

    Raises:
        ConfigError: missing or damaged files; weights that are missing, unknown, or of other shapes than the
            configuration says. The up part may be missing as a whole.
    """
    unet = source.component("unet")
    config = unet.load(UNet2DConditionModel.load_config)
    folder = _folder(unet, UNET_FILES)
    files = tuple(sorted(path for pattern in UNET_FILES[1:] for path in folder.glob(pattern)))
    if not files:
        raise ConfigError(
            f"{WHOSE}: no {UNET_FILES[1]} in {folder}; give a folder with plain safetensors weights (no variant)"
        )
    network, up_part = without_weights(config)
    wanted, there = network.state_dict(), [name for file in files for name in read_keys(file, WHOSE)]
    left_out = up_part & set(there)
    found = _read(files, set(there) & wanted.keys())
    missing = wanted.keys() - found.keys() | (up_part - left_out if left_out else set())
    reshaped = [name for name, value in found.items() if value.shape != wanted[name].shape]
    difference = described(missing, set(there) - wanted.keys() - up_part, reshaped)
    if difference is not None:
        raise ConfigError(f"{WHOSE}: {folder} does not hold the weights of the UNet that its configuration describes: "
                          f"{difference}; give complete files as save_pretrained writes them")  # fmt: skip
    # Copies: where a tensor lies in its file would decide the last bits of what is computed with it.
    weights = {name: value.to(dtype, copy=True) for name, value in found.items()}
    network.load_state_dict(weights, assign=True)
    return DownPart(network, config, files, frozenset(left_out))


def load_heads(source: Pretrained, widths: Mapping[str, int], out: int | None) -> dict[str, Tensor]:
    """Projections by name, (out, in), and "logit_scale", the logarithm of the scale; fp32.

    Args:
        source: the model's folder.
        widths: what each projection reads.
        out: what all of them give; None takes what the file has.

    Raises:
        ConfigError: missing or damaged; other projections, or of another size.
    """
    file = _folder(source, (HEADS,)) / HEADS
    if not file.is_file():
        raise ConfigError(
            f"{WHOSE}: no {HEADS} in {file.parent}; give a latent reward model, or `untrained: true` to start one from "
            "a pipeline"
        )
    try:
        held = torch.load(file, map_location="cpu", weights_only=True)
        found = {name: value["weight"] if isinstance(value, dict) else value for name, value in held.items()}
        heads = {name: torch.as_tensor(value, dtype=torch.float32) for name, value in found.items()}
    except UNREADABLE as error:
        raise damaged(file, WHOSE, error) from error
    out = out or max((len(head) for head in heads.values() if head.ndim), default=0)
    wanted: dict[str, tuple[int, ...]] = {name: (out, width) for name, width in widths.items()} | {"logit_scale": ()}
    reshaped = [name for name in heads.keys() & wanted if heads[name].shape != wanted[name]]
    difference = described(wanted.keys() - heads.keys(), heads.keys() - wanted.keys(), reshaped)
    if difference is not None:
        raise ConfigError(
            f"{WHOSE}: {file} does not fit its UNet and text encoders: {difference}; give the file saved with them"
        )
    return heads


def read_text_projection(name: str, width: int) -> Tensor:
    """``text_projection.weight`` of a CLIP model in one ``.safetensors`` file, (out, in), fp32.

    Args:
        name: a file, or ``organisation/name/file`` on the hub.
        width: of the text encoder.

    Raises:
        ConfigError: no such file, or none that fits.
    """
    file = find_weights(name, WHOSE, (".safetensors",))
    key = "text_projection.weight"
    weight = _read([file], {key}).get(key)
    if weight is None or weight.ndim != 2 or weight.shape[1] != width:
        got = "none" if weight is None else f"one of shape {tuple(weight.shape)}"
        raise ConfigError(f"{WHOSE}: {file} holds {got} where a {key} for texts of width {width} is wanted; give the "
                          "CLIP model that the text encoder is of")  # fmt: skip
    return weight.float()


def save_folder(
    folder: Path,
    unet: DownPart,
    up_part: bool,
    text_encoders: Mapping[str, nn.Module],
    heads: Mapping[str, Any],
    dtype: torch.dtype,
) -> None:
    """Write a model in the published form, whole or not at all.

    Args:
        folder: is replaced.
        unet: its network's weights as they now are.
        up_part: write the UNet's up part, too, as it was.
        text_encoders: by the names of their folders.
        heads: what ``state_dict.pt`` holds.
        dtype: number type of the networks; the heads stay fp32.
    """
    weights = {**unet.network.state_dict(), **(unet.read_up_part() if up_part else {})}
    with atomic_folder(folder) as new:
        _write(new / "unet", UNET_FILES[1], weights, dtype)
        config = {name: value for name, value in unet.config.items() if name != "_name_or_path"}
        (new / "unet" / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        for name, encoder in text_encoders.items():
            _write(new / name, "model.safetensors", _as_published(encoder.state_dict()), dtype)
            settings: Any = encoder.config
            settings.save_pretrained(new / name)
        torch.save(dict(heads), new / HEADS)


def _as_published(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """transformers 5 names a text encoder's weights without ``text_model.``, and transformers 4 would not find them."""
    known = ("text_model.", "text_projection.")
    return {name if name.startswith(known) else f"text_model.{name}": value for name, value in weights.items()}


def _write(folder: Path, name: str, weights: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    folder.mkdir()
    stored = {key: value.detach().to("cpu", dtype).contiguous() for key, value in weights.items()}
    save_file(stored, folder / name, metadata={"format": "pt"})


def _folder(source: Pretrained, files: Iterable[str]) -> Path:
    """Where the files lie, fetched if need be."""
    if source.local:
        return Path(source.location) / source.subfolder

    def fetch(location: str, local_files_only: bool, subfolder: str = "", **options: Any) -> str:
        return snapshot_download(
            location, allow_patterns=[f"{subfolder}/{name}".strip("/") for name in files], **options
        )

    return Path(source.load(fetch)) / source.subfolder


def _read(files: Iterable[Path], names: Iterable[str]) -> dict[str, Tensor]:
    """Those of the named tensors that ``.safetensors`` files hold; no other is read."""
    wanted = set(names)
    found: dict[str, Tensor] = {}
    for file in files:
        try:
            with safe_open(file, "pt") as opened:
                found |= {name: opened.get_tensor(name) for name in opened.keys() if name in wanted}  # noqa: SIM118
        except UNREADABLE as error:
            raise damaged(file, WHOSE, error) from error
    return found
