"""Settings written before classes moved to other modules; to go with the release after this one.

YAMLs and the ``config.yaml`` of old runs may name a class by its dotted path. A path of before is read as the present
one, with a warning that names it. ``DPO``'s former ``loss_type`` is read as the objective that it became.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from typing import Any

FORMER_MODULES = frozenset(
    {
        "callbacks.checkpoint_files", "callbacks.checkpointing", "callbacks.evaluation", "callbacks.exact_resume",
        "callbacks.export", "callbacks.generation", "callbacks.pictures", "callbacks.preemption",
        "callbacks.statistics", "datamodules.loading", "datamodules.order", "datamodules.pool_folder",
        "datamodules.shapes", "datamodules.shards", "lightning_modules.autoencoder", "lightning_modules.averaging",
        "lightning_modules.objectives.dpo", "lightning_modules.policies.adaptation", "lightning_modules.pretrained",
        "lightning_modules.rewards", "lightning_modules.rewards.shapes", "lightning_modules.sampling",
        "lightning_modules.schedule", "lightning_modules.sharding", "lightning_modules.step_sampling",
        "lightning_modules.step_scoring",
    }
)  # fmt: skip
_PATH = re.compile(r"\b((?:lightning_modules|datamodules|callbacks)(?:\.\w+)*)\.([A-Z]\w*)\b")
_FORMER_LOSSES = {"Sigmoid": None, "IPO": "tau", "Hinge": "beta"}


def with_present_paths(text: str, known: Mapping[str, str]) -> str:
    """``text`` with every dotted path of before replaced.

    Args:
        text: of a YAML file or of a word on the command line.
        known: module of every class of the framework, by the class's name.
    """

    def present(found: re.Match[str]) -> str:
        module, name = found.groups()
        here = known.get(name)
        if module not in FORMER_MODULES or here is None or here == module or here.startswith(f"{module}."):
            return found.group()
        warnings.warn(f"{module}.{name} is now {here}.{name}; the former path goes with the next release", stacklevel=2)
        return f"{here}.{name}"

    return _PATH.sub(present, text)


def with_present_objectives(node: Any) -> Any:
    """A tree of settings in which ``DPO(beta, loss_type)`` is the objective that its loss type became."""
    if isinstance(node, list):
        return [with_present_objectives(entry) for entry in node]
    if not isinstance(node, dict):
        return node
    init_args = node.get("init_args")
    if str(node.get("class_path", "")).endswith("DPO") and isinstance(init_args, dict) and "loss_type" in init_args:
        return _without_loss_type(node, dict(init_args))
    return {key: with_present_objectives(value) for key, value in node.items()}


def _without_loss_type(node: dict[str, Any], init_args: dict[str, Any]) -> dict[str, Any]:
    loss = init_args.pop("loss_type")
    name = str(loss["class_path"] if isinstance(loss, dict) else loss).rpartition(".")[2]
    parameter = _FORMER_LOSSES.get(name)
    if parameter is None:
        warnings.warn("DPO's loss_type is gone: DPO is the sigmoid loss; remove the setting", stacklevel=2)
        return {**node, "init_args": init_args}
    if "beta" in init_args:
        init_args[parameter] = init_args.pop("beta")
    warnings.warn(f"DPO with loss_type {name} is now the objective {name} with {parameter}", stacklevel=2)
    return {"class_path": name, "init_args": init_args}
