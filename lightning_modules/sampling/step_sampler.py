"""SPO's step-wise resampler: branch into k candidates, judge them, keep the best and the worst, go on from one.

Source: arXiv 2406.04314, section 3.3; official multi_sample_pipeline.py and multi_sample_pipeline_sdxl.py. Letters:
b prompts, k candidates of each, c h w latent. Where both stand in one dimension it is candidate-major: row i b + j
is the i-th candidate of prompt j.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lightning_modules.batches import Conditioning, DenoiserQuery, StepPairs
from lightning_modules.errors import ConfigError
from lightning_modules.policies.base import DiffusionPolicy
from lightning_modules.randomness import generator, randint, randn
from lightning_modules.sampling.step_scorers import Decode, StepCandidates, StepScorer

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
    def chance(self, copies: int) -> Float[Tensor, "copies b"]:
        """Standard normal numbers for scorers that are controls, from a stream of their own."""


class SeededDraws(Draws):
    """One generator a prompt, keyed by (seed, epoch, index of the prompt in its file).

    So a prompt's candidates don't depend on the prompts beside it, on the rank, or on a restart.
    """

    def __init__(self, seed: int, epoch: int, prompt_indices: Sequence[int]) -> None:
        self._noise = [generator(seed, "rollout", epoch, index) for index in prompt_indices]
        self._chance = [generator(seed, "rollout chance", epoch, index) for index in prompt_indices]

    def randn(self, copies: int, shape: Sequence[int]) -> Float[Tensor, "copies b *shape"]:
        return randn((copies, *shape), self._noise).transpose(0, 1)

    def randint(self, high: int) -> Int[Tensor, " b"]:
        return randint(high, self._noise)

    def chance(self, copies: int) -> Float[Tensor, "copies b"]:
        return randn((copies,), self._chance).T


@dataclass(frozen=True)
class Comparisons:
    """All m comparisons of b prompts' trajectories; what a pool's statistics are made of. On the CPU.

    Attributes:
        timesteps: the t whose candidates were compared (x_t is what they share).
        judged_at: the timestep at which the scorer saw them; 0 after the last step.
        scores: of every candidate.
        gaps: softmax([best, worst])[0] - [1].
        valid: whether the gap passed the sampler's threshold.
        same_choice: of the n prompts that were judged behind the policy's own decoder too: whether the same candidate
            scored highest and the same one lowest. n is 0 where nothing was checked.
        same_valid: of these: whether both judgements pass the threshold, or neither.
        unet_evaluations: network evaluations of one sample each; guidance costs two.
        decodes: pictures decoded, by either decoder.
    """

    timesteps: Int[Tensor, " m"]
    judged_at: Int[Tensor, " m"]
    scores: Float[Tensor, "m k b"]
    gaps: Float[Tensor, "m b"]
    valid: Bool[Tensor, "m b"]
    same_choice: Bool[Tensor, "m n"]
    same_valid: Bool[Tensor, "m n"]
    unet_evaluations: int
    decodes: int

    @staticmethod
    def cat(parts: Sequence[Comparisons]) -> Comparisons:
        """The comparisons of all prompts of several rollouts by one sampler."""
        return Comparisons(
            parts[0].timesteps,
            parts[0].judged_at,
            torch.cat([part.scores for part in parts], dim=2),
            torch.cat([part.gaps for part in parts], dim=1),
            torch.cat([part.valid for part in parts], dim=1),
            torch.cat([part.same_choice for part in parts], dim=1),
            torch.cat([part.same_valid for part in parts], dim=1),
            sum(part.unet_evaluations for part in parts),
            sum(part.decodes for part in parts),
        )

    def metrics(self) -> dict[str, float]:
        """Mean score, valid fraction and score gap, over all and by timestep (``score_gap/t751``), and the cost.

        Where the policy's own decoder was asked too, ``decoder_agreement`` is the fraction of these comparisons with
        the same best and the same worst candidate behind both decoders (1 / (k (k - 1)) by chance), and
        ``decoder_agreement_valid`` of those that both keep or both drop.
        """
        means = {"score": self.scores.mean(dim=1), "valid_fraction": self.valid.float(), "score_gap": self.gaps}
        if self.same_choice.numel():
            means["decoder_agreement"] = self.same_choice.float()
            means["decoder_agreement_valid"] = self.same_valid.float()
        metrics = {name: value.mean().item() for name, value in means.items()}
        for row, t in enumerate(self.timesteps.tolist()):
            metrics |= {f"{name}/t{t}": value[row].mean().item() for name, value in means.items()}
        return metrics | {"unet_evaluations": float(self.unet_evaluations), "decodes": float(self.decodes)}


@dataclass(frozen=True)
class Rollout:
    """What sampling b prompts gives, on the CPU.

    Attributes:
        pairs: the valid pairs, in the order of steps, then prompts. ``indices`` counts them; whoever builds a
            pool out of several rollouts numbers them anew.
        prompt_rows: which of the call's prompts each pair belongs to.
        comparisons: every comparison, valid or not.
    """

    pairs: StepPairs
    prompt_rows: Int[Tensor, " n"]
    comparisons: Comparisons


@dataclass(frozen=True)
class StepSampler:
    """How step pairs are made. The defaults are the official SD 1.5 recipe; SDXL's: 2 candidates, threshold 0.4,
    num_inner_step 3.

    Args:
        steps: DDIM steps.
        guidance_scale: as the objective's.
        eta: as the objective's; above 0, or there is nothing to choose from.
        candidates: k.
        branch_from_step: steps before it are plain; 4 of 20 starts at t = 751, where pictures begin to differ.
        threshold: a pair is valid if softmax([best score, worst score])[0] - [1] is above it; in [0, 1).
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
    threshold: float = 0.3
    continuation: Continuation = "random"
    num_inner_step: int = 0
    decode_batch: int = 8

    def __post_init__(self) -> None:
        wanted = {
            "guidance_scale": (self.guidance_scale >= 1, "at least 1"),
            "eta": (0 < self.eta <= 1, "in (0, 1]: without noise all candidates are one"),
            "candidates": (self.candidates >= 2, "at least 2"),
            "branch_from_step": (0 <= self.branch_from_step < self.steps, f"in [0, steps = {self.steps})"),
            "threshold": (0 <= self.threshold < 1, "in [0, 1), a difference of two probabilities"),
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
        image_size: int | None = None,
        after_step: Callable[[int], None] = lambda step: None,
        checked: int = 0,
    ) -> Rollout:
        """Roll out one trajectory a prompt and collect the valid pairs of its steps.

        The UNet sees b samples a plain step and k b a compared one: the pass that makes the candidates'
        x0-predictions is also the next step's of the one that goes on.

        Args:
            policy: what is sampled from, in eval mode: its dropout would draw from the global generator.
            scorer: who judges, on the policy's device.
            prompts: length b.
            draws: b prompts' random numbers.
            decode: latents to pictures in [0, 1] in place of the policy's own decoder, such as a ``TinyDecoder``.
            image_size: side of the pictures in pixels; None is the policy's own.
            after_step: told the number of finished steps, for a progress bar.
            checked: how many prompts, from the first on, are judged behind the policy's own decoder too, only to
                see how far ``decode`` leads to the same choices; what is kept does not depend on it.

        Raises:
            ConfigError: a step without noise among the compared ones, or a score that is not finite.
        """
        training = policy.training
        policy.eval()
        try:
            return self._walk(
                _Walk(self, policy, scorer, tuple(prompts), draws, decode or policy.decode, checked),
                image_size or policy.image_size,
                after_step,
            )
        finally:
            policy.train(training)

    def _walk(self, walk: _Walk, image_size: int, after_step: Callable[[int], None]) -> Rollout:
        policy = walk.policy
        timesteps, arrivals = policy.schedule.inference_timesteps(self.steps)
        policy.schedule.require_random_steps(arrivals)
        walk.start((policy.latent_channels, image_size // policy.downscale, image_size // policy.downscale))
        steps = list(zip(timesteps.tolist(), arrivals.tolist()))
        for number, (t, arrival) in enumerate(steps[: self.branch_from_step], start=1):
            walk.advance(t, arrival)
            after_step(number)
        for first in range(self.branch_from_step, self.steps, self.num_inner_step + 1):
            last = min(first + self.num_inner_step + 1, self.steps)
            walk.compare(steps[first:last], next_timestep=steps[last][0] if last < self.steps else None)
            after_step(last)
        return walk.rollout()


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
    comparisons: list[tuple[int, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]] = field(default_factory=list)

    def start(self, shape: tuple[int, ...]) -> None:
        """Encode the prompts and draw x_T."""
        self.device = self.policy.device
        self.cond: Conditioning = self.policy.encode_prompts(self.prompts)
        self.latents = self._noise(1, shape)

    def advance(self, t: int, arrival: int) -> None:
        """A plain step of every trajectory."""
        self.latents = self._step(self.latents, self._predict(self.latents, t), t, arrival, copies=1)
        self.output = None

    def compare(self, group: Sequence[tuple[int, int]], next_timestep: int | None) -> None:
        """Branch, walk through the group's (t, arrival), judge, keep valid pairs, go on from one candidate.

        Args:
            group: the steps whose transitions become pairs.
            next_timestep: where the candidates then stand; None where they are finished.
        """
        transitions = list(self._branch(group))
        self.output = None
        ends = transitions[-1][1]
        candidates = self._candidates(ends, next_timestep)
        scores = self._judge(candidates, at=group[-1][0])
        choice, gaps = best_and_worst(scores)
        valid = gaps > self.sampler.threshold
        same_choice, same_valid = self._check(candidates, choice, valid, at=group[-1][0])
        for (before, after), (t, arrival) in zip(transitions, group):
            self._keep(before, after, t, arrival, choice, gaps, valid)
        judged_at = candidates.timesteps[:1]
        self.comparisons.append(
            (group[0][0], judged_at.cpu(), scores.cpu(), gaps.cpu(), valid.cpu(), same_choice.cpu(), same_valid.cpu())
        )
        if next_timestep is not None:
            b = len(self.prompts)
            chosen = self._continue(scores) * b + torch.arange(b, device=self.device)
            self.latents = ends[chosen]
            self.output = None if self.output is None else self.output[chosen]

    def _judge(self, candidates: StepCandidates, at: int) -> Float[Tensor, "k n"]:
        scores = self.scorer.score(candidates).float().reshape(self.sampler.candidates, -1)
        if not scores.isfinite().all():
            raise ConfigError(
                f"step scorer {type(self.scorer).__name__} gave a score that is not finite at t = {at}; "
                "run it and the VAE in fp32"
            )
        return scores

    def _check(
        self, candidates: StepCandidates, choice: Int[Tensor, "2 b"], valid: Bool[Tensor, " b"], at: int
    ) -> tuple[Bool[Tensor, " n"], Bool[Tensor, " n"]]:
        """Of the prompts to check: whether the policy's own decoder leads to the same choice and validity."""
        if self.checked == 0:
            return valid[:0], valid[:0]
        full = candidates.behind(partial(self._decode, decoder=self.policy.decode), self.checked)
        others, gaps = best_and_worst(self._judge(full, at))
        same_choice = (choice[:, : self.checked] == others).all(dim=0)
        return same_choice, valid[: self.checked] == (gaps > self.sampler.threshold)

    def _branch(self, group: Sequence[tuple[int, int]]) -> Iterator[tuple[Tensor, Tensor]]:
        """x_t and x_{t-1} ``[k b c h w]`` of each transition of the k candidates."""
        k = self.sampler.candidates
        before, output = self.latents, self.output
        for number, (t, arrival) in enumerate(group):
            output = self._predict(before, t) if output is None else output
            if number == 0:
                before, output = before.repeat(k, 1, 1, 1), output.repeat(k, 1, 1, 1)
            after = self._step(before, output, t, arrival, copies=k)
            yield before, after
            before, output = after, None

    def _candidates(self, ends: Tensor, next_timestep: int | None) -> StepCandidates:
        """The branches' ends for the scorer. If it asks for their x0-predictions, the policy's output there is kept."""
        k = self.sampler.candidates
        timesteps = torch.full((len(ends),), next_timestep or 0, device=self.device)

        def predict_clean() -> Tensor:
            if next_timestep is None:
                return ends
            self.output = self._predict(ends, next_timestep)
            return self.policy.schedule.predict_clean(self.output, ends, timesteps)[0]

        chance = self.draws.chance(k).to(self.device)
        decode = partial(self._decode, decoder=self.decoder)
        return StepCandidates(ends, timesteps, self.prompts * k, chance, predict_clean, decode)

    def _keep(
        self, before: Tensor, after: Tensor, t: int, arrival: int, choice: Tensor, gaps: Tensor, valid: Tensor
    ) -> None:
        """The valid prompts' best and worst transition as pairs."""
        rows = valid.nonzero().flatten()
        best, worst = (choice[:, rows] * len(self.prompts) + rows).unbind()
        here = torch.full((len(rows),), t)
        apart = before[worst].cpu() if self.sampler.num_inner_step else None
        self.rows.append(rows.cpu())
        self.pairs.append(
            StepPairs(
                latents=before[best].cpu(),
                chosen=after[best].cpu(),
                rejected=after[worst].cpu(),
                timesteps=here,
                prev_timesteps=torch.full_like(here, arrival),
                prompts=tuple(self.prompts[row] for row in rows.tolist()),
                score_gap=gaps[rows].cpu(),
                indices=torch.zeros_like(here),
                rejected_latents=apart,
            )
        )

    def _continue(self, scores: Float[Tensor, "k b"]) -> Int[Tensor, " b"]:
        if self.sampler.continuation == "random":
            return self.draws.randint(self.sampler.candidates).to(self.device)
        best, worst = best_and_worst(scores)[0]
        return best if self.sampler.continuation == "best" else worst

    def _predict(self, latents: Tensor, t: int) -> Tensor:
        guidance_scale = self.sampler.guidance_scale
        copies = len(latents) // len(self.prompts)
        timesteps = torch.full((len(latents),), t, device=self.device)
        self.unet_evaluations += len(latents) * (1 if guidance_scale == 1 else 2)
        cond = Conditioning.cat([self.cond] * copies)
        return self.policy.predict_noise(DenoiserQuery(latents, timesteps, cond, guidance_scale))

    def _step(self, latents: Tensor, output: Tensor, t: int, arrival: int, copies: int) -> Tensor:
        noise = self._noise(copies, latents.shape[1:])
        here, there = (torch.full((len(latents),), step, device=self.device) for step in (t, arrival))
        return self.policy.schedule.step(output, latents, here, there, self.sampler.eta, noise)

    def _noise(self, copies: int, shape: Sequence[int]) -> Tensor:
        return self.draws.randn(copies, shape).flatten(0, 1).to(self.device)

    def _decode(self, latents: Tensor, decoder: Decode) -> Tensor:
        self.decodes += len(latents)
        return torch.cat([decoder(part) for part in latents.split(self.sampler.decode_batch)])

    def rollout(self) -> Rollout:
        timesteps, judged_at, scores, gaps, valid, same_choice, same_valid = zip(*self.comparisons)
        comparisons = Comparisons(
            torch.tensor(timesteps),
            torch.cat(judged_at),
            torch.stack(scores),
            torch.stack(gaps),
            torch.stack(valid),
            torch.stack(same_choice),
            torch.stack(same_valid),
            self.unet_evaluations,
            self.decodes,
        )
        pairs = _cat(self.pairs)
        return Rollout(pairs, torch.cat(self.rows), comparisons)


def _cat(parts: Sequence[StepPairs]) -> StepPairs:
    """All parts' pairs, numbered from 0."""
    apart = [part.rejected_latents for part in parts if part.rejected_latents is not None]
    total = sum(len(part) for part in parts)
    return StepPairs(
        latents=torch.cat([part.latents for part in parts]),
        chosen=torch.cat([part.chosen for part in parts]),
        rejected=torch.cat([part.rejected for part in parts]),
        timesteps=torch.cat([part.timesteps for part in parts]),
        prev_timesteps=torch.cat([part.prev_timesteps for part in parts]),
        prompts=tuple(prompt for part in parts for prompt in part.prompts),
        score_gap=torch.cat([part.score_gap for part in parts]),
        indices=torch.arange(total),
        rejected_latents=torch.cat(apart) if apart else None,
    )
