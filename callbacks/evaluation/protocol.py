"""How pictures are judged: everything that two evaluations must have in common for their scores to be comparable."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from callbacks.evaluation.pictures import PictureRequest
from datamodules.prompt_sets import prompts_hash
from lightning_modules.errors import ConfigError
from lightning_modules.policies.base import DiffusionPolicy
from lightning_modules.rewards.base import RewardModel
from lightning_modules.sampling.pictures import Sampler


@dataclass(frozen=True)
class Protocol:
    """Which pictures are drawn, how, and by whom they are judged.

    Attributes:
        prompts: texts.
        rewards: the judges, at least one, each of another name.
        sampler: how the pictures are made.
        images_per_prompt: pictures per prompt.
        image_size: side in pixels; None takes the policy's own.
        seed: seed of the noise, which is keyed by prompt and picture.
        batch_size: pictures at a time on one device; it changes no score.

    Raises:
        ConfigError: no reward, or two of one name.
    """

    prompts: Sequence[str]
    rewards: Sequence[RewardModel]
    sampler: Sampler
    images_per_prompt: int
    image_size: int | None
    seed: int
    batch_size: int

    def __post_init__(self) -> None:
        names = [reward.name for reward in self.rewards]
        if not names or len(set(names)) < len(names):
            raise ConfigError(f"WinRate wants one or more rewards with different names, got {names}")

    def requests(self) -> list[PictureRequest]:
        """The pictures, prompt by prompt."""
        pictures = range(self.images_per_prompt)
        return [
            PictureRequest(text, (self.seed, "win_rate", p, i)) for p, text in enumerate(self.prompts) for i in pictures
        ]

    def described(self, policy: DiffusionPolicy) -> dict[str, Any]:
        """The protocol as plain values, as ``win_rate.json`` keeps it and ``experiments.compare`` holds runs to it."""
        return {
            "prompts": prompts_hash(self.prompts),
            "number_of_prompts": len(self.prompts),
            "images_per_prompt": self.images_per_prompt,
            "image_size": self.image_size or policy.image_size,
            "seed": self.seed,
            "sampler": asdict(self.sampler),
            "rewards": [reward.name for reward in self.rewards],
        }
