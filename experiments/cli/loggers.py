"""Loggers write into the run folder, whatever their own defaults are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from experiments.cli.tree import MISSING, class_of, find, is_class, put, short

# What each needs for it: settings that nobody gave. ``run_dir`` is settled before the parser reads them.
PLACES: dict[str, dict[str, Any]] = {
    "TensorBoardLogger": {"save_dir": "${run_dir}", "name": "", "version": ""},
    "CSVLogger": {"save_dir": "${run_dir}", "name": "csv"},  # a folder per start: it deletes what it finds in its own
    "WandbLogger": {"save_dir": "${run_dir}", "name": "${run_dir}"},
}


def in_run_folder(tree: dict[str, Any], words: Sequence[str]) -> tuple[str, ...]:
    """Give the loggers that settings name the run folder, unless they have another place.

    Args:
        tree: settings; changed in place.
        words: the command line's, as ``--key=value``.

    Returns:
        The words that are left: a logger that one of them names is in the tree now.
    """
    named = [word for word in words if word.startswith("--trainer.logger=") and short(word.partition("=")[2]) in PLACES]
    if named:
        put(tree, "trainer.logger", {"class_path": named[-1].partition("=")[2]})
    _place(tree)
    return tuple(word for word in words if word not in named)


def _place(tree: dict[str, Any]) -> None:
    node = find(tree, "trainer.logger")
    if node is MISSING or node is None or isinstance(node, bool):
        return
    placed = [_placed(logger) for logger in (node if isinstance(node, list) else [node])]
    put(tree, "trainer.logger", placed if isinstance(node, list) else placed[0])


def _placed(logger: Any) -> Any:
    path = class_of(logger)
    if path is None or short(path) not in PLACES:
        return logger
    settings = logger.get("init_args") or {} if is_class(logger) else {}
    return {"class_path": path, "init_args": {**PLACES[short(path)], **settings}}
