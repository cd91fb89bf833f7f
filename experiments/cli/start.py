"""What a command starts from: files and words, or what the run that it resumes or evaluates has kept."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from experiments.cli.compose import CommandLine, packaged_configs, settings
from experiments.cli.help_page import with_named_classes
from experiments.cli.loggers import in_run_folder
from experiments.cli.saved_settings import SavedSettings, saved_files
from experiments.cli.tree import MISSING, find, plain, put, references, remove, switch_class, within
from experiments.cli.words import with_callbacks, with_structures
from lightning_modules.errors import ConfigError
from lightning_modules.files import resolved_path


@dataclass(frozen=True)
class Start:
    """The settings of one start.

    Attributes:
        line: what the user typed.
        run_dir: where the run lives.
        saved: the settings of the run that is resumed or evaluated; None for a new one.
        tree: the settings, but for what ``words`` change; classes that they switch are in place already.
        words: what is left of the command line for the parser.
    """

    line: CommandLine
    run_dir: Path
    saved: SavedSettings | None
    tree: dict[str, Any]
    words: tuple[str, ...]

    @staticmethod
    def of(line: CommandLine) -> Start:
        """Find the run, and put its settings together.

        A run that is resumed or evaluated has its own settings. Configs that are named again are laid over them, but
        for what was given on the command line before, and then the words of this one.

        Raises:
            ConfigError: no settings at all, or files and words that cannot be read.
        """
        given = dict(settings(line.overrides))
        files = line.tree()
        asked = _asked(given, files)
        run_dir = _run_dir(line, given, files, asked)
        saved = _saved(line, run_dir, asked)
        tree = files
        if saved is not None and not line.configs:
            tree = deepcopy(saved.tree)
        elif saved is not None:
            _keep(saved, tree, given)
        words = with_structures(tree, with_callbacks(tree, line.overrides))
        for key, value in settings(words):
            switch_class(tree, key, value)
        words = in_run_folder(tree, words)
        tree["run_dir"] = str(run_dir)
        return Start(line, run_dir, saved, tree, with_named_classes(tree, words))

    @property
    def by_hand(self) -> list[str]:
        """Keys of all settings that were given on the command line, at this start and before."""
        now = [plain(key.removesuffix("+")) for key, _ in settings(self.line.overrides)]
        before = self.saved.by_hand if self.saved else ()
        return [key for key in dict.fromkeys([*before, *now]) if key not in ("run_dir", "ckpt_path", "resume")]

    @cached_property
    def references(self) -> dict[str, str]:
        """Key -> ``${...}`` of the settings that are taken from others."""
        given = {plain(key.removesuffix("+")): value for key, value in settings(self.words)}
        kept = {key: text for key, text in references(self.tree).items() if not _among(key, given)}
        return kept | {key: text for key, text in given.items() if "${" in text and not text.startswith(("{", "["))}


def _asked(given: Mapping[str, str], files: Mapping[str, Any]) -> str | None:
    """The checkpoint that was asked for."""
    if given.get("resume", given.get("ckpt_path")) != given.get("ckpt_path", given.get("resume")):
        raise ConfigError(
            f"--resume {given['resume']} and --ckpt_path {given['ckpt_path']} are two words for one thing; give one"
        )
    asked = given.get("resume", given.get("ckpt_path", files.get("ckpt_path")))
    return None if asked in (None, "null") else str(asked)


def _run_dir(line: CommandLine, given: Mapping[str, str], files: Mapping[str, Any], asked: str | None) -> Path:
    trainer = files.get("trainer") or {}
    own = [Path(name).parent for name in line.configs if Path(name) in saved_files(Path(name).parent)]
    own = [folder for folder in own if (folder / "checkpoints").is_dir()]
    if not own and not line.configs and asked is not None:
        own = [folder for folder in _run_of(asked) if saved_files(folder)]
    places = (given.get("run_dir"), *own[:1], files.get("run_dir"), given.get("trainer.default_root_dir"),
              trainer.get("default_root_dir"))  # fmt: skip
    place = next((place for place in places if place not in (None, "null")), Path("runs") / line.run_name)
    if "${" not in str(place):
        return resolved_path(str(place))
    tree = deepcopy(dict(files))
    for key, value in given.items():
        put(tree, key, value)
    try:
        return resolved_path(str(OmegaConf.create({**tree, "run_dir": str(place)})["run_dir"]))
    except OmegaConfBaseException as error:
        raise ConfigError(f"interpolation in the settings: {' '.join(str(error).split())}") from error


def _run_of(checkpoint: str) -> list[Path]:
    """The run folder that a checkpoint file lies in, if it lies in one."""
    file = resolved_path(checkpoint)
    return [file.parent.parent] if file.parent.name == "checkpoints" else []


def _saved(line: CommandLine, run_dir: Path, asked: str | None) -> SavedSettings | None:
    """The settings of the run that is resumed or evaluated.

    Raises:
        ConfigError: no config is named, and there are no settings that it could do without.
    """
    goes_on = asked not in (None, "none") if line.job == "fit" else asked != "none"
    saved = None
    if goes_on and asked not in (None, "last", "auto"):
        saved = next((found for folder in _run_of(str(asked)) if (found := SavedSettings.latest(folder))), None)
    if saved is None and (any((run_dir / "checkpoints").glob("*.ckpt")) if goes_on else False):
        saved = SavedSettings.latest(run_dir)
    if saved is None and not line.configs and (goes_on or asked == "none"):
        saved = SavedSettings.latest(run_dir)
        if saved is None:
            raise ConfigError(
                f"{run_dir} holds no run's settings (config.yaml); point --run_dir at the run that you mean, or give "
                f"--config NAME; there are {', '.join(packaged_configs())}"
            )
    return saved


def _keep(saved: SavedSettings, tree: dict[str, Any], given: Iterable[str]) -> None:
    """Lay over ``tree`` what was given on the command line before and is not given again."""
    now = {plain(key.removesuffix("+")) for key in given}
    for key in saved.by_hand:
        if _among(key, now):
            continue
        node = find(saved.tree, key)
        if node is MISSING:
            remove(tree, key)
        else:
            put(tree, key, deepcopy(node))


def _among(key: str, others: Iterable[str]) -> bool:
    """Whether one of the others names this node, or one that it lies in."""
    return any(within(key, other) for other in others)
