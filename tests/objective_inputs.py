"""Inputs of objectives: pairs, draws and networks' outputs, as tensors alone."""

import torch

from lightning_modules.batches import Conditioning, LatentPairs
from lightning_modules.objectives.pairwise import NoisedPairs
from lightning_modules.randomness import generator
from lightning_modules.schedules.discrete import NoiseSchedule

SCHEDULE = NoiseSchedule.from_scheduler_config({"beta_schedule": "scaled_linear"})


def pairs(b=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    chosen, rejected = torch.randn(2, b, 4, 2, 2, generator=g)
    ids = torch.arange(12.0 * b).reshape(2, b, 6)
    return LatentPairs(chosen, rejected, ("a",) * b, ids[0], ids[1], torch.arange(b))


def cond(b=3):
    return Conditioning(torch.arange(b * 2.0).reshape(b, 1, 2))


def generators(b=3, seed=0):
    return [generator(seed, i) for i in range(b)]


def loss_of(objective, target, policy, reference, timesteps=None, schedule=SCHEDULE):
    """``objective``'s loss on given network outputs; chosen rows first."""
    n = target.shape[0]
    timesteps = torch.zeros(n, dtype=torch.int64) if timesteps is None else timesteps
    query = NoisedPairs(target, timesteps, Conditioning(torch.zeros(n, 1, 1)), target=target)
    return objective.loss(pairs(n // 2), query, policy, reference, schedule)


def constant(*values):
    """Latents [n 1 1 1] of the given values, so that squared errors against 0 are squares of numbers."""
    return torch.tensor(values).reshape(-1, 1, 1, 1)
