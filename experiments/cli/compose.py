"""From YAML names to one tree of settings: finding, merging and switching classes, before any heavy import.

The tree is what ``LightningCLI`` reads: a class is ``{class_path: Name, init_args: {...}}``. Two rules differ from
jsonargparse's own merging, both so that a run is what its command line says:

* A node that changes its class loses **all** of the former class's arguments. jsonargparse keeps those whose names
  the new class knows too, and DPO would silently run with another objective's beta.
* Settings on the command line always win over files, wherever they stand.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, reduce
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from experiments.cli.former_paths import with_present_objectives, with_present_paths
from experiments.cli.tree import MISSING, find, merge, put, remove
from lightning_modules.errors import ConfigError

JOBS = ("fit", "validate", "test", "predict")
MAX_NODES = 100_000  # of a config; aliases in a YAML file can stand for any number
FLAGS = ("--allow_changes", "--help", "--help_all")  # options that take no value
PACKAGES = ("lightning_modules", "datamodules", "callbacks")


@dataclass(frozen=True)
class CommandLine:
    """What the user typed: the job, the files, and everything else in its order."""

    job: str
    configs: tuple[str, ...]
    overrides: tuple[str, ...]

    @staticmethod
    def split(argv: Sequence[str]) -> CommandLine:
        """Take the optional first word and every ``--config NAME``, ``--config=NAME`` and ``-c NAME`` out of argv.

        ``--key value`` is ``--key=value`` for everything that comes after.

        Raises:
            ConfigError: a first word that is no job, or ``--config`` without a name.
        """
        words = list(argv)
        job = "fit"
        if words and not words[0].startswith("-"):
            job = words.pop(0)
            if job not in JOBS:
                raise ConfigError(_no_job(job))
        configs, overrides = [], []
        rest = iter(words)
        for word in rest:
            if word in ("--config", "-c"):
                name = next(rest, None)
                if name is None:
                    raise ConfigError(f"{word} wants a name; there are {', '.join(packaged_configs())}")
                configs.append(name)
            elif word.startswith("--config="):
                configs.append(word.removeprefix("--config="))
            else:
                overrides.append(word)
        named = (with_present_paths(word, known_classes()) for word in _joined(overrides))
        return CommandLine(job, tuple(configs), tuple(named))

    @property
    def run_name(self) -> str:
        """The names of the configs without folder and ending, joined by "+"."""
        return "+".join(Path(name).stem for name in self.configs) or "unnamed"

    def tree(self) -> dict[str, Any]:
        """The files merged in their order."""
        tree: dict[str, Any] = {}
        for name in self.configs:
            for layer in layers(find_config(name)):
                tree = merge(tree, layer)
        return tree


def _joined(words: Sequence[str]) -> Iterator[str]:
    """Every ``--key value`` as ``--key=value``; what fits neither form is left for the parser to refuse."""
    rest = list(words)
    while rest:
        word = rest.pop(0)
        takes_next = word.startswith("--") and "=" not in word and word not in FLAGS
        yield f"{word}={rest.pop(0)}" if takes_next and rest and not rest[0].startswith("--") else word


def _no_job(word: str) -> str:
    names = {name: name.removesuffix(".yaml") for name in packaged_configs()}
    close = difflib.get_close_matches(word, [*JOBS, *names, *names.values()], n=1)
    if Path(word).is_file() or (close and close[0] not in JOBS):
        name = word if Path(word).is_file() else names.get(close[0], close[0])
        return f"{word!r} is no job ({', '.join(JOBS)}); if you mean the config, write --config {name}"
    return f"job {word!r} is unknown{nearest(word, JOBS)}; choose one of {', '.join(JOBS)}"


def no_config(overrides: Sequence[str]) -> str:
    """What to say where no config is named: most often it is, after a word that is no option."""
    for key, value in settings(overrides):
        if "." not in key and nearest(key, ["config"]):
            return f"setting {key!r} does not exist (did you mean --config {value}?)"
    return f"--config NAME is missing; there are {', '.join(packaged_configs())}, or give a path"


def nearest(word: str, choices: Iterable[str]) -> str:
    """``" (did you mean X?)"``, or nothing if no choice resembles the word."""
    close = difflib.get_close_matches(word, list(choices), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def packaged_configs() -> list[str]:
    """Names of the YAML files that ship with the package."""
    folder = resources.files("experiments") / "configs"
    return sorted(entry.name for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def overlays() -> list[str]:
    """Names of the YAML files that ship to be laid over others."""
    folder = resources.files("experiments") / "configs" / "overlays"
    return sorted(entry.name for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def find_config(name: str) -> Path:
    """A path, or the name of a packaged config or overlay with or without ``.yaml``.

    Raises:
        ConfigError: neither; lists what there is.
    """
    packaged = Path(str(resources.files("experiments"))) / "configs"
    folders = (packaged, packaged / "overlays")
    for candidate in (Path(name), *(folder / file for folder in folders for file in (name, f"{name}.yaml"))):
        if candidate.is_file():
            return candidate
    have = packaged_configs()
    known = [*have, *overlays()]
    close = nearest(name, [*known, *(entry.removesuffix(".yaml") for entry in known)])
    raise ConfigError(f"config {name!r} is no file and no packaged config{close}; there are {', '.join(have)}")


def load(path: Path) -> dict[str, Any]:
    """One YAML file as a tree, over the configs that it names as its ``base``; see ``layers``."""
    return reduce(merge, layers(path))


def layers(path: Path, above: tuple[Path, ...] = ()) -> list[dict[str, Any]]:
    """The trees of the configs that a YAML file names as its ``base``, and its own, which is laid over them.

    ``${...}`` are left as they are. What a run has kept of a start (``saved_settings``) is as it was composed: what was
    taken from elsewhere is so again, and where that run lived is left out. One by one over what lies below, not merged
    with each other before: only there an overlay's changes find the class or the list that they change.

    Args:
        path: the file.
        above: the files whose base it is.

    Raises:
        ConfigError: no YAML, no mapping at its top, or a base that is none.
    """
    tree = _read(path)
    base = tree.pop("base", None) or []
    start = tree.pop("start", None)
    if start is not None or (path.parent / "checkpoints").is_dir():
        for key in ("run_dir", "ckpt_path", "trainer.default_root_dir"):
            remove(tree, key)
    for key, text in _mapping(_mapping(start).get("references")).items():
        if find(tree, key) is not MISSING:
            put(tree, key, text)
    found: list[dict[str, Any]] = []
    for name in [base] if isinstance(base, str) else base:
        below = _base(str(name), path)
        if below in (path, *above):
            raise ConfigError(f"config {path}: its base {name} has it as a base again")
        found += layers(below, (path, *above))
    return [*found, tree]


def _base(name: str, path: Path) -> Path:
    """A config that a file names: seen from its folder, else as on the command line."""
    beside = (path.parent / name, path.parent / f"{name}.yaml")
    return next((file for file in beside if file.is_file()), None) or find_config(name)


def start_of_file(path: Path) -> dict[str, Any]:
    """What a run has kept about a start beside its settings; empty for any other file."""
    return _mapping(_read(path).get("start"))


def _mapping(node: Any) -> dict[str, Any]:
    return node if isinstance(node, dict) else {}


def _read(path: Path) -> dict[str, Any]:
    try:
        text = with_present_paths(path.read_text(encoding="utf-8"), known_classes())
        if _nodes(yaml.compose(text, yaml.SafeLoader), {}) > MAX_NODES:
            raise ConfigError(
                f"config {path}: its aliases stand for more than {MAX_NODES} values; write out what it sets"
            )
        tree = OmegaConf.to_container(OmegaConf.create(text), resolve=False)
    except (YAMLError, OmegaConfBaseException, ValueError, OSError) as error:
        raise ConfigError(f"config {path}: cannot be read as YAML ({' '.join(str(error).split())})") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"config {path}: wants settings such as 'model: ...' at its top, got a {type(tree).__name__}")
    return {str(key): with_present_objectives(value) for key, value in tree.items()}


def _nodes(node: yaml.Node | None, known: dict[int, int | float]) -> int | float:
    """How many values a YAML node stands for, with its aliases written out; infinitely many where it holds itself."""
    if not isinstance(node, yaml.CollectionNode):
        return 1
    if id(node) not in known:
        known[id(node)] = float("inf")
        held = [part for entry in node.value for part in (entry if isinstance(entry, tuple) else (entry,))]
        known[id(node)] = 1 + sum(_nodes(part, known) for part in held)
    return known[id(node)]


def settings(overrides: Sequence[str]) -> Iterator[tuple[str, str]]:
    """``(key, value)`` of every ``--key=value``."""
    for word in overrides:
        key, sign, value = word.partition("=")
        if key.startswith("--") and sign:
            yield key[2:], value


@cache
def known_classes() -> dict[str, str]:
    """Name of every class of the framework -> its module, read from the sources without importing them."""
    found = {}
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        for folder in (spec.submodule_search_locations or []) if spec else []:
            for file in sorted(Path(folder).rglob("*.py")):
                module = ".".join([package, *file.relative_to(folder).with_suffix("").parts]).removesuffix(".__init__")
                for name in re.findall(r"^class (\w+)", file.read_text(encoding="utf-8"), re.MULTILINE):
                    found[name] = module
    return found


def import_named(tree: dict[str, Any], overrides: Sequence[str]) -> None:
    """Import the modules of the classes that the settings name, so that their short names are known.

    Only those: diffusers, transformers and peft take seconds, and a typo should not wait for them.
    """
    known = known_classes()
    words = re.findall(r"\b[A-Z]\w*", OmegaConf.to_yaml(OmegaConf.create(tree)) + " " + " ".join(overrides))
    for module in sorted({known[word] for word in words if word in known}):
        importlib.import_module(module)


def import_all() -> None:
    """Import the modules of all classes that settings can name, for help that lists them."""
    for module in sorted(set(known_classes().values())):
        if not module.startswith("experiments."):
            importlib.import_module(module)
