"""The policy of an experiment's YAML, for commands that need nothing else of it."""

from __future__ import annotations

import multiprocessing
from functools import lru_cache
from typing import TYPE_CHECKING

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


@lru_cache(maxsize=1)
def load_policy(config: str) -> DiffusionPolicy:
    """The policy that an experiment's YAML describes, on this process's device.

    Raises:
        ConfigError: no such config, or it describes no policy; missing weights.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    from experiments.cli.compose import find_config, import_named, load
    from experiments.cli.experiment_cli import OneLineParser
    from lightning_modules.policies.base import DiffusionPolicy

    path = find_config(config)
    tree = load(path)
    import_named(tree, [])
    settings = OmegaConf.create(tree)
    places = ("model.init_args.policy", "model.policy")
    try:
        nodes = [OmegaConf.select(settings, place) for place in places]
        found = [OmegaConf.to_container(node, resolve=True) for node in nodes if node is not None]
    except OmegaConfBaseException as error:
        raise ConfigError(f"config {path}: {' '.join(str(error).split())}") from error
    if not found:
        raise ConfigError(f"config {path} describes no policy (looked at {' and '.join(places)})")
    parser = OneLineParser(add_help=False)
    parser.add_subclass_arguments(DiffusionPolicy, "policy")
    policy: DiffusionPolicy = parser.instantiate(parser.parse_object({"policy": found[0]})).policy
    return policy.eval().to(device_of_this_process())
