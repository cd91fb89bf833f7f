"""What a policy's word of the command line stands for, found out before any weights are read."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from callbacks.export_policy import exports
from callbacks.resume.checkpoint_files import damage_reason
from experiments.cli.configured_policy import build_policy, policy_settings
from experiments.cli.run_folder import choose_checkpoint
from experiments.cli.saved_settings import SavedSettings
from experiments.evaluation.overlays import DENOISERS, Checkpoint, Lora, Networks, Overlay
from lightning_modules.errors import ConfigError
from lightning_modules.files import packaged
from lightning_modules.weights.pretrained import DTYPES, Pretrained
from lightning_modules.weights.state_dicts import read_keys

if TYPE_CHECKING:
    from lightning_modules.policies.base import DiffusionPolicy

WANTED = "give a run's folder or checkpoint, a diffusers pipeline, a folder with a unet or transformer, or LoRA weights"
_LORA = "pytorch_lora_weights.safetensors"
_PACKAGE = "lightning_modules.policies"


@dataclass(frozen=True)
class PolicySource:
    """A base model, and what is laid over it.

    Attributes:
        word: as the user wrote it.
        base: the base model's class and arguments, as JSON.
        overlay: a run's checkpoint, exported networks or LoRA weights; None for the base model itself.
    """

    word: str
    base: str
    overlay: Overlay | None = None

    def check(self) -> None:
        """Read configurations and headers, no weights.

        Raises:
            ConfigError: files that are missing, or an overlay of another kind of base model.
        """
        settings = json.loads(self.base)
        config = denoiser_config(settings)
        if self.overlay is not None:
            self.overlay.check(settings, config)

    def identity(self) -> dict[str, Any]:
        """What tells this policy from another: names of everything, sizes and samples of local files."""
        settings = json.loads(self.base)
        names = [settings["init_args"].get(name) for name in ("pretrained", "unet", "transformer", "vae", "denoiser")]
        places = [packaged(name) for name in names if name is not None]
        files = [file for place in places for file in _weights(place)]
        files += [] if self.overlay is None else [file for place in self.overlay.places() for file in _weights(place)]
        return {"base": settings, "files": [_stamp(file) for file in files]}

    def notes(self) -> list[str]:
        """In what it is drawn otherwise than it was trained; one line each."""
        held = json.loads(self.base)["init_args"].get("quantisation")
        if held is None:
            return []
        kind = held["class_path"].rsplit(".", 1)[-1]
        return [
            f"policy {self.word}: trained beside a base quantised by {kind}, and drawn on the base as it is published"
        ]

    def load(self, dtype: str) -> DiffusionPolicy:
        """The policy on this process's device, in eval mode, frozen, its denoiser in ``dtype``: "fp32", "bf16", "fp16".

        A base that was quantised for training is loaded as it is published, and prompts are encoded, not looked up.

        Raises:
            ConfigError: missing or damaged weights; an overlay that does not fit.
        """
        settings = json.loads(self.base)
        if settings["class_path"].startswith("lightning_modules."):
            settings["init_args"] |= {"frozen_dtype": dtype, "quantisation": None, "text_cache": None}
        policy = build_policy(settings)
        if self.overlay is not None:
            self.overlay.apply(policy)
        policy.requires_grad_(False).eval()
        for parameter in policy.denoiser.parameters():  # what a run trains is fp32
            parameter.data = parameter.data.to(DTYPES[dtype])
        return policy


def find_policy(word: str, base: str | None) -> PolicySource:
    """What a word stands for.

    Args:
        word: a run's folder, one of its checkpoints or exports; a folder or hub id of a diffusers pipeline; a folder or
            hub id of a UNet; a file, folder or hub id of LoRA weights; a single ``.safetensors`` file.
        base: the word of the base model that a UNet, LoRA weights or a single file need and that nothing beside them
            records.

    Raises:
        ConfigError: it stands for nothing, or for something that needs a base.
    """
    path = packaged(word)
    if path.is_dir():
        return _of_folder(word, path, base)
    if path.suffix == ".ckpt" and path.parent.name == "checkpoints":
        reason = damage_reason(path) if path.is_file() else "does not exist"
        if reason is not None:
            raise ConfigError(f"policy {word}: the checkpoint {reason}; {WANTED}")
        return PolicySource(word, _recorded(word, path.parent.parent), Checkpoint(str(path)))
    if path.is_file():
        return _of_file(word, path, base)
    hub = re.fullmatch(r"[\w.-]+/[\w.-]+(?P<below>/[\w./-]+)?", word)
    if hub is None or word.startswith("."):
        raise ConfigError(f"policy {word}: no folder or file below {Path.cwd()} and no hub id; {WANTED}")
    if path.suffix == ".safetensors":
        return PolicySource(word, _base(word, base), Lora(word))
    if hub["below"]:
        return PolicySource(word, _base(word, base), Networks(word))
    return PolicySource(word, pipeline_settings(word))


def _of_folder(word: str, path: Path, base: str | None) -> PolicySource:
    if SavedSettings.latest(path) is not None:
        return _of_run(word, path)
    if (path / "model_index.json").is_file():
        return PolicySource(word, pipeline_settings(word))
    if (path / _LORA).is_file():
        return PolicySource(word, _base(word, base, path), Lora(str(path)))
    if any((path / name / "config.json").is_file() for name in ("unet", "transformer")):
        return PolicySource(word, _base(word, base, path), Networks(str(path)))
    if (path / "config.json").is_file() and list(path.glob("diffusion_pytorch_model*")):
        return PolicySource(word, _base(word, base, path.parent), Networks(str(path)))
    if len(list(path.glob("*.safetensors"))) == 1:
        return _of_file(word, next(path.glob("*.safetensors")), base)
    raise ConfigError(f"policy {word}: the folder holds no unet, no LoRA weights and no run; {WANTED}")


def _of_run(word: str, folder: Path) -> PolicySource:
    """Its newest checkpoint; its newest export where the checkpoints are gone."""
    base, written = _recorded(word, folder), exports(folder / "export")
    if not list((folder / "checkpoints").glob("*.ckpt")) and written:
        return _of_folder(word, written[-1], str(folder))
    checkpoint = choose_checkpoint("test", folder / "checkpoints", None)
    assert checkpoint is not None, "a test without a checkpoint is refused"
    return PolicySource(word, base, Checkpoint(str(checkpoint)))


def _of_file(word: str, path: Path, base: str | None) -> PolicySource:
    if path.suffix != ".safetensors":
        raise ConfigError(f"policy {word}: a {path.suffix or 'plain'} file may hold anything; {WANTED}")
    if any("lora" in key for key in read_keys(path, "policy")):
        return PolicySource(word, _base(word, base, path.parent), Lora(str(path)))
    settings = json.loads(_base(word, base))
    layout = settings["init_args"]["pretrained"]
    settings["init_args"] |= {"pretrained": str(path), "layout": settings["init_args"].get("layout") or layout}
    return PolicySource(word, json.dumps(settings))


def _base(word: str, base: str | None, place: Path | None = None) -> str:
    """The base model's settings: of ``--base``, else of the run that ``place`` is an export of."""
    if base is None and place is not None:
        for export in (place.parent, place.parent.parent):  # kohya's file lies a folder deeper
            recorded = SavedSettings.latest(export.parent) if export.name == "export" else None
            if recorded is not None:
                return _frozen(policy_settings(recorded.file))
    if base is None:
        raise ConfigError(
            f"policy {word}: it is a part of a model, and nothing beside it tells which; give the model as --base"
        )
    found = packaged(base)
    saved = SavedSettings.latest(found) if found.is_dir() else None
    return pipeline_settings(base) if saved is None else _frozen(policy_settings(saved.file))


def _recorded(word: str, folder: Path) -> str:
    saved = SavedSettings.latest(folder)
    if saved is None:
        raise ConfigError(f"policy {word}: {folder} holds no config.yaml of a run; {WANTED}")
    return json.dumps(policy_settings(saved.file))


def _frozen(settings: dict[str, Any]) -> str:
    """A run's policy as it was before any training."""
    arguments = {**settings["init_args"], "adaptation": {"class_path": f"{_PACKAGE}.adaptation.Frozen"}}
    return json.dumps({**settings, "init_args": arguments})


def pipeline_settings(name: str) -> str:
    """Settings of the policy of a diffusers pipeline, whose kind its denoiser tells.

    Raises:
        ConfigError: no such place, or one without a UNet or transformer that there is a policy for.
    """
    from diffusers import UNet2DConditionModel

    place = Pretrained.find(name)
    component = "transformer" if _has_transformer(place) else "unet"
    config = place.component(component).load(UNet2DConditionModel.load_config)
    kind = "sdxl.StableDiffusionXL" if config.get("addition_embed_type") else "stable_diffusion.StableDiffusion"
    if component == "transformer":
        found = config.get("_class_name")
        known = {"SD3Transformer2DModel": "sd3.StableDiffusion3", "FluxTransformer2DModel": "flux.Flux"}
        if found not in known:
            raise ConfigError(
                f"policy {name}: there is none for a {found}; give a pipeline of Stable Diffusion, SDXL, SD3 or FLUX.1"
            )
        kind = known[found]
    return _frozen({"class_path": f"{_PACKAGE}.{kind}", "init_args": {"pretrained": str(name)}})


def _has_transformer(place: Pretrained) -> bool:
    if place.local:
        return (Path(place.location) / place.subfolder / "transformer").is_dir()
    from diffusers import DiffusionPipeline

    return "transformer" in place.load(DiffusionPipeline.load_config)


def denoiser_config(settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """The configuration of the base model's denoiser; None for classes that are not of this package.

    Raises:
        ConfigError: it cannot be read.
    """
    from diffusers import UNet2DConditionModel

    arguments = settings["init_args"]
    component = DENOISERS.get(settings["class_path"].rpartition(".")[2])
    if component is None:
        return None
    pipeline = Pretrained.find(arguments["pretrained"], arguments.get("revision"), arguments.get("layout"))
    own = arguments.get(component)
    source = pipeline.component(component) if own is None else Pretrained.find(own)
    config = Pretrained.load(source, UNet2DConditionModel.load_config)
    return dict(config)


def own_size(source: PolicySource) -> int | None:
    """Side of the pictures that a policy makes by itself, by its configurations; None where they don't tell."""
    from diffusers import AutoencoderKL

    settings = json.loads(source.base)
    asked = settings["init_args"].get("image_size")
    if asked is not None:
        return int(asked)
    config = denoiser_config(settings)
    if config is None or not isinstance(config.get("sample_size"), int):
        return None
    arguments = settings["init_args"]
    pipeline = Pretrained.find(arguments["pretrained"], arguments.get("revision"), arguments.get("layout"))
    own = arguments.get("vae")
    place = pipeline.component("vae") if own is None else Pretrained.find(own)
    vae = place.load(AutoencoderKL.load_config)
    return int(config["sample_size"]) * 2 ** (len(vae["block_out_channels"]) - 1)


def _weights(place: Path) -> list[Path]:
    """The files that decide what a place holds; none for a hub id."""
    if place.is_file():
        return [place]
    kinds = ("*.json", "*.safetensors", "*.bin", "*/*.json", "*/*.safetensors", "*/*.bin")
    return sorted(file for kind in kinds for file in place.glob(kind)) if place.is_dir() else []


def _stamp(file: Path) -> list[Any]:
    """Name, size and a hash of both ends, where formats of weights keep names, sizes and checksums."""
    ends = 1 << 16
    with file.open("rb") as opened:
        content = opened.read(ends)
        opened.seek(max(0, file.stat().st_size - ends))
        content += opened.read(ends)
    return [file.name, file.stat().st_size, hashlib.blake2b(content, digest_size=8).hexdigest()]
