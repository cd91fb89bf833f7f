"""The settings of every start of a run, kept in its folder, and what may differ from one start to the next.

``config.yaml`` is what the first start resolved to, ``config-0002.yaml`` the second, and so on; none is overwritten.
Beside the settings each holds, under ``start``, what a later one needs to know: which of them were given on the command
line (at any start, so that a config named again does not undo them), and which are taken from others, ``${...}``, and
go with them when they change.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from experiments.cli.compose import load, start_of_file
from experiments.cli.tree import short, within
from lightning_modules.files import atomic_file

_NAME = re.compile(r"config(?:-(\d{4,}))?\.yaml")
# What may differ when a run is resumed: where and how fast it trains, how long, and what is watched, judged and kept.
MAY_CHANGE = (
    "trainer.accelerator", "trainer.benchmark", "trainer.callbacks", "trainer.check_val_every_n_epoch",
    "trainer.default_root_dir", "trainer.devices", "trainer.enable_autolog_hparams", "trainer.enable_checkpointing",
    "trainer.enable_model_summary", "trainer.enable_progress_bar", "trainer.limit_predict_batches",
    "trainer.limit_test_batches", "trainer.limit_val_batches", "trainer.log_every_n_steps", "trainer.logger",
    "trainer.max_epochs", "trainer.max_steps", "trainer.max_time", "trainer.min_epochs", "trainer.min_steps",
    "trainer.num_nodes", "trainer.num_sanity_val_steps", "trainer.profiler", "trainer.strategy",
    "trainer.val_check_interval",
    "data.cache_dir", "data.download_attempts", "data.fill", "data.keep_pools", "data.num_workers",
    "data.stall_seconds", "data.val_shards",
    "allow_changes", "ckpt_path", "pictures", "run_dir",
)  # fmt: skip
STEP = ("data.batch_size", "data.pairs_per_step", "trainer.accumulate_grad_batches")


@dataclass(frozen=True)
class SavedSettings:
    """What a run's last start was made with.

    Attributes:
        file: where they are kept.
        tree: the settings; those that are taken from others stand there as ``${...}``.
        by_hand: keys of those that were given on the command line, at that start or before.
        pairs_per_step: how many pairs its optimizer steps took, over all devices; None where that is not known.
    """

    file: Path
    tree: dict[str, Any]
    by_hand: tuple[str, ...]
    pairs_per_step: int | None

    @staticmethod
    def latest(folder: Path) -> SavedSettings | None:
        """Those of a run folder's last start, None if it has none.

        Raises:
            ConfigError: the file cannot be read.
        """
        files = saved_files(folder)
        if not files:
            return None
        start = start_of_file(files[-1])
        by_hand, pairs = start.get("by_hand") or [], start.get("pairs_per_step")
        return SavedSettings(files[-1], load(files[-1]), tuple(map(str, by_hand)), pairs)

    def holds(self, change: Change) -> bool:
        """Whether a change would make another experiment of it, as far as settings alone can tell."""
        # Batches and accumulation are the machine's affair while a step takes as many pairs, see ``step_size``.
        step = STEP if self.pairs_per_step is not None else ()
        return not any(within(change.key, key) for key in (*MAY_CHANGE, *step))


def saved_files(folder: Path) -> list[Path]:
    """The settings that a run folder keeps, in the order of its starts."""
    found = {}
    for file in folder.glob("config*.yaml"):
        name = _NAME.fullmatch(file.name)
        if name:
            found[int(name.group(1) or 1)] = file
    return [found[number] for number in sorted(found)]


def save_settings(folder: Path, text: str, **start: Any) -> Path:
    """Keep the settings of one more start, and return where.

    Args:
        folder: the run's.
        text: the resolved settings as YAML.
        start: ``by_hand`` and ``pairs_per_step`` as in ``SavedSettings``; ``references``, key -> ``${...}`` of the
            settings that are taken from others.

    Raises:
        DataError: the disk does not take it.
    """
    files = saved_files(folder)
    last = _NAME.fullmatch(files[-1].name) if files else None
    file = folder / ("config.yaml" if last is None else f"config-{int(last.group(1) or 1) + 1:04d}.yaml")
    with atomic_file(file) as stream:
        stream.write((text.rstrip("\n") + "\n" + yaml.safe_dump({"start": start}, sort_keys=False)).encode())
    return file


@dataclass(frozen=True)
class Change:
    """A setting that differs from the run's own."""

    key: str
    old: Any
    new: Any

    def __str__(self) -> str:
        old, new = (short(value) if isinstance(value, str) else value for value in (self.old, self.new))
        return f"{self.key}: {old} -> {new}"


def changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Change]:
    """What differs between two flat sets of settings; of a class that is another, the class alone."""
    absent = "not there"
    found: list[Change] = []
    for key in dict.fromkeys([*old, *new]):
        one, two = old.get(key, absent), new.get(key, absent)
        if one != two and not any(within(key, change.key) for change in found):
            found.append(Change(key, one, two))
    return found
