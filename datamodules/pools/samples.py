"""The pairs of a pool as samples of its shards: what a pair is stored as, and how it is read back.

A tensor per pair lies in the sample's tensor file, a number per pair in its JSON, both under the record's own name but
for those in ``STORED_AS``, so that a new field of ``StepPairs`` is stored without a word here. A pair's place in the
run's stream (``indices``) is the reader's affair.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import MISSING, fields
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from datamodules.shards.bad_samples import BadSampleError
from datamodules.shards.reader import ShardSet
from datamodules.shards.samples import Sample, step_members
from datamodules.stream.order import StoredOrder
from lightning_modules.batches import StepPairs
from lightning_modules.errors import DataError
from lightning_modules.sampling.step_sampler import Rollout

STORED_AS = {"prompts": "caption", "timesteps": "timestep", "next_timesteps": "prev_timestep"}


class PoolPairs(Dataset[StepPairs]):
    """Item p is the p-th pair of a pool in training order, as a batch of one.

    Args:
        shards: the pool.
        order: a permutation of its pairs.
        first_sample: the position of item 0 in the run's stream of samples.
    """

    def __init__(self, shards: ShardSet, order: Sequence[int], first_sample: int) -> None:
        self.shards, self.order, self.first_sample = shards, order, first_sample
        self.stored = StoredOrder(shards.sizes)

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, p: int) -> StepPairs:
        return step_pair(self.shards.read(*self.stored[self.order[p]]), self.first_sample + p)


def step_samples(
    rollout: Rollout, first_key: int, transitions: Sequence[int | float], dtype: torch.dtype
) -> Iterator[tuple[int, dict[str, bytes]]]:
    """A chunk's pairs by prompt, then step, so that a pool's order does not depend on the size of its chunks.

    Args:
        rollout: of the chunk's prompts.
        first_key: the number of the chunk's first possible pair in the pool.
        transitions: the timesteps of a trajectory, in order; a prompt has as many possible pairs.
        dtype: what latents are stored in.
    """
    for row in rollout.prompt_rows.argsort(stable=True).tolist():
        place = transitions.index(rollout.pairs.timesteps[row].item())
        key = first_key + int(rollout.prompt_rows[row]) * len(transitions) + place
        tensors, info = _stored(rollout.pairs, row)
        yield key, step_members({name: value.to(dtype) for name, value in tensors.items()}, info)


def _stored(pairs: StepPairs, row: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors: dict[str, Tensor] = {}
    info: dict[str, Any] = {}
    for field in fields(pairs):
        name, values = STORED_AS.get(field.name, field.name), getattr(pairs, field.name)
        if values is None or field.name == "indices":
            continue
        if isinstance(values, Tensor) and values.ndim > 1:
            tensors[name] = values[row]
        else:
            info[name] = values[row].item() if isinstance(values, Tensor) else values[row]
    return tensors, info


def step_pair(sample: Sample, index: int, kind: type[StepPairs] = StepPairs) -> StepPairs:
    """A stored pair as a batch of one; latents in fp32.

    Args:
        sample: of a pool's shard.
        index: the pair's place in the run's stream.
        kind: the record to read.

    Raises:
        DataError: the sample is damaged.
    """
    try:
        info, tensors = sample.info(), sample.tensors("step", latents=3, chosen=3, rejected=3)
        if len({value.shape for value in tensors.values()}) != 1:
            raise sample.bad("its tensors have different shapes")
        if not 0 <= float(info["score_gap"]) <= 1:
            raise sample.bad(f"score_gap must lie in [0, 1], got {str(info['score_gap'])[:80]}")
        return kind(**_read(kind, info, tensors), indices=torch.tensor([index]))
    except BadSampleError as error:
        raise DataError(f"{error.sample}; delete its pool, a run makes it again") from error
    except (KeyError, TypeError, ValueError, OverflowError, RuntimeError) as error:
        reason = sample.bad(f"no intact step ({error})").sample
        raise DataError(f"{reason}; delete its pool, a run makes it again") from error


def _read(kind: type[StepPairs], info: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for field in fields(kind):
        name = STORED_AS.get(field.name, field.name)
        if field.name == "indices" or (field.default is not MISSING and name not in tensors and name not in info):
            continue
        if name in tensors:
            values[field.name] = tensors[name].float()[None]
        elif field.name == "prompts":
            values[field.name] = (info[name],)
        else:
            values[field.name] = torch.tensor([_number(info[name], field.name in ("timesteps", "next_timesteps"))])
    return values


def _number(value: Any, timestep: bool) -> int | float:
    """Timesteps are integers where the schedule's are (a flow's 1000.0 is none), everything else is fp32."""
    return value if timestep and isinstance(value, int) else float(value)
