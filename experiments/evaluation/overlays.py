"""What is laid over a base model: a run's trained weights, exported networks, LoRA weights."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_modules.errors import ConfigError
from lightning_modules.weights.pretrained import Pretrained

if TYPE_CHECKING:
    from torch import Tensor

    from lightning_modules.policies.base import DiffusionPolicy

# The denoiser's name in the pipeline of each policy of this package.
DENOISERS = {
    "StableDiffusion": "unet",
    "StableDiffusionXL": "unet",
    "StableDiffusionAsFlow": "unet",
    "StableDiffusion3": "transformer",
    "Flux": "transformer",
}
# What two denoisers have in common whose pipelines share text encoders and latents.
_KIND = {
    "unet": ("in_channels", "out_channels", "cross_attention_dim", "addition_embed_type", "block_out_channels"),
    "transformer": ("_class_name", "in_channels", "joint_attention_dim", "num_attention_heads", "num_layers"),
}


class Overlay(ABC):
    """Weights for a policy that has been built from its base model."""

    @abstractmethod
    def places(self) -> list[Path]:
        """Where its weights lie; nothing for the hub."""

    @abstractmethod
    def check(self, base: Mapping[str, Any], config: Mapping[str, Any] | None) -> None:
        """Look whether it fits, without reading weights.

        Args:
            base: the base model's class and arguments.
            config: of its denoiser; None where it is of a class that nothing is known of.

        Raises:
            ConfigError: it does not.
        """

    @abstractmethod
    def apply(self, policy: DiffusionPolicy) -> None:
        """Put the weights in.

        Raises:
            ConfigError: they are missing, damaged, or of another model.
        """


@dataclass(frozen=True)
class Checkpoint(Overlay):
    """The trained weights of a run: their average, where it keeps one, as in the run's own evaluations."""

    file: str

    def places(self) -> list[Path]:
        return [Path(self.file)]

    def check(self, base: Mapping[str, Any], config: Mapping[str, Any] | None) -> None:
        """A checkpoint lies in the folder of the run that says what it belongs to."""

    def apply(self, policy: DiffusionPolicy) -> None:
        import torch

        from callbacks.resume.checkpoint_files import content_of
        from lightning_modules.weights.audit import mismatch

        content = content_of(Path(self.file))
        found = {**content["state_dict"], **content.get("ema", {}).get("weights", {})}
        weights: dict[str, Tensor] = {name.removeprefix("policy."): value for name, value in found.items()}
        trained = {name: value for name, value in policy.named_parameters() if value.requires_grad}
        difference = mismatch(trained, weights)
        if difference is not None:
            raise ConfigError(
                f"checkpoint {self.file}: its weights are not those of its run's settings: {difference}; name the "
                "checkpoint of another run, or an export"
            )
        with torch.no_grad():
            for name, parameter in trained.items():
                parameter.copy_(weights[name])


@dataclass(frozen=True)
class Networks(Overlay):
    """A folder of networks as an export writes it (``unet``, perhaps ``text_encoder``), or one UNet's own folder."""

    place: str

    def places(self) -> list[Path]:
        return [Path(self.place)] if Path(self.place).is_dir() else []

    def check(self, base: Mapping[str, Any], config: Mapping[str, Any] | None) -> None:
        if config is None:
            return
        from diffusers import UNet2DConditionModel  # reads the configuration of any

        component = DENOISERS[base["class_path"].rpartition(".")[2]]
        own = self._source(component).load(UNet2DConditionModel.load_config)
        for key in _KIND[component]:
            one, other = (_plain(found.get(key)) for found in (own, config))
            if one != other:
                raise ConfigError(
                    f"policy {self.place}: its {'UNet' if component == 'unet' else component} has {key} {one} and the "
                    f"base's has {other}; it belongs to another base model, which --base names"
                )

    def apply(self, policy: DiffusionPolicy) -> None:
        networks = {policy.denoiser_name: policy.denoiser, **policy.encoders()}
        for name, network in networks.items():
            if name == policy.denoiser_name or (Path(self.place) / name).is_dir():
                dtype = next(network.parameters()).dtype
                setattr(policy, name, self._source(name).load_model(type(network), dtype).to(policy.device))

    def _source(self, name: str) -> Pretrained:
        place = Pretrained.find(self.place)
        return place.component(name) if (Path(self.place) / name).is_dir() else place


@dataclass(frozen=True)
class Lora(Overlay):
    """LoRA weights of the denoiser, of diffusers' or kohya's kind, of any rank and layers."""

    name: str

    def places(self) -> list[Path]:
        return [Path(self.name)] if Path(self.name).exists() else []

    def check(self, base: Mapping[str, Any], config: Mapping[str, Any] | None) -> None:
        if config is None:
            return
        import torch

        from lightning_modules import policies
        from lightning_modules.policies.lora_files import read_lora_of

        kind = getattr(policies, base["class_path"].rpartition(".")[2])
        with torch.device("meta"):
            network = kind.denoiser_class.from_config(dict(config))
        self._require_fit(read_lora_of(self.name, kind, network.config), dict(network.named_parameters()))

    def apply(self, policy: DiffusionPolicy) -> None:
        from lightning_modules.policies.lora_files import read_lora

        weights, denoiser = read_lora(self.name, policy), policy.denoiser
        self._require_fit(weights, dict(denoiser.named_parameters()))
        denoiser.load_lora_adapter(weights, prefix=None)  # type: ignore[operator]

    def _require_fit(self, weights: Mapping[str, Tensor], network: Mapping[str, Tensor]) -> None:
        for key, value in weights.items():
            layer, _, kind = key.removesuffix(".weight").rpartition(".")
            adapted = network.get(f"{layer}.weight")
            side = 1 if kind == "lora_A" else 0
            if adapted is None or adapted.shape[side] != value.shape[side]:
                shape = "no such layer" if adapted is None else f"{adapted.shape[side]} there"
                raise ConfigError(
                    f"LoRA weights {self.name}: they are of another base model (layer {layer}: {value.shape[side]} "
                    f"channels, {shape}); name theirs with --base"
                )


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, (list, tuple)) else value
