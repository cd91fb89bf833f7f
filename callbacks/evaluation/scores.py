"""Every reward's scores of every picture of a protocol; the reference's are made once and kept."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from jaxtyping import Float
from torch import Tensor

from callbacks.evaluation.kept import read_kept
from callbacks.evaluation.pictures import gathered, make_pictures, my_share
from callbacks.evaluation.protocol import Protocol
from lightning_modules.alignment import AlignmentModule
from lightning_modules.errors import UserError
from lightning_modules.files import atomic_file
from lightning_modules.rewards.base import RewardModel
from lightning_modules.sampling.pictures import Denoise, Sampler

# Column -> one number per picture. Columns are the rewards' names, and "<reward>/<part>" for their parts.
Scores = dict[str, list[float]]


def score_pictures(
    trainer: pl.Trainer, module: AlignmentModule, protocol: Protocol, denoise: Denoise, whose: str
) -> Scores:
    """Draw and judge all pictures, in the order of ``protocol.requests()``. All ranks must call it and get all scores.

    Args:
        trainer, module: the run's.
        protocol: which pictures, and who judges.
        denoise: the policy's or the reference's prediction.
        whose: name of what is drawn with, for the progress bar and for errors.

    Raises:
        UserError: a score that is not finite.
    """
    mine: list[dict[str, float]] = []
    for batch in my_share(trainer, protocol.requests(), protocol.batch_size, f"win rate ({whose})"):
        images = make_pictures(trainer, module, protocol.sampler, denoise, batch, protocol.image_size)
        prompts = [request.prompt for request in batch]
        remedy = "the training has probably diverged: lower the learning rate"
        mine += score_rows(protocol.rewards, images, prompts, f"the {whose}", remedy)
    rows = gathered(trainer, mine)
    return {name: [row[name] for row in rows] for name in rows[0]}


def score_rows(
    rewards: Sequence[RewardModel],
    images: Float[Tensor, "n 3 H W"],
    prompts: Sequence[str],
    whose: str,
    remedy: str,
    parts: bool = True,
) -> list[dict[str, float]]:
    """``score_columns``, picture by picture.

    Raises:
        UserError: a score that is not finite; ``whose`` says who drew the picture, ``remedy`` what may help.
    """
    columns = score_columns(rewards, images, prompts, parts)
    for name, values in columns.items():
        for value, prompt in zip(values, prompts, strict=True):
            if not math.isfinite(value):
                raise UserError(f"reward {name} is {value} for a picture of {whose} ({prompt!r}); {remedy}")
    return [{name: values[i] for name, values in columns.items()} for i in range(len(prompts))]


def score_columns(
    rewards: Sequence[RewardModel], images: Float[Tensor, "n 3 H W"], prompts: Sequence[str], parts: bool = True
) -> Scores:
    """Every reward's scores, and its parts' where they are wanted, of n pictures in [0, 1]."""
    columns: Scores = {}
    for reward in rewards:
        columns[reward.name] = reward.score(images, prompts).tolist()
        for part, values in reward.parts(images, prompts).items() if parts else ():
            columns[f"{reward.name}/{part}"] = values.tolist()
    return columns


def per_prompt(scores: Scores, pictures: int) -> dict[str, list[list[float]]]:
    """Scores in the order of ``Protocol.requests``, ``pictures`` of each prompt, as [prompt][picture]."""
    return {
        name: [values[start : start + pictures] for start in range(0, len(values), pictures)]
        for name, values in scores.items()
    }


def reference_scores(trainer: pl.Trainer, module: AlignmentModule, protocol: Protocol) -> Scores | None:
    """The reference's scores; None without a reference. Read back where the same evaluation was made before.

    All ranks must call it. The reference never changes, so that they are kept in the run folder.
    """
    if module.reference is None:
        return None
    denoise = module.reference.predict_noise
    fingerprint = trainer.strategy.broadcast(_fingerprint(trainer, module, protocol, denoise))
    path = Path(trainer.default_root_dir) / "win_rate_reference" / f"{fingerprint}.json"
    # Rank 0 decides for all: another node may not see the file yet.
    kept = read_kept(path, partial(_are_scores, number=len(protocol.requests()))) if trainer.is_global_zero else None
    known: Scores | None = trainer.strategy.broadcast(kept)
    if known is None:
        known = score_pictures(trainer, module, protocol, denoise, "reference")
        if trainer.is_global_zero:
            with atomic_file(path) as file:
                file.write(json.dumps(known).encode())
    return known


def _fingerprint(trainer: pl.Trainer, module: AlignmentModule, protocol: Protocol, denoise: Denoise) -> str:
    """A hash of the protocol and of what reference and rewards do on one cheap picture.

    What they do, instead of their weights: it covers denoiser, text encoder, autoencoder, precision and every
    reward alike, whatever they are made of, in one denoiser pass. At worst it differs where nothing has changed.
    """
    requests = protocol.requests()
    probe = Sampler(steps=1, guidance_scale=protocol.sampler.guidance_scale, eta=0.0)
    image = make_pictures(trainer, module, probe, denoise, requests[:1], protocol.image_size)
    columns = score_columns(protocol.rewards, image, [requests[0].prompt])
    digest = hashlib.sha256(repr([protocol.sampler, protocol.image_size, requests, columns]).encode())
    digest.update(image.float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def _are_scores(value: Any, number: int) -> bool:
    """Whether a value has ``number`` scores in each of its columns."""
    return isinstance(value, dict) and all(
        isinstance(column, list) and len(column) == number and all(isinstance(score, float) for score in column)
        for column in value.values()
    )
