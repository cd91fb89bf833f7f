"""The policy of an experiment's YAML, for commands that need nothing else of it."""

from __future__ import annotations

import multiprocessing
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_modules.errors import ConfigError

if TYPE_CHECKING:  # commands that only read its shards need not wait for torch and diffusers
    from lightning_modules.policies.base import DiffusionPolicy


def device_of_this_process() -> str:
    """Worker processes take the GPUs in turn."""
    import torch

    if not torch.cuda.is_available():
        return "cpu"
    identity = multiprocessing.current_process()._identity
    return f"cuda:{(identity[0] - 1) % torch.cuda.device_count() if identity else 0}"


def policy_settings(path: Path) -> dict[str, Any]:
    """The policy's class and arguments in an experiment's YAML, or in what a run has kept of one.

    Raises:
        ConfigError: it describes no policy.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    from experiments.cli.compose import load

    settings = OmegaConf.create(load(path))
    places = ("model.init_args.policy", "model.policy")
    try:
        nodes = [OmegaConf.select(settings, place) for place in places]
        found = [OmegaConf.to_container(node, resolve=True) for node in nodes if node is not None]
    except OmegaConfBaseException as error:
        raise ConfigError(f"config {path}: {' '.join(str(error).split())}") from error
    if not found or not isinstance(found[0], dict):
        raise ConfigError(f"config {path} describes no policy (looked at {' and '.join(places)})")
    return {str(key): value for key, value in found[0].items()}


def build_policy(settings: dict[str, Any], device: str | None = None) -> DiffusionPolicy:
    """The policy of these settings, on a device; None is this process's.

    Raises:
        ConfigError: settings that it doesn't have; missing weights.
    """
    from experiments.cli.compose import import_named
    from experiments.cli.experiment_cli import OneLineParser
    from lightning_modules.policies.base import DiffusionPolicy

    import_named({"policy": settings}, [])
    parser = OneLineParser(add_help=False)
    parser.add_argument("--policy", type=DiffusionPolicy, required=True)
    policy: DiffusionPolicy = parser.instantiate(parser.parse_object({"policy": settings})).policy
    return policy.eval().to(device or device_of_this_process())


@lru_cache(maxsize=1)
def load_policy(config: str) -> DiffusionPolicy:
    """The policy that an experiment's YAML describes, on this process's device, with its text encoders.

    Raises:
        ConfigError: no such config, or it describes no policy; missing weights.
    """
    from experiments.cli.compose import find_config

    return build_policy(without(policy_settings(find_config(config)), "text_cache"))


def without(settings: dict[str, Any], *names: str) -> dict[str, Any]:
    """A policy's class and arguments less some of the arguments."""
    arguments = settings.get("init_args") or {}
    return {**settings, "init_args": {name: value for name, value in arguments.items() if name not in names}}
