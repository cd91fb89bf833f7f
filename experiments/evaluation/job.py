"""The work of an evaluation, in units that are done once: a batch of pictures is drawn, written, and scored."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from callbacks.evaluation.kept import picture_file, read_kept
from datamodules.shards.json_files import write_json
from experiments.evaluation.policies import PolicySource
from experiments.evaluation.protocols import ProtocolFile, build_rewards
from experiments.evaluation.results import Drawn

if TYPE_CHECKING:
    from callbacks.evaluation.protocol import Protocol
    from lightning_modules.policies.base import DiffusionPolicy
    from lightning_modules.rewards.base import RewardModel

SCORES = "scores"
PICTURES = "pictures"


@dataclass(frozen=True)
class Entry:
    """One policy, as the command line names it.

    Attributes:
        label: the method's name.
        source: what it is.
        baseline: whether it is what the others are compared with.
        place: its folder among the pictures and the scores.
    """

    label: str
    source: PolicySource
    baseline: bool
    place: str


@dataclass(frozen=True)
class Unit:
    """A batch of pictures of one policy at one guidance, ``[first, first + batch_size)`` of the protocol's requests."""

    entry: Entry
    guidance: float
    first: int

    @property
    def place(self) -> str:
        return f"{self.entry.place}/guidance={self.guidance:g}"


@dataclass(frozen=True)
class Job:
    """An evaluation.

    Attributes:
        folder: its output.
        protocol: how is drawn and scored; its resolution is known.
        texts: the prompts.
        entries: baselines first.
    """

    folder: Path
    protocol: ProtocolFile
    texts: tuple[str, ...]
    entries: tuple[Entry, ...]

    def units(self) -> list[Unit]:
        """In the order that loads each policy once."""
        firsts = range(0, self.pictures, self.protocol.batch_size)
        return [Unit(e, scale, first) for e in self.entries for scale in self.protocol.guidance for first in firsts]

    @property
    def pictures(self) -> int:
        """Of one policy at one guidance."""
        return len(self.texts) * self.protocol.pictures_per_prompt

    def size(self, unit: Unit) -> int:
        """Pictures of a unit: the last may have fewer than the others."""
        return min(self.protocol.batch_size, self.pictures - unit.first)

    def files(self, unit: Unit) -> list[Path]:
        """Where a unit's pictures lie."""
        per_prompt = self.protocol.pictures_per_prompt
        numbers = range(unit.first, unit.first + self.size(unit))
        folder = self.folder / PICTURES / unit.place
        return [folder / picture_file(n // per_prompt, n % per_prompt) for n in numbers]

    def scores(self, unit: Unit) -> Path:
        """The file of a unit's scores, written when all else of it is."""
        return self.folder / SCORES / unit.place / f"{unit.first // self.protocol.batch_size:05d}.json"

    def finished(self, unit: Unit) -> dict[str, list[float]] | None:
        """A unit's scores, column by column; None if it is yet to be done. A damaged file is set aside."""

        def fits(value: Any) -> bool:
            return isinstance(value, dict) and bool(value) and all(_numbers(v, self.size(unit)) for v in value.values())

        known: dict[str, list[float]] | None = read_kept(self.scores(unit), fits)
        return known if known is not None and all(file.is_file() for file in self.files(unit)) else None

    def results(self) -> list[Drawn]:
        """What was found, guidance by guidance; all units are finished."""
        from callbacks.evaluation.scores import per_prompt

        found = []
        for scale in self.protocol.guidance:
            for entry in self.entries:
                units = [unit for unit in self.units() if unit.entry == entry and unit.guidance == scale]
                parts = [self.finished(unit) or {} for unit in units]
                columns = {name: [score for part in parts for score in part[name]] for name in parts[0]}
                nested = per_prompt(columns, self.protocol.pictures_per_prompt)
                folder = f"{PICTURES}/{units[0].place}"
                found.append(Drawn(entry.label, entry.source.word, entry.baseline, scale, folder, nested))
        return found


def perform(unit: Unit, job: Job) -> None:
    """Draw what of a unit is not drawn yet, and score what its files hold. Runs in a worker process.

    Raises:
        UserError: weights that cannot be loaded, pictures or scores that are no finite numbers, a judge that fails.
    """
    import torch

    from callbacks.evaluation.pictures import draw, read_pictures, write_pictures
    from callbacks.evaluation.scores import score_rows
    from experiments.cli.configured_policy import device_of_this_process

    protocol = _protocol(job, unit.guidance)
    requests = protocol.requests()[unit.first : unit.first + job.size(unit)]
    texts, files = [request.prompt for request in requests], job.files(unit)
    if not all(file.is_file() for file in files):
        policy = loaded_policy(unit.entry.source, job.protocol.dtype)
        with torch.no_grad():
            images = draw(policy, protocol.sampler, policy.predict_noise, requests, protocol.image_size)
        write_pictures(images, texts, files)
    pictures = read_pictures(files).to(device_of_this_process())
    whose, remedy = f"{unit.entry.label} at guidance {unit.guidance:g}", f"its pictures are in {files[0].parent}"
    rows = score_rows(protocol.rewards, pictures, texts, whose, remedy)
    write_json(job.scores(unit), {name: [row[name] for row in rows] for name in rows[0]})


@lru_cache(maxsize=1)
def loaded_policy(source: PolicySource, dtype: str) -> DiffusionPolicy:
    """This process's policy; one at a time is in memory."""
    return source.load(dtype)


@lru_cache(maxsize=1)
def loaded_rewards(settings: str) -> list[RewardModel]:
    """This process's judges, of their settings as JSON, on its device."""
    from experiments.cli.configured_policy import device_of_this_process

    device = device_of_this_process()
    return [reward.to(device) for reward in build_rewards(json.loads(settings))]


def forget() -> None:
    """Let go of this process's policy and judges, and of their memory."""
    import torch

    loaded_policy.cache_clear()
    loaded_rewards.cache_clear()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def rewards_of(job: Job) -> list[RewardModel]:
    """This process's judges of a job."""
    return loaded_rewards(json.dumps(list(job.protocol.rewards)))


def _protocol(job: Job, guidance: float) -> Protocol:
    from callbacks.evaluation.protocol import Protocol

    own = job.protocol
    rewards = rewards_of(job)
    sampler = replace(own, guidance=(guidance,)).samplers()[guidance]
    size = own.resolution
    return Protocol(job.texts, rewards, sampler, own.pictures_per_prompt, size, own.seed, own.batch_size)


def _numbers(values: Any, number: int) -> bool:
    return isinstance(values, list) and len(values) == number and all(isinstance(v, float) for v in values)


def missing(job: Job) -> Iterator[Unit]:
    """Units that are yet to be done."""
    return (unit for unit in job.units() if job.finished(unit) is None)
