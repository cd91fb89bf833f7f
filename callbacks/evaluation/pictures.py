"""How pictures are drawn, in a run and outside of one; and what callbacks that draw them share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import lightning.pytorch as pl
import numpy as np
import torch
from jaxtyping import Float, UInt8
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.seed import isolate_rng
from PIL import Image
from torch import Tensor

from callbacks.clock import EVALUATION
from callbacks.resume.preemption import preemption
from lightning_modules.alignment import AlignmentModule
from lightning_modules.errors import ConfigError, DataError
from lightning_modules.files import atomic_file
from lightning_modules.policies.base import DiffusionPolicy
from lightning_modules.progress import Work
from lightning_modules.sampling.eight_bit import eight_bit, png
from lightning_modules.sampling.pictures import Denoise, Sampler, initial_noise
from lightning_modules.weights.sharding import gathered_weights

T = TypeVar("T")


@dataclass(frozen=True)
class PictureRequest:
    """One picture to make: its prompt, and the key of all its random draws."""

    prompt: str
    key: tuple[int | str, ...]


def draw(
    policy: DiffusionPolicy,
    sampler: Sampler,
    denoise: Denoise,
    requests: Sequence[PictureRequest],
    image_size: int | None = None,
) -> Float[Tensor, "n 3 H W"]:
    """One batch of pictures in [0, 1], by a policy that is in eval mode.

    Args:
        policy: encodes prompts and decodes latents.
        sampler: how.
        denoise: the policy's prediction, or that of what it is compared with.
        requests: which pictures.
        image_size: side in pixels; None takes the policy's own.
    """
    noise, generators = initial_noise(policy, [request.key for request in requests], image_size)
    return sampler.generate(policy, denoise, [request.prompt for request in requests], noise, generators)


def write_pictures(images: Float[Tensor, "n 3 H W"], prompts: Sequence[str], files: Sequence[Path]) -> None:
    """Write each picture as PNG, complete or not at all; see ``eight_bit``. Encoded in threads."""
    with ThreadPoolExecutor() as threads:
        list(threads.map(_write, eight_bit(images, prompts), files))


def _write(pixels: UInt8[np.ndarray, "H W 3"], file: Path) -> None:
    with atomic_file(file) as stream:
        stream.write(png(pixels))


def read_pictures(files: Sequence[Path]) -> Float[Tensor, "n 3 H W"]:
    """What ``write_pictures`` wrote, in [0, 1]: exactly what a file holds, so that its scores can be made again.

    Decoded in threads.

    Raises:
        DataError: a file that is damaged, or of another size than the others.
    """
    with ThreadPoolExecutor() as threads:
        pictures = list(threads.map(_read, files))
    if len({picture.shape for picture in pictures}) > 1:
        raise DataError(f"pictures in {files[0].parent} have different sizes; delete them, and they are drawn again")
    return torch.stack(pictures).float() / 255


def _read(file: Path) -> UInt8[Tensor, "3 H W"]:
    try:
        with Image.open(file) as opened:
            return torch.from_numpy(np.array(opened.convert("RGB"))).permute(2, 0, 1)
    except (OSError, SyntaxError, ValueError) as error:
        raise DataError(f"picture {file} is damaged ({error}); delete it, and it is drawn again") from error


def alignment(module: pl.LightningModule, who: str) -> AlignmentModule:
    """The module, if it has a policy to draw with.

    Raises:
        ConfigError: it is another kind of module; ``who`` is the callback that the message names.
    """
    if not isinstance(module, AlignmentModule):
        kind = type(module).__name__
        raise ConfigError(f"{who} draws with an AlignmentModule's policy and the model is a {kind}; remove it")
    return module


@contextmanager
def evaluation_mode(module: AlignmentModule) -> Iterator[None]:
    """Evaluate within training: no gradient, no dropout, and afterwards modes and global generators as before.

    The weights are their average, where the module keeps one. All ranks must enter it. Within it each has whole
    weights, to draw as many pictures as fall to it.
    """
    modes = [(part, part.training) for part in module.modules()]
    # Inference mode, which Lightning validates in, would poison tensors that a policy caches and later trains with.
    with (
        EVALUATION.running(),
        torch.inference_mode(False),
        torch.no_grad(),
        isolate_rng(),
        gathered_weights(*module.denoisers()),
        module.averaged(),
    ):
        module.eval()
        try:
            yield
        finally:
            for part, training in modes:
                part.training = training


def make_pictures(
    trainer: pl.Trainer,
    module: AlignmentModule,
    sampler: Sampler,
    denoise: Denoise,
    requests: Sequence[PictureRequest],
    image_size: int | None = None,
) -> Float[Tensor, "n 3 H W"]:
    """``draw`` with a run's policy, in the run's precision. Call it within ``evaluation_mode``."""
    with trainer.precision_plugin.forward_context():
        return draw(module.policy, sampler, denoise, requests, image_size)


def my_share(trainer: pl.Trainer, items: Sequence[T], batch_size: int, title: str) -> Iterator[Sequence[T]]:
    """This rank's items (every world-th) in batches, with a progress bar on rank 0.

    Within ``fit`` all ranks agree before every batch whether a signal has come, also those that have none left; use it
    within ``interruptible``.
    """
    mine = items[trainer.global_rank :: trainer.world_size]
    most = len(items[:: trainer.world_size])  # rank 0's
    leaving = preemption(trainer)
    shown = trainer.is_global_zero and trainer.progress_bar_callback is not None
    with Work(title, len(mine), shown) as work:
        for start in range(0, most, batch_size):
            if leaving is not None:
                leaving.give_up_if_asked(
                    trainer, f"{title} after {start * trainer.world_size} of {len(items)} pictures"
                )
            batch = mine[start : start + batch_size]
            if batch:
                yield batch
                work.advance(len(batch))


def gathered(trainer: pl.Trainer, mine: list[T]) -> list[T]:
    """All ranks' results in the order of the items that ``my_share`` assigned, on every rank. Call it on every rank."""
    if trainer.world_size == 1:
        return mine
    parts: list[list[T]] = [[] for _ in range(trainer.world_size)]
    torch.distributed.all_gather_object(parts, mine)
    total = sum(len(part) for part in parts)
    return [parts[i % trainer.world_size][i // trainer.world_size] for i in range(total)]


def policy_step(trainer: pl.Trainer) -> int:
    """Optimizer steps that the policy has seen; outside of fit that of the checkpoint under evaluation, or 0."""
    if trainer.state.fn == TrainerFn.FITTING:
        return trainer.global_step
    if trainer.ckpt_path is None:
        return 0
    checkpoint: dict[str, Any] = torch.load(trainer.ckpt_path, map_location="cpu", weights_only=True, mmap=True)
    return int(checkpoint["global_step"])
