"""Pairs of denoising steps as a pool stores and gives them back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

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


def step_pair(sample: Sample, index: int) -> StepPairs:
    """A stored pair as a batch of one, in fp32.

    Raises:
        DataError: the sample is damaged.
    """
    try:
        info, latents = sample.info(), sample.tensors("step", latents=3, chosen=3, rejected=3)
        if len({value.shape for value in latents.values()}) != 1:
            raise sample.bad("its tensors have different shapes")
        if not 0 <= float(info["score_gap"]) <= 1:
            raise sample.bad(f"score_gap must lie in [0, 1], got {str(info['score_gap'])[:80]}")
        apart = latents["rejected_latents"].float()[None] if "rejected_latents" in latents else None
        return StepPairs(
            latents=latents["latents"].float()[None],
            chosen=latents["chosen"].float()[None],
            rejected=latents["rejected"].float()[None],
            timesteps=torch.tensor([int(info["timestep"])]),
            prev_timesteps=torch.tensor([int(info["prev_timestep"])]),
            prompts=(info["caption"],),
            score_gap=torch.tensor([float(info["score_gap"])]),
            indices=torch.tensor([index]),
            rejected_latents=apart,
        )
    except BadSampleError as error:
        raise DataError(f"{error.sample}; delete its pool, a run makes it anew") from error
    except (KeyError, TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise DataError(
            f"{sample.bad(f'no whole step ({error})').sample}; delete its pool, a run makes it anew"
        ) from error


def collate_steps(parts: Sequence[StepPairs]) -> StepPairs:
    """One batch from batches of one pool.

    Raises:
        DataError: they are not alike.
    """
    forms = {(part.latents.shape, part.rejected_latents is None) for part in parts}
    if len(forms) > 1:
        raise DataError("a pool's pairs have different shapes; it was put together of several, delete it")

    def stacked(name: str) -> Tensor:
        return torch.cat([getattr(part, name) for part in parts])

    return StepPairs(
        latents=stacked("latents"),
        chosen=stacked("chosen"),
        rejected=stacked("rejected"),
        timesteps=stacked("timesteps"),
        prev_timesteps=stacked("prev_timesteps"),
        prompts=tuple(prompt for part in parts for prompt in part.prompts),
        score_gap=stacked("score_gap"),
        indices=stacked("indices"),
        rejected_latents=None if parts[0].rejected_latents is None else stacked("rejected_latents"),
    )


def step_samples(
    rollout: Rollout, first_key: int, transitions: Sequence[int], dtype: torch.dtype
) -> Iterator[tuple[int, dict[str, bytes]]]:
    """The chunk's pairs by prompt, then step, so that a pool's order does not depend on the size of its chunks."""
    pairs = rollout.pairs
    tensors = {"latents": pairs.latents, "chosen": pairs.chosen, "rejected": pairs.rejected}
    if pairs.rejected_latents is not None:
        tensors["rejected_latents"] = pairs.rejected_latents
    for row in rollout.prompt_rows.argsort(stable=True).tolist():
        timestep = int(pairs.timesteps[row])
        key = first_key + int(rollout.prompt_rows[row]) * len(transitions) + transitions.index(timestep)
        info = {
            "caption": pairs.prompts[row],
            "timestep": timestep,
            "prev_timestep": int(pairs.prev_timesteps[row]),
            "score_gap": float(pairs.score_gap[row]),
        }
        yield key, step_members({name: value[row].to(dtype) for name, value in tensors.items()}, info)
