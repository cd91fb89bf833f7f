"""The pictures of an evaluation whose scores the training has changed most, in either direction."""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as pl
import numpy as np
from jaxtyping import Float

from callbacks.evaluation.grid import drawn_row, grid_picture
from callbacks.evaluation.logged_pictures import log_picture
from callbacks.evaluation.protocol import Protocol
from callbacks.evaluation.scores import Scores
from lightning_modules.alignment import AlignmentModule
from lightning_modules.files import atomic_file
from lightning_modules.sampling.eight_bit import png
from lightning_modules.sampling.pictures import Denoise

EACH = 4  # pictures at either end


def draw_largest_changes(
    trainer: pl.Trainer,
    module: AlignmentModule,
    reference: Denoise,
    protocol: Protocol,
    scores: tuple[Scores, Scores],
    step: int,
) -> Path:
    """Draw again, from the same noise, the pictures that gained most and least by the protocol's first reward.

    The policy above the reference, and below them both scores and the prompt; at most ``EACH`` of either, no picture
    twice. Written into the run folder and logged as ``largest_changes``. Which these are is known when all are scored,
    and all are too many to keep. All ranks must call it, within ``evaluation_mode``. Returns the picture's path.

    Args:
        trainer, module: the run's.
        reference: the reference's prediction.
        protocol: how the scored pictures were drawn.
        scores: the reference's and the policy's, of all pictures of the protocol.
        step: optimizer steps that the policy has seen.
    """
    name = protocol.rewards[0].name
    before, after = (np.array(column[name]) for column in scores)
    chosen, headings = largest(after - before)
    requests = [protocol.requests()[i] for i in chosen]
    sampler, size, batch = protocol.sampler, protocol.image_size, protocol.batch_size
    denoisers = {"policy": module.policy.predict_noise, "reference": reference}
    rows = {
        whose: drawn_row(trainer, module, sampler, denoise, requests, batch, size, f"largest changes ({whose})")
        for whose, denoise in denoisers.items()
    }
    path = Path(trainer.default_root_dir) / "samples" / f"test_changes_step={step:07d}.png"
    if trainer.is_global_zero:
        captions = [request.prompt for request in requests]
        notes = [f"{before[i]:.3f} to {after[i]:.3f}" for i in chosen]
        columns = {c: f"{heading} by {name}, of {len(after)} pictures" for c, heading in headings.items()}
        grid = np.asarray(grid_picture(rows, captions, notes, columns))
        with atomic_file(path) as file:
            file.write(png(grid))
        log_picture(trainer, "largest_changes", grid, step)
    return path


def largest(changes: Float[np.ndarray, " n"]) -> tuple[list[int], dict[int, str]]:
    """Indices of the changes to show, the highest first and the lowest last; and what stands above which of them."""
    order = np.argsort(-changes, kind="stable").tolist()
    each = min(EACH, len(order) // 2)
    highest, lowest = changes[order[0]], changes[order[-1]]
    best = "gained most" if highest > 0 else "lost least" if highest < 0 else "unchanged"
    worst = "lost most" if lowest < 0 else "gained least" if lowest > 0 else "unchanged"
    return ([*order[:each], *order[-each:]], {0: best, each: worst}) if each else (order, {0: best})
