"""SPO's step-wise resampler: branch into k candidates, judge them, keep the best and the worst, go on from one.

Source: arXiv 2406.04314, section 3.3; official multi_sample_pipeline.py and multi_sample_pipeline_sdxl.py. Letters:
b prompts, k candidates of each, c h w latent. Where both stand in one dimension it is candidate-major: row i b + j
is the i-th candidate of prompt j.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lightning_modules.batches import Conditioning, DenoiserQuery, StepPairs
from lightning_modules.errors import ConfigError
from lightning_modules.policies.base import DiffusionPolicy
from lightning_modules.randomness import generator, randint, randn
from lightning_modules.sampling.comparisons import Comparisons
from lightning_modules.sampling.step_scorers import Decode, StepCandidates, StepScorer
from lightning_modules.sampling.thresholds import Threshold
from lightning_modules.schedules.base import Schedule, Step

Continuation = Literal["random", "best", "worst"]


class Draws(ABC):
    """Every random number that a rollout of b prompts reads, in the order in which it reads them."""

    @abstractmethod
    def randn(self, copies: int, shape: Sequence[int]) -> Float[Tensor, "copies b *shape"]:
        """Standard normal noise, ``copies`` times for each prompt."""

    @abstractmethod
    def randint(self, high: int) -> Int[Tensor, " b"]:
        """Uniform over {0, ..., high - 1}."""

    @abstractmethod
    def control_noise(self, copies: int) -> Float[Tensor, "copies b"]:
        """Standard normal numbers for scorers that are controls, from a stream of their own."""


class SeededDraws(Draws):
    """One generator per prompt, keyed by (seed, epoch, index of the prompt in its file).

    So a prompt's candidates don't depend on the prompts beside it, on the rank, or on a restart.
    """

    def __init__(self, seed: int, epoch: int, prompt_indices: Sequence[int]) -> None:
        self._noise = [generator(seed, "rollout", epoch, index) for index in prompt_indices]
        self._control = [generator(seed, "rollout chance", epoch, index) for index in prompt_indices]

    def randn(self, copies: int, shape: Sequence[int]) -> Float[Tensor, "copies b *shape"]:
        return randn((copies, *shape), self._noise).transpose(0, 1)

    def randint(self, high: int) -> Int[Tensor, " b"]:
        return randint(high, self._noise)

    def control_noise(self, copies: int) -> Float[Tensor, "copies b"]:
        return randn((copies,), self._control).T


@dataclass(frozen=True)
class Rollout:
    """What sampling b prompts gives, on the CPU.

    Attributes:
        pairs: the valid pairs, in the order of steps, then prompts. ``indices`` counts them; whoever builds a
            pool out of several rollouts numbers them again.
        prompt_rows: which of the call's prompts each pair belongs to.
        comparisons: every comparison, valid or not, in the order of steps, then prompts.
        unet_evaluations: network evaluations of one sample each; guidance costs two.
        decodes: pictures decoded, by either decoder.
    """

    pairs: StepPairs
    prompt_rows: Int[Tensor, " n"]
    comparisons: Comparisons
    unet_evaluations: int
    decodes: int


@dataclass(frozen=True)
class StepSampler:
    """How step pairs are made. The defaults are the official SD 1.5 recipe; SDXL's: 2 candidates, threshold 0.4,
    num_inner_step 3.

    Args:
        steps: DDIM steps, or steps of a flow's rule.
        guidance_scale: classifier-free guidance, as the objective's.
        eta: eta of the DDIM step, or what a flow's rule is multiplied by, as the objective's; above 0, or there is
            nothing to choose from.
        candidates: k.
        branch_from_step: steps before it are plain; 4 of 20 starts at t = 751, where pictures begin to differ.
        branch_until_step: steps from it on are not compared; None compares all that draw noise (a flow's last step
            draws none).
        plain_eta: eta of the plain steps; None is ``eta``, 0 takes them without noise, as MixGRPO (arXiv 2507.21802)
            does outside of its window.
        threshold: a pair is valid if softmax([best score, worst score])[0] - [1] is above it; in [0, 1), or a
            ``Threshold`` that differs from step to step.
        continuation: which candidate the trajectory goes on from. The paper's is "random"; "best" and "worst" are
            its ablation.
        num_inner_step: further plain steps that the candidates take before they are compared, so that a comparison
            gives up to num_inner_step + 1 pairs, of which only the first shares its x_t.
        decode_batch: pictures decoded at once.
    """

    steps: int = 20
    guidance_scale: float = 5.0
    eta: float = 1.0
    candidates: int = 4
    branch_from_step: int = 4
    threshold: float | Threshold = 0.3
    continuation: Continuation = "random"
    num_inner_step: int = 0
    decode_batch: int = 8
    branch_until_step: int | None = None
    plain_eta: float | None = None

    def __post_init__(self) -> None:
        wanted = {
            "guidance_scale": (self.guidance_scale >= 1, "at least 1"),
            "eta": (0 < self.eta <= 1, "in (0, 1]: without noise all candidates are one"),
            "candidates": (self.candidates >= 2, "at least 2"),
            "branch_from_step": (0 <= self.branch_from_step < self.steps, f"in [0, steps = {self.steps})"),
            "branch_until_step": (
                self.branch_until_step is None or self.branch_from_step < self.branch_until_step <= self.steps,
                f"null, or above branch_from_step and at most steps = {self.steps}",
            ),
            "plain_eta": (self.plain_eta is None or 0 <= self.plain_eta <= 1, "null or in [0, 1]"),
            "threshold": (
                isinstance(self.threshold, Threshold) or 0 <= self.threshold < 1,
                "in [0, 1), a difference of two probabilities",
            ),
            "num_inner_step": (self.num_inner_step >= 0, "0 or more"),
            "decode_batch": (self.decode_batch >= 1, "at least 1"),
        }
        for name, (right, want) in wanted.items():
            if not right:
                raise ConfigError(f"step sampler: {name} must be {want}, got {getattr(self, name)}")

    @torch.no_grad()
    def sample(
        self,
        policy: DiffusionPolicy,
        scorer: StepScorer,
        prompts: Sequence[str],
        draws: Draws,
        decode: Decode | None = None,
        after_step: Callable[[int], None] = lambda step: None,
        checked: int = 0,
    ) -> Rollout:
        """Roll out one trajectory a prompt and collect the valid pairs of its steps.

        The UNet sees b samples a plain step and k b a compared one: the pass that makes the candidates'
        x0-predictions is also the next step's of the one that goes on. Where the scorer asks for no x0-prediction, it
        sees b samples every step.

        Args:
            policy: what is sampled from, in eval mode: its dropout would draw from the global generator.
            scorer: who judges, on the policy's device.
            prompts: length b.
            draws: b prompts' random numbers.
            decode: latents to pictures in [0, 1] in place of the policy's own decoder, such as a ``TinyDecoder``.
            after_step: told the number of finished steps, for a progress bar.
            checked: how many prompts, from the first on, are judged behind the policy's own decoder too, only to
                see how far ``decode`` leads to the same choices; what is kept does not depend on it.

        Raises:
            ConfigError: a step without noise among the compared ones, or a score that is not finite.
        """
        training = policy.training
        policy.eval()
        try:
            walk = _Walk(self, policy, scorer, tuple(prompts), draws, decode or policy.decode, checked)
            return self._roll_out(walk, after_step)
        finally:
            policy.train(training)

    def thresholds(self, trajectory: tuple[Step, ...], schedule: Schedule) -> list[float]:
        """What the gap of a comparison at each step must exceed."""
        if isinstance(self.threshold, Threshold):
            return self.threshold.at(trajectory, schedule)
        return [self.threshold] * len(trajectory)

    def _roll_out(self, walk: _Walk, after_step: Callable[[int], None]) -> Rollout:
        policy = walk.policy
        side = policy.image_size // policy.downscale
        trajectory = policy.schedule.trajectory(self.steps, side * side)
        end = self._end(policy.schedule.random_steps(trajectory))
        thresholds = self.thresholds(trajectory, policy.schedule)
        walk.start((policy.latent_channels, side, side))
        for step in trajectory[: self.branch_from_step]:
            walk.advance(step)
            after_step(step.index + 1)
        for first in range(self.branch_from_step, end, self.num_inner_step + 1):
            group = trajectory[first : min(first + self.num_inner_step + 1, end)]
            walk.compare(group, thresholds[first], finished=group[-1] is trajectory[-1])
            after_step(group[-1].index + 1)
        if end < self.steps:  # what is left compares nothing, and no pair asks where it leads
            after_step(self.steps)
        return walk.rollout()

    def _end(self, random: int) -> int:
        """The step before which comparisons end.

        Args:
            random: how many of the trajectory's first steps have a density.
        """
        end = random if self.branch_until_step is None else min(random, self.branch_until_step)
        if end <= self.branch_from_step:
            raise ConfigError(
                f"step sampler: of {self.steps} steps the first {random} draw noise, and branch_from_step is "
                f"{self.branch_from_step}: none is left to compare; lower it or take more steps"
            )
        return end


def best_and_worst(scores: Float[Tensor, "k b"]) -> tuple[Int[Tensor, "2 b"], Float[Tensor, " b"]]:
    """Which candidate of each prompt scored highest and lowest, and softmax([high, low])[0] - [1].

    Which of exactly tied candidates is named is arbitrary. Source: official compare_funcs.py:4-14.
    """
    choice = torch.stack([scores.argmax(dim=0), scores.argmin(dim=0)])
    high, low = scores.gather(0, choice).float().softmax(dim=0)
    return choice, high - low


@dataclass
class _Walk:
    """The state of one rollout: where b trajectories stand, and what they have left behind.

    Attributes:
        latents: x_t, b rows.
        output: the policy's output at it, where a comparison has computed it already; while the scorer looks at
            the candidates, at them.
    """

    sampler: StepSampler
    policy: DiffusionPolicy
    scorer: StepScorer
    prompts: tuple[str, ...]
    draws: Draws
    decoder: Decode
    checked: int
    unet_evaluations: int = 0
    decodes: int = 0
    output: Tensor | None = None
    pairs: list[StepPairs] = field(default_factory=list)
    rows: list[Tensor] = field(default_factory=list)
    comparisons: list[Comparisons] = field(default_factory=list)

    def start(self, shape: tuple[int, ...]) -> None:
        """Encode the prompts and draw x_T."""
        self.device = self.policy.device
        self.cond: Conditioning = self.policy.encode_prompts(self.prompts)
        self.latents = self._noise(1, shape)

    def advance(self, step: Step) -> None:
        """A plain step of every trajectory."""
        output = self._predict(self.latents, step.timestep)
        eta = self.sampler.eta if self.sampler.plain_eta is None else self.sampler.plain_eta
        self.latents = self._step(self.latents, output, step, 1, eta)
        self.output = None

    def compare(self, group: Sequence[Step], threshold: float, finished: bool) -> None:
        """Branch, walk through the group's steps, judge, keep valid pairs, go on from one candidate.

        Args:
            group: the steps whose transitions become pairs.
            threshold: what a gap must exceed.
            finished: whether the candidates are then clean.
        """
        transitions = list(self._branch(group))
        self.output = None
        ends = transitions[-1][1]
        candidates = self._candidates(ends, group[-1].timestep, None if finished else group[-1].next_timestep)
        scores = self._judge(candidates, at=group[-1].timestep)
        choice, gaps = best_and_worst(scores)
        valid = gaps > threshold
        for (before, after), step in zip(transitions, group):
            self._keep(before, after, step, choice, gaps, valid)
        same_choice, same_valid = self._check(candidates, choice, valid, threshold, at=group[-1].timestep)
        rows = torch.arange(len(self.prompts))
        self.comparisons.append(
            Comparisons(
                timesteps=torch.full((len(rows),), group[0].timestep),
                judged_at=self.scorer.judged_at(candidates)[: len(rows)].cpu(),
                scores=scores.T.cpu(),
                gaps=gaps.cpu(),
                valid=valid.cpu(),
                checked=rows < self.checked,
                same_choice=same_choice.cpu(),
                same_valid=same_valid.cpu(),
            )
        )
        if not finished:
            chosen = self._continue(scores) * len(rows) + rows.to(self.device)
            self.latents = ends[chosen]
            self.output = None if self.output is None else self.output[chosen]

    def _judge(self, candidates: StepCandidates, at: int | float) -> Float[Tensor, "k n"]:
        scores = self.scorer.score(candidates).float().reshape(self.sampler.candidates, -1)
        if not scores.isfinite().all():
            raise ConfigError(
                f"step scorer {type(self.scorer).__name__} gave a score that is not finite at t = {at}; "
                "run it and the VAE in fp32"
            )
        return scores

    def _check(
        self,
        candidates: StepCandidates,
        choice: Int[Tensor, "2 b"],
        valid: Bool[Tensor, " b"],
        threshold: float,
        at: int | float,
    ) -> tuple[Bool[Tensor, " b"], Bool[Tensor, " b"]]:
        """Whether the policy's own decoder leads to the same choice and validity; False for prompts not checked."""
        same_choice, same_valid = torch.zeros_like(valid), torch.zeros_like(valid)
        if self.checked:
            full = candidates.with_decoder(partial(self._decode, decoder=self.policy.decode), self.checked)
            others, gaps = best_and_worst(self._judge(full, at))
            same_choice[: self.checked] = (choice[:, : self.checked] == others).all(dim=0)
            same_valid[: self.checked] = valid[: self.checked] == (gaps > threshold)
        return same_choice, same_valid

    def _branch(self, group: Sequence[Step]) -> Iterator[tuple[Tensor, Tensor]]:
        """x_t and x_{t-1} ``[k b c h w]`` of each transition of the k candidates."""
        k = self.sampler.candidates
        before, output = self.latents, self.output
        for number, step in enumerate(group):
            output = self._predict(before, step.timestep) if output is None else output
            if number == 0:
                before, output = before.repeat(k, 1, 1, 1), output.repeat(k, 1, 1, 1)
            after = self._step(before, output, step, k, self.sampler.eta)
            yield before, after
            before, output = after, None

    def _candidates(self, ends: Tensor, timestep: int | float, next_timestep: int | float | None) -> StepCandidates:
        """The branches' ends for the scorer. If it asks for their x0-predictions, the policy's output there is kept."""
        k = self.sampler.candidates
        timesteps = torch.full((len(ends),), 0 if next_timestep is None else next_timestep, device=self.device)
        started_at = torch.full((len(ends),), timestep, device=self.device)

        def predict_clean() -> Tensor:
            if next_timestep is None:
                return ends
            self.output = self._predict(ends, next_timestep)
            return self.policy.schedule.predict_clean(self.output, ends, timesteps)[0]

        control_noise = self.draws.control_noise(k).to(self.device)
        decode = partial(self._decode, decoder=self.decoder)
        prompts = self.prompts * k
        return StepCandidates(ends, timesteps, started_at, prompts, control_noise, predict_clean, decode)

    def _keep(self, before: Tensor, after: Tensor, step: Step, choice: Tensor, gaps: Tensor, valid: Tensor) -> None:
        """The valid prompts' best and worst transition as pairs."""
        rows = valid.nonzero().flatten()
        best, worst = (choice[:, rows] * len(self.prompts) + rows).unbind()
        starts = torch.full((len(rows),), step.timestep)
        apart = before[worst].cpu() if self.sampler.num_inner_step else None
        self.rows.append(rows.cpu())
        self.pairs.append(
            StepPairs(
                latents=before[best].cpu(),
                chosen=after[best].cpu(),
                rejected=after[worst].cpu(),
                timesteps=starts,
                next_timesteps=torch.full_like(starts, step.next_timestep),
                prompts=tuple(self.prompts[row] for row in rows.tolist()),
                score_gap=gaps[rows].cpu(),
                indices=torch.zeros(len(rows), dtype=torch.int64),
                rejected_latents=apart,
            )
        )

    def _continue(self, scores: Float[Tensor, "k b"]) -> Int[Tensor, " b"]:
        if self.sampler.continuation == "random":
            return self.draws.randint(self.sampler.candidates).to(self.device)
        best, worst = best_and_worst(scores)[0]
        return best if self.sampler.continuation == "best" else worst

    def _predict(self, latents: Tensor, t: int | float) -> Tensor:
        guidance_scale = self.sampler.guidance_scale
        copies = len(latents) // len(self.prompts)
        timesteps = torch.full((len(latents),), t, device=self.device)
        self.unet_evaluations += len(latents) * (1 if guidance_scale == 1 else 2)
        cond = Conditioning.cat([self.cond] * copies)
        return self.policy.predict_noise(DenoiserQuery(latents, timesteps, cond, guidance_scale))

    def _step(self, latents: Tensor, output: Tensor, step: Step, copies: int, eta: float) -> Tensor:
        noise = self._noise(copies, latents.shape[1:])
        starts = torch.full((len(latents),), step.timestep, device=self.device)
        ends = torch.full_like(starts, step.next_timestep)
        return self.policy.schedule.step(output, latents, starts, ends, eta, noise)

    def _noise(self, copies: int, shape: Sequence[int]) -> Tensor:
        return self.draws.randn(copies, shape).flatten(0, 1).to(self.device)

    def _decode(self, latents: Tensor, decoder: Decode) -> Tensor:
        self.decodes += len(latents)
        return torch.cat([decoder(part) for part in latents.split(self.sampler.decode_batch)])

    def rollout(self) -> Rollout:
        pairs = StepPairs.cat(self.pairs)
        pairs = replace(pairs, indices=torch.arange(len(pairs)))
        comparisons = Comparisons.cat(self.comparisons)
        return Rollout(pairs, torch.cat(self.rows), comparisons, self.unet_evaluations, self.decodes)
