"""Protocols: one file says which pictures are drawn, how, and by whom they are judged."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datamodules.prompt_sets import PUBLISHED, PublishedSet, difference, prompts_hash
from datamodules.prompts import prompt_texts
from experiments.cli.compose import nearest
from experiments.cli.packaged import read_packaged
from lightning_modules.errors import ConfigError

if TYPE_CHECKING:
    from lightning_modules.rewards.base import RewardModel
    from lightning_modules.sampling.pictures import Sampler

VERSION = 1  # of the files' format
OWN_SAMPLER = "DDIM"


@dataclass(frozen=True)
class PromptSet:
    """Which prompts are meant.

    Attributes:
        file: where they are, for sets that ship; None where ``--prompts`` has to say.
        number: how many there are; None: any.
        hash: ``prompts_hash`` of them; None where it is not known.
    """

    file: str | None = None
    number: int | None = None
    hash: str | None = None


@dataclass(frozen=True)
class SamplerSettings:
    """How pictures are made: "DDIM", this framework's own, or a scheduler of diffusers by its class."""

    name: str = OWN_SAMPLER
    steps: int = 20
    eta: float = 0.0


@dataclass(frozen=True)
class ProtocolFile:
    """A protocol as its file has it.

    Attributes:
        name: the file's, without its ending.
        prompts: which are meant.
        sampler: how pictures are made.
        guidance: scales of classifier-free guidance, w of eps_negative + w (eps_cond - eps_negative).
        pictures_per_prompt: of each policy at each guidance.
        resolution: side in pixels; None takes the policies' own, which have to agree.
        seed: of the noise, which is keyed by prompt and picture: all policies start from the same.
        dtype: number type of all networks that draw: "fp32", "bf16" or "fp16".
        batch_size: pictures at a time; the last bits of a score may depend on it, so that it is the protocol's.
        rewards: the judges: class_path and init_args of each, or a function's dotted name.
    """

    name: str
    prompts: PromptSet
    sampler: SamplerSettings
    rewards: tuple[Any, ...]
    guidance: tuple[float, ...] = (5.0,)
    pictures_per_prompt: int = 1
    resolution: int | None = None
    seed: int = 0
    dtype: str = "fp32"
    batch_size: int = 8

    def samplers(self) -> dict[float, Sampler]:
        """One for each guidance.

        Raises:
            ConfigError: settings without meaning.
        """
        from lightning_modules.sampling.pictures import Sampler
        from lightning_modules.sampling.schedulers import SchedulerSampler

        name, steps, eta = self.sampler.name, self.sampler.steps, self.sampler.eta
        if name == OWN_SAMPLER:
            return {scale: Sampler(steps, scale, eta) for scale in self.guidance}
        return {scale: SchedulerSampler(steps, scale, eta, name) for scale in self.guidance}

    def settings(self, texts: Sequence[str]) -> dict[str, Any]:
        """All that decides scores, as plain values; rewards as their file has them, prompts by number and hash."""
        return {
            "name": self.name,
            "version": VERSION,
            "prompts": {"number": len(texts), "hash": prompts_hash(texts)},
            "sampler": {"name": self.sampler.name, "steps": self.sampler.steps, "eta": self.sampler.eta},
            "guidance": list(self.guidance),
            "noise": {"seed": self.seed, "key": ["seed", "win_rate", "prompt", "picture"]},
            "pictures_per_prompt": self.pictures_per_prompt,
            "resolution": self.resolution,
            "dtype": self.dtype,
            "batch_size": self.batch_size,
            "rewards": list(self.rewards),
        }


def read_protocol(name: str) -> ProtocolFile:
    """A protocol by its file, or by its name if it ships.

    Raises:
        ConfigError: no such protocol, or a file that holds something else.
    """
    return _protocol(*read_packaged("protocol", "protocols", name))


def with_prompts(protocol: ProtocolFile, file: str | None, tell: Callable[[str], None]) -> list[str]:
    """The protocol's prompts, out of the user's file or the one that ships.

    Args:
        protocol: says which are meant.
        file: the user's.
        tell: is called with a line where they are not the ones that are meant.

    Raises:
        ConfigError: none was given, and none ships.
        DataError: the file cannot be read or holds no prompts.
    """
    meant = protocol.prompts
    place = file or meant.file
    if place is None:
        raise ConfigError(f"protocol {protocol.name} is of prompts that do not ship; give --prompts FILE")
    texts = prompt_texts(place)
    published = {known.hash: known for known in PUBLISHED.values() if known.hash is not None}
    described = PublishedSet(f"protocol {protocol.name}", meant.number or len(texts), meant.hash)
    differs = difference(texts, described if meant.hash is None else published.get(meant.hash, described))
    if differs is not None:
        tell(f"{place} is not the set that is meant: {differs}")
    return texts


def build_rewards(settings: Sequence[Any]) -> list[RewardModel]:
    """The judges.

    Raises:
        ConfigError: no such class or argument, missing weights, none, or two of one name.
    """
    judges = [_judge(entry) for entry in settings]
    names = [judge.name for judge in judges]
    if not names or len(set(names)) < len(names):
        raise ConfigError(f"a protocol wants one or more rewards with different names, got {names}")
    return judges


def _judge(entry: Any) -> RewardModel:
    from experiments.cli.compose import import_named
    from experiments.cli.experiment_cli import OneLineParser
    from lightning_modules.rewards.base import RewardModel
    from lightning_modules.rewards.function import as_reward_model

    if isinstance(entry, str) and entry.rpartition(".")[2][:1].isupper():
        entry = {"class_path": entry}
    import_named({"reward": entry}, [])
    parser = OneLineParser(add_help=False)
    # Not their union: of that, a reward whose weights are missing would be told as no function.
    parser.add_argument("--reward", type=Callable if isinstance(entry, str) else RewardModel, required=True)
    return as_reward_model(parser.instantiate(parser.parse_object({"reward": entry})).reward)


def _protocol(path: Path, tree: Any) -> ProtocolFile:
    if not isinstance(tree, dict) or tree.get("version") != VERSION:
        found = tree.get("version") if isinstance(tree, dict) else None
        raise ConfigError(f"protocol {path}: wants version: {VERSION} at its top, got {found!r}")
    known = {entry.name: entry for entry in fields(ProtocolFile) if entry.name != "name"}
    for key in tree:
        if key != "version" and key not in known:
            raise ConfigError(f"protocol {path}: {key!r} is no setting{nearest(str(key), known)}")
    for key in ("prompts", "sampler", "rewards"):
        if not tree.get(key):
            raise ConfigError(f"protocol {path}: {key} is missing")
    try:
        values = {key: value for key, value in tree.items() if key != "version"}
        values["prompts"] = PromptSet(**values["prompts"])
        values["sampler"] = SamplerSettings(**values["sampler"])
        values["rewards"] = tuple(_reward(entry) for entry in values["rewards"])
        values["guidance"] = tuple(float(scale) for scale in values.get("guidance", (5.0,)))
        protocol = ProtocolFile(path.stem, **values)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"protocol {path}: a setting of the wrong kind ({' '.join(str(error).split())})") from error
    check(protocol)
    return protocol


def check(protocol: ProtocolFile) -> None:
    """
    Raises:
        ConfigError: settings without meaning.
    """
    whole = (protocol.pictures_per_prompt, protocol.batch_size, protocol.sampler.steps, protocol.resolution or 1)
    if not all(isinstance(number, int) and number >= 1 for number in whole) or protocol.pictures_per_prompt > 100:
        raise ConfigError(
            f"protocol {protocol.name}: steps, batch_size and resolution are whole numbers from 1, "
            "pictures_per_prompt from 1 to 100"
        )
    if protocol.dtype not in ("fp32", "bf16", "fp16"):
        raise ConfigError(f"protocol {protocol.name}: dtype is fp32, bf16 or fp16, got {protocol.dtype!r}")
    if not protocol.guidance or len(set(protocol.guidance)) < len(protocol.guidance):
        raise ConfigError(f"protocol {protocol.name}: guidance wants different numbers, got {list(protocol.guidance)}")
    protocol.samplers()


def _reward(entry: Any) -> Any:
    if isinstance(entry, str) or (isinstance(entry, dict) and isinstance(entry.get("class_path"), str)):
        return entry
    raise TypeError(f"a reward is a class_path with its init_args, or a function's dotted name, got {entry!r}")
