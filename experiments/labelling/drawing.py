"""Fresh pairs: two pictures per prompt by an experiment's policy, drawn as they come to be shown."""

from __future__ import annotations

import re
import threading
from collections.abc import Sequence
from pathlib import Path

from jsonargparse import Namespace
from torch import Tensor

from datamodules.pools.fingerprint import fingerprint
from datamodules.shards.json_files import read_json, write_json
from experiments.cli.configured_policy import load_policy
from experiments.cli.experiment_cli import OneLineParser
from experiments.labelling.pairs import PicturePair
from experiments.labelling.supply import PairSource, Stopped
from lightning_modules.batches import DenoiserQuery
from lightning_modules.errors import ConfigError
from lightning_modules.files import atomic_file
from lightning_modules.policies.base import DiffusionPolicy
from lightning_modules.randomness import derive_seed
from lightning_modules.sampling.eight_bit import eight_bit, png
from lightning_modules.sampling.pictures import Sampler, initial_noise

FOLDER = "pictures"
SLUG = 40  # characters of the prompt in a file's name


class DrawnPairs(PairSource):
    """Pair n is of prompt ``n % len(prompts)``; its pictures depend on the seed and n alone.

    Pictures are PNG files named by number and prompt, each complete or absent, so that the same command again resumes.

    Args:
        policy: draws.
        sampler: how.
        prompts: texts.
        per_prompt: pairs per prompt.
        seed: of the noise.
        record_folder: pictures go to its folder ``pictures``.
    """

    makes = "drawn"

    def __init__(
        self,
        policy: DiffusionPolicy,
        sampler: Sampler,
        prompts: Sequence[str],
        per_prompt: int,
        seed: int,
        record_folder: Path,
    ) -> None:
        self._policy, self._sampler, self._prompts, self._seed = policy, sampler, prompts, seed
        self._record_folder = record_folder
        self.total = len(prompts) * per_prompt

    def ready(self, number: int) -> bool:
        return all(path.exists() for path in self._files(number))

    def pair(self, number: int, stop: threading.Event) -> PicturePair:
        prompt = self._prompts[number % len(self._prompts)]
        files = self._files(number)
        if not self.ready(number):
            for path, picture in zip(files, self._draw(prompt, number, stop)):
                path.parent.mkdir(parents=True, exist_ok=True)
                with atomic_file(path) as file:
                    file.write(picture)
        return PicturePair.of(*files, prompt, self._record_folder)

    def _files(self, number: int) -> tuple[Path, Path]:
        slug = re.sub(r"[^a-z0-9]+", "-", self._prompts[number % len(self._prompts)].lower())[:SLUG].strip("-")
        stem = f"{number:06d}_{slug}" if slug else f"{number:06d}"
        folder = self._record_folder / FOLDER
        return folder / f"{stem}_0.png", folder / f"{stem}_1.png"

    def _draw(self, prompt: str, number: int, stop: threading.Event) -> list[bytes]:
        def denoise(query: DenoiserQuery) -> Tensor:
            if stop.is_set():
                raise Stopped
            return self._policy.predict_noise(query)

        noise, generators = initial_noise(self._policy, [(self._seed, "label", number, i) for i in (0, 1)])
        images = self._sampler.generate(self._policy, denoise, [prompt, prompt], noise, generators)
        return [png(picture) for picture in eight_bit(images, [prompt, prompt])]


def drawn_pairs(
    config: str, prompts: Sequence[str], per_prompt: int, seed: int, record_folder: Path, words: Sequence[str]
) -> DrawnPairs:
    """Load the policy and check that a folder which was begun is of the same job.

    Args:
        config: experiment whose policy draws, as for ``run``.
        words: the command line's ``--sampler.*``.

    Raises:
        ConfigError: no such config or setting, or the folder was begun with others.
    """
    parser = OneLineParser(prog="python -m experiments.label")
    parser.add_class_arguments(Sampler, "sampler")
    settings: Namespace = parser.instantiate(parser.parse_args(list(words)))
    policy = load_policy(config)
    job = {"seed": seed, "prompts": derive_seed(*prompts), "sampler": repr(settings.sampler),
           "policy": fingerprint(policy)}  # fmt: skip
    place = record_folder / "job.json"
    if place.exists():
        before = read_json(place)
        differ = [name for name in job if before.get(name) != job[name]]
        if differ:
            raise ConfigError(f"{record_folder} was begun with another {differ[0]} ({place}); name another --output")
    elif (record_folder / FOLDER).exists():
        raise ConfigError(f"{record_folder} holds pictures of something else; name another --output")
    else:
        record_folder.mkdir(parents=True, exist_ok=True)
        write_json(place, job)
    return DrawnPairs(policy, settings.sampler, prompts, per_prompt, seed, record_folder)
