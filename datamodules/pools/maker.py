"""Makes pools: the ranks share out chunks of prompts, and each samples its own and writes them."""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal
from uuid import uuid4

import torch
from lightning.pytorch.strategies import Strategy

from datamodules.pools.fingerprint import digest, fingerprint, schedule_fingerprint
from datamodules.pools.folder import SHARE, PoolFolder
from lightning_modules.errors import ConfigError, DataError, UserError
from lightning_modules.policies.base import DiffusionPolicy
from lightning_modules.policies.tiny_decoder import TinyDecoder
from lightning_modules.progress import Work
from lightning_modules.randomness import generator
from lightning_modules.sampling.step_sampler import Rollout, SeededDraws, StepSampler
from lightning_modules.sampling.step_scorers import StepScorer
from lightning_modules.weights.sharding import gathered_weights

LatentsDtype = Literal["float32", "float16"]


@dataclass(frozen=True)
class PoolRecipe:
    """The settings that every pool of a run is made with.

    Attributes:
        sampler: How pairs are made.
        prompts: The texts.
        prompts_per_pool: Number of prompts that each pool takes; None takes all of them every time.
        prompts_per_batch: Number of prompts that are sampled at once, which is a chunk.
        seed: Seed of prompts and candidates.
        latents_dtype: Type of the stored latents.

    Raises:
        ConfigError: settings that make no sense.
    """

    sampler: StepSampler
    prompts: Sequence[str]
    prompts_per_pool: int | None
    prompts_per_batch: int
    seed: int
    latents_dtype: LatentsDtype

    def __post_init__(self) -> None:
        if self.prompts_per_batch < 1:
            raise ConfigError(f"data.prompts_per_batch must be at least 1, got {self.prompts_per_batch}")
        if self.prompts_per_pool is not None and self.prompts_per_pool < 1:
            raise ConfigError(f"data.prompts_per_pool must be at least 1, or null for all, got {self.prompts_per_pool}")

    def prompt_numbers(self, pool: int) -> list[int]:
        """A pool's prompts as positions in an endless stream of permutations of the texts: pass x length + prompt."""
        total = len(self.prompts)
        count = self.prompts_per_pool or total
        numbers: list[int] = []
        for position in range(pool * count, (pool + 1) * count):
            if not numbers or position % total == 0:
                turn = position // total
                order = torch.randperm(total, generator=generator(self.seed, "prompts", turn)).tolist()
            numbers.append(turn * total + order[position % total])
        return numbers

    def texts(self, numbers: Sequence[int]) -> list[str]:
        return [self.prompts[number % len(self.prompts)] for number in numbers]


@dataclass(frozen=True)
class PoolMaker:
    """Samples pools from a policy, on all ranks together; every method but properties must be called by all.

    Attributes:
        recipe: Settings that shape the pools.
        policy: What is sampled from.
        scorer: Judge of the candidates.
        decoder: Makes the pictures that are judged, in place of the policy's VAE, if given.
        decoder_checks: Number of prompts, the first of every pool, that are judged behind the VAE, too.
        folder: Where pools lie, each in a folder of its own.
        strategy: The trainer's: by it ranks agree, and its precision is sampled in.
        fill: (i, n): sample every n-th of the chunks from the i-th on, and wait for no others. None makes all.
        between_chunks: Called on every rank before each chunk: where a run that is told to end can leave.
        shows_progress: Whether there are progress bars, on rank 0.
    """

    recipe: PoolRecipe
    policy: DiffusionPolicy
    scorer: StepScorer
    decoder: TinyDecoder | None
    decoder_checks: int
    folder: Path
    strategy: Strategy
    fill: tuple[int, int] | None
    between_chunks: Callable[[], None]
    shows_progress: bool

    def make(self, number: int, policy_step: int) -> str:
        """Sample what is missing of a pool; the name of its folder.

        Args:
            number: Number of the pool.
            policy_step: Optimizer steps that the policy has been trained for.

        Raises:
            DataError: the folder can't be written or isn't shared, or another rank failed.
        """
        with gathered_weights(self.policy.denoiser):  # each rank samples prompts of its own
            return self._make_with_full_weights(number, policy_step)

    def _make_with_full_weights(self, number: int, policy_step: int) -> str:
        settings = self.strategy.broadcast(self._settings(number, policy_step))
        # The step counts what the weights have learned; the weights themselves are in the hash.
        name = f"pool-{number:05d}-{digest({**settings, 'policy_step': 0})}"
        numbers = self.recipe.prompt_numbers(number)
        pool = PoolFolder(self.folder / name, -(-len(numbers) // self.recipe.prompts_per_batch))
        if self.strategy.broadcast(pool.finished):
            return name
        self._on_all_ranks(pool.create)
        self._check_shared(pool)
        missing = self.strategy.broadcast(pool.missing())
        self._sample(pool, number, numbers, self._own_chunks(missing))
        if self.fill is None:
            self._on_all_ranks(pool.wait_for_chunks)
        self._on_all_ranks(lambda: self._complete(pool, settings))
        if self.fill is None:
            self._on_all_ranks(pool.wait_for_manifest)
        return name

    def _settings(self, number: int, policy_step: int) -> dict[str, Any]:
        """All that shapes a pool, as plain values."""
        return {
            "pool": number,
            "policy_step": policy_step,
            "policy": fingerprint(self.policy),
            "schedule": schedule_fingerprint(self.policy.schedule),
            "scorer": f"{type(self.scorer).__name__} {fingerprint(self.scorer)}",
            "decoder": None if self.decoder is None else fingerprint(self.decoder),
            "sampler": asdict(self.recipe.sampler),
            "seed": self.recipe.seed,
            "prompts": digest(self.recipe.prompts),
            "prompts_per_pool": self.recipe.prompts_per_pool,
            "prompts_per_batch": self.recipe.prompts_per_batch,
            "latents_dtype": self.recipe.latents_dtype,
            "precision": precision_of(self.strategy),
        }

    # ------------------------------------------------------------------------------------- ranks

    @property
    def _rank(self) -> int:
        return getattr(self.strategy, "global_rank", 0)  # strategies of one device have none

    @property
    def _world_size(self) -> int:
        return getattr(self.strategy, "world_size", 1)

    def _own_chunks(self, missing: Sequence[int]) -> Sequence[int | None]:
        """This rank's chunks: each rank takes its share of what is missing, each job of an array its numbers.

        Equally many on every rank: None where there is one too few.
        """
        part, parts = self.fill or (0, 1)
        wanted = [chunk for chunk in missing if chunk % parts == part]
        rank, world = self._rank, self._world_size
        return [wanted[first + rank] if first + rank < len(wanted) else None for first in range(0, len(wanted), world)]

    def _check_shared(self, pool: PoolFolder) -> None:
        """Rank 0 leaves a file that all others look for: before hours of sampling, not after.

        Raises:
            DataError: some of them don't see it; on every rank.
        """
        if self._world_size == 1:
            return
        name = self.strategy.broadcast(f".shared-{uuid4().hex}")
        first = self.strategy.is_global_zero
        try:
            self._on_all_ranks(lambda: pool.touch(name) if first else None)
            here = None if pool.appears(name) else f"{self._rank} on {socket.gethostname()}"
            found: list[str | None] = [None] * self._world_size
            torch.distributed.all_gather_object(found, here)
        finally:
            if first:
                (pool.path / name).unlink(missing_ok=True)
        apart = [rank for rank in found if rank is not None]
        if apart:
            raise DataError(
                f"the pool folder {pool.path} is not shared: what rank 0 writes there does not appear on rank "
                f"{', '.join(apart)}; {SHARE}"
            )

    def _complete(self, pool: PoolFolder, settings: dict[str, Any]) -> None:
        if self.strategy.is_global_zero and not pool.missing():
            pool.complete(settings)

    def _on_all_ranks(self, work: Callable[[], None]) -> None:
        """Every rank does it, and leaves when all have: if one fails, the others don't wait for it.

        Raises:
            UserError: this rank's failure, or that another's message tells the reason.
        """
        failure = None
        try:
            work()
        except UserError as error:
            failure = error
        fine = self.strategy.reduce_boolean_decision(failure is None, all=True)
        if failure is not None:
            raise failure
        if not fine:
            raise DataError("another process of this run could not make its part of the pool; its message says why")

    # ------------------------------------------------------------------------------------- sampling

    def _sample(self, pool: PoolFolder, number: int, numbers: Sequence[int], chunks: Sequence[int | None]) -> None:
        """Roll out the prompts of some chunks and write each; all ranks keep step, so that they can leave together."""
        self.scorer.to(self.policy.device)
        if self.decoder is not None:
            self.decoder.to(self.policy.device)
        hidden = not (self.strategy.is_global_zero and self.shows_progress)
        with Work(f"pool {number}, chunk", len(chunks), not hidden) as work:
            for chunk in chunks:
                self.between_chunks()
                self._on_all_ranks(partial(self._sample_chunk, pool, number, numbers, chunk, hidden))
                work.advance()

    def _sample_chunk(
        self, pool: PoolFolder, number: int, numbers: Sequence[int], chunk: int | None, hidden: bool
    ) -> None:
        if chunk is None:
            return
        recipe = self.recipe
        first = chunk * recipe.prompts_per_batch
        with self.strategy.precision_plugin.forward_context():
            checked = max(0, self.decoder_checks - first)
            rollout = self._roll_out(numbers[first : first + recipe.prompts_per_batch], number, checked, hidden)
        side = self.policy.image_size // self.policy.downscale
        trajectory = self.policy.schedule.trajectory(recipe.sampler.steps, side * side)
        transitions = [step.timestep for step in trajectory]
        dtype = torch.float16 if recipe.latents_dtype == "float16" else torch.float32
        pool.write(chunk, first * len(transitions), rollout, transitions, dtype)

    def _roll_out(self, numbers: Sequence[int], pool: int, checked: int, hidden: bool) -> Rollout:
        sampler = self.recipe.sampler
        with Work("denoising step", sampler.steps, not hidden) as work:
            return sampler.sample(
                self.policy,
                self.scorer,
                self.recipe.texts(numbers),
                SeededDraws(self.recipe.seed, pool, numbers),
                decode=self.decoder,
                after_step=lambda step: work.advance(step - work.done),
                checked=min(checked, len(numbers)),
            )


def precision_of(strategy: Strategy) -> str:
    """What sampling and training both compute in: the trainer's precision and, where torch may multiply fp32 matrices
    in TF32 or coarser (``torch.set_float32_matmul_precision``), that too."""
    products = torch.get_float32_matmul_precision()
    return str(strategy.precision_plugin.precision) + ("" if products == "highest" else f", products {products}")
