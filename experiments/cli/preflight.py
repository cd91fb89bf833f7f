"""What can be known to go wrong before anything is loaded or fetched: all of it in one list."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.constants import HF_HUB_CACHE, HF_HUB_OFFLINE
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError
from huggingface_hub.file_download import repo_folder_name
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy

from datamodules.prompts import prompt_texts
from datamodules.shards.download import is_remote
from datamodules.shards.locate import expand
from datamodules.shards.manifest import MANIFEST
from experiments.cli.compose import known_classes
from experiments.cli.run_captions import prompts_of
from experiments.cli.tree import MISSING, class_of, find, is_class, short
from lightning_modules.errors import ConfigError, UserError
from lightning_modules.files import resolved_path
from lightning_modules.weights.pretrained import Pretrained
from lightning_modules.weights.sharding import FullyShardedStrategy

PACKAGES = ("lightning_modules", "datamodules", "callbacks")
HUB_SECONDS = 10.0
# What is imported only when such a class is made.
PACKAGE_OF = {
    "WandbLogger": "wandb", "MLFlowLogger": "mlflow", "CometLogger": "comet_ml", "NeptuneLogger": "neptune",
    "AdamW8bit": "bitsandbytes", "NF4": "bitsandbytes", "TorchAo": "torchao",
}  # fmt: skip

DATA_MODULES = ("PreferencePairsDataModule", "SinglePicturesDataModule", "StepPoolDataModule")


def check(settings: Mapping[str, Any], job: str) -> None:
    """
    Args:
        settings: the resolved settings of a command, as a tree.
        job: fit, validate, test or predict.

    Raises:
        ConfigError: what is missing and what contradicts itself, in one list.
    """
    found = list(dict.fromkeys(problems(settings, job)))
    if len(found) == 1:
        raise ConfigError(found[0])
    if found:
        lines = "".join(f"\n  - {problem}" for problem in found)
        raise ConfigError(f"{len(found)} things must be put right first:{lines}")


def problems(settings: Mapping[str, Any], job: str) -> Iterator[str]:
    """One line each, in the order of the settings."""
    trains = job in ("fit", "validate")
    yield from _strategy(find(settings, "trainer.strategy"))
    for key, path, arguments in _classes(settings):
        if key == "data" and not trains:
            continue  # test and predict read none
        yield from _missing_package(key, path)
        if not path.startswith(PACKAGES):
            continue
        for name, value in arguments.items():
            if name in CHECKS and value is not None:
                yield from CHECKS[name](f"{key}.{name}", value, arguments)
    if job == "predict":
        prompts = find(settings, "pictures.prompts")
        if prompts in (MISSING, None):
            yield "predict draws pictures and has no prompts; give --pictures.prompts=FILE"
        else:
            yield from _prompts("pictures.prompts", prompts, {})
    yield from _text_cache(settings)
    if job == "fit":
        yield from contradictions(settings)


def _strategy(strategy: Any) -> Iterator[str]:
    """One under which this framework has not been made to work."""
    if is_class(strategy):
        kind, name = _imported(strategy["class_path"]), short(strategy["class_path"])
        known = kind is None or issubclass(kind, DDPStrategy | SingleDeviceStrategy | FullyShardedStrategy)
    else:
        name = str(strategy)
        known = strategy is MISSING or name in ("auto", "fsdp2") or name.startswith("ddp")
    if not known:
        yield (
            f"trainer.strategy {name} is not supported: pools, pictures, exports and checkpoints take whole weights; "
            "use ddp, or fsdp2 (ModelParallelStrategy, set up for them) where a process has no room for all weights, "
            "gradients and moments"
        )


def _text_cache(settings: Mapping[str, Any]) -> Iterator[str]:
    """A cache that was not filled, or lacks prompts; captions of shards are too many to be looked for."""
    name = find(settings, "model.policy.text_cache")
    if not isinstance(name, str):
        return
    command = f"python -m experiments.encode_prompts --config CONFIG --output {name}"
    if not resolved_path(name).is_dir():
        yield f"model.policy.text_cache: {name} does not exist; fill it first ({command})"
        return
    from lightning_modules.policies.text_cache import cached_captions  # torch, which few lists of problems need

    try:
        there = cached_captions(resolved_path(name))
        missing = [prompt for prompt in prompts_of(settings) if prompt not in there]
    except UserError as error:
        yield f"model.policy.text_cache: {error}"
        return
    if missing:
        yield (
            f"model.policy.text_cache: {name} lacks {len(missing)} of the prompts that the settings name, such as "
            f"{missing[0][:80]!r}; add them ({command})"
        )


def contradictions(settings: Mapping[str, Any]) -> Iterator[str]:
    """Settings that cannot both be meant, or mean nothing."""
    accumulated = find(settings, "trainer.accumulate_grad_batches")
    if type(accumulated) is int and accumulated < 1:
        yield f"trainer.accumulate_grad_batches must be at least 1, got {accumulated}"
    steps, length = find(settings, "trainer.max_steps"), find(settings, "model.lr_scheduler.total_steps")
    if type(length) is int and type(steps) is int and length < steps:
        yield (
            f"model.lr_scheduler reaches 0 at step {length}, and trainer.max_steps is {steps}: the steps between would "
            f"change nothing; give --model.lr_scheduler.total_steps={steps}, or fewer steps"
        )
    objective, reference = (class_of(find(settings, f"model.{name}")) for name in ("objective", "reference"))
    if objective is not None and _class(objective) is not None:
        needs = getattr(_class(objective), "needs_reference", False)
        if needs and reference is None and find(settings, "model.reference") is None:
            yield (
                f"model.objective {short(objective)} compares with a reference, and model.reference is null; give "
                "--model.reference=FrozenCopy, or AdapterOff with LoRA"
            )
    adaptation = class_of(find(settings, "model.policy.adaptation"))
    if short(reference or "") == "AdapterOff" and adaptation is not None and short(adaptation) == "FullFineTuning":
        yield "model.reference AdapterOff switches adapters off, and FullFineTuning has none; use FrozenCopy, or LoRA"
    yield from _quantisation_contradictions(settings)
    if short(class_of(find(settings, "data")) or "") == "StepPoolDataModule":
        yield from _pool_contradictions(settings)


def _quantisation_contradictions(settings: Mapping[str, Any]) -> Iterator[str]:
    """What does not go with a frozen base whose weights are rounded."""
    kind = class_of(find(settings, "model.policy.quantisation"))
    if kind is None:
        return
    told = f"model.policy.quantisation {short(kind)} rounds the base's weights"
    if short(class_of(find(settings, "model.policy.adaptation")) or "") == "FullFineTuning":
        yield f"{told}, and model.policy.adaptation FullFineTuning trains them; use LoRA, or leave quantisation out"
    if short(class_of(find(settings, "model.reference")) or "") == "FrozenCopy":
        yield f"{told} to save memory, which model.reference FrozenCopy takes again for a copy; use AdapterOff"
    strategy = find(settings, "trainer.strategy")
    if strategy == "fsdp2" or issubclass(_imported(class_of(strategy) or "") or object, FullyShardedStrategy):
        yield f"{told}, and trainer.strategy fsdp2 cannot share them out; use ddp, or leave quantisation out"


def _pool_contradictions(settings: Mapping[str, Any]) -> Iterator[str]:
    if find(settings, "trainer.reload_dataloaders_every_n_epochs") != 1:
        yield "an epoch is a pool: set trainer.reload_dataloaders_every_n_epochs to 1"
    for name in ("eta", "guidance_scale"):
        wanted, given = find(settings, f"model.objective.{name}"), find(settings, f"data.sampler.{name}")
        if MISSING not in (wanted, given) and wanted != given:
            yield (
                f"data.sampler has {name} {given}, model.objective has {wanted}: the log-probabilities would be of "
                "steps that nobody took; set both to the same"
            )


def check_kind_of_pairs(tree: Mapping[str, Any]) -> None:
    """Whether the data are what the objective trains on, by their classes alone: interpolations may need the answer.

    Raises:
        ConfigError: pairs of pictures for an objective of denoising steps, or the reverse.
    """
    data, objective = class_of(find(tree, "data")), class_of(find(tree, "model.objective"))
    kind = _class(objective) if objective is not None else None
    if data is None or kind is None:
        return
    single = bool(getattr(kind, "single_pictures", False))
    if single != (short(data) == "SinglePicturesDataModule") and (single or short(data) in DATA_MODULES):
        raise ConfigError(
            f"data {short(data)} is for {'pairs' if single else 'single pictures, liked or not'}, and model.objective "
            f"{short(objective or '')} trains on {'single pictures, liked or not' if single else 'pairs'}; "
            f"{'give SinglePicturesDataModule, as kto_tiny does' if single else 'use KTO, or a config of pairs'}"
        )
    steps = {"eta", "guidance_scale"} <= set(inspect.signature(kind).parameters)
    if short(data) == "StepPoolDataModule" and not steps:
        raise ConfigError(
            f"data StepPoolDataModule is for pairs of denoising steps, and model.objective {short(objective or '')} "
            "trains on pairs of pictures; use SPO, or a config with PreferencePairsDataModule such as dpo_tiny"
        )
    if short(data) == "PreferencePairsDataModule" and steps:
        raise ConfigError(
            f"data PreferencePairsDataModule is for pairs of pictures, and model.objective {short(objective or '')} "
            "trains on pairs of denoising steps; use DPO, or a config with StepPoolDataModule such as spo_tiny"
        )


def _class(path: str) -> type | None:
    """A class that the settings name, if its module is imported already or lies in our packages."""
    module = path.rpartition(".")[0] or known_classes().get(path, "")
    return _imported(f"{module}.{short(path)}") if module.startswith(PACKAGES) else None


def _imported(path: str) -> type | None:
    module, _, name = path.rpartition(".")
    found = getattr(importlib.import_module(module), name, None) if module else None
    return found if inspect.isclass(found) else None


def _classes(node: Any, key: str = "") -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """Key, path and arguments of every class in a tree."""
    if is_class(node):
        path = node["class_path"]
        known = "" if "." in path else known_classes().get(path, "")
        yield key, f"{known}.{path}".lstrip("."), node.get("init_args") or {}
    fields = node.get("init_args") or {} if is_class(node) else node
    if isinstance(fields, list):
        fields = {short(entry["class_path"]) if is_class(entry) else i: entry for i, entry in enumerate(fields)}
    if isinstance(fields, Mapping):
        for name, value in fields.items():
            yield from _classes(value, f"{key}.{name}" if key else str(name))


def _missing_package(key: str, path: str) -> Iterator[str]:
    package = PACKAGE_OF.get(short(path), path.split(".")[0])
    if "." in path and importlib.util.find_spec(package) is None:
        yield f"{key} {short(path)} needs the package {package}, which is not installed: pip install {package}"


def _prompts(key: str, value: Any, arguments: Mapping[str, Any]) -> Iterator[str]:
    try:
        prompt_texts(value)
    except UserError as error:
        yield f"{key}: {error}"


def _shards(key: str, value: Any, arguments: Mapping[str, Any]) -> Iterator[str]:
    for name in [value] if isinstance(value, str) else value:
        try:
            locations = expand(name)
        except UserError as error:
            yield f"{key}: {error}"
            continue
        for location in locations:
            if is_remote(location):
                if arguments.get("cache_dir") is None and not location.startswith("pipe:"):
                    yield f"{key}: {location} is remote; give data.cache_dir, a folder with room for all shards"
                continue
            path = resolved_path(location)
            if not path.exists():
                what = "pictures" if key.endswith("liked") else "pairs"
                command = f"python -m experiments.prepare_{what}"
                yield f"{key}: {location} does not exist; prepare the {what} first ({command})"
            elif path.is_dir() and not (path / MANIFEST).exists():
                yield f"{key}: {location} has no {MANIFEST}: its preparation has not finished; run it again"


def _pools(key: str, value: Any, arguments: Mapping[str, Any]) -> Iterator[str]:
    for folder in value:
        if not resolved_path(folder).is_dir():
            yield f"{key}: pool {folder} does not exist; give the folder of a kept pool (data.keep_pools)"


def _weights(key: str, value: Any, arguments: Mapping[str, Any]) -> Iterator[str]:
    if not isinstance(value, str) or resolved_path(value).is_file():
        return
    try:
        place = Pretrained.find(value)
    except UserError as error:
        yield f"{key}: {error}"
        return
    if not place.local:
        reason = _not_on_the_hub(place.location)
        if reason is not None:
            yield f"{key}: {value} {reason}"


def _not_on_the_hub(repository: str) -> str | None:
    """Why a repository cannot be had, or None: it is in the cache already, or the hub has it."""
    if (Path(HF_HUB_CACHE) / repo_folder_name(repo_id=repository, repo_type="model")).is_dir():
        return None
    if HF_HUB_OFFLINE or os.environ.get("HF_HUB_OFFLINE", "0") not in ("0", ""):
        return "is no folder here and not in the hub's cache, and HF_HUB_OFFLINE forbids to fetch it"
    try:
        HfApi().model_info(repository, timeout=HUB_SECONDS)
    except GatedRepoError:
        return "is a gated repository; accept its terms on the hub and log in (hf auth login)"
    except RepositoryNotFoundError:
        return "is no folder here and no repository on the hub that can be read; check the name, or log in"
    except (HfHubHTTPError, OSError) as error:
        return f"is no folder here, and the hub does not answer ({type(error).__name__}); check the network"
    return None


CHECKS: dict[str, Callable[[str, Any, Mapping[str, Any]], Iterator[str]]] = {
    "prompts": _prompts, "test_prompts": _prompts, "shards": _shards, "val_shards": _shards, "liked": _shards,
    "unliked": _shards, "reuse": _pools,
    "pretrained": _weights, "unet": _weights, "vae": _weights, "processor": _weights, "checkpoint": _weights,
    "tokenizer": _weights,
}  # fmt: skip
