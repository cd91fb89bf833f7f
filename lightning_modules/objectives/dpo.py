"""Diffusion-DPO: preference optimisation on pairs of pictures (arXiv 2311.12908)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid

from lightning_modules.batches import Conditioning, DenoiserQuery, LatentPairs
from lightning_modules.errors import ConfigError
from lightning_modules.objectives.base import LossOutput, Objective
from lightning_modules.objectives.metrics import accuracy, by_quarter
from lightning_modules.randomness import randint, randn
from lightning_modules.schedules.discrete import NoiseSchedule


class PairLoss(ABC):
    """Turns the margin of a pair into its loss.

    ``margin`` is m = -D, D = (e_policy(w) - e_ref(w)) - (e_policy(l) - e_ref(l)): how much more the policy has
    gained on the chosen picture than on the rejected one, in units of mean squared error.
    """

    @abstractmethod
    def __call__(self, margin: Float[Tensor, " b"], beta: float) -> Float[Tensor, " b"]: ...


@dataclass(frozen=True)
class Sigmoid(PairLoss):
    """-log sigmoid(beta m / 2): Diffusion-DPO, equation 14, with its T and weight in beta; official train.py:1135."""

    def __call__(self, margin: Float[Tensor, " b"], beta: float) -> Float[Tensor, " b"]:
        return -logsigmoid(0.5 * beta * margin)


@dataclass(frozen=True)
class IPO(PairLoss):
    """(m - 1 / (2 beta))^2: identity preference optimisation (arXiv 2310.12036, equation 17)."""

    def __call__(self, margin: Float[Tensor, " b"], beta: float) -> Float[Tensor, " b"]:
        return (margin - 1 / (2 * beta)).square()


@dataclass(frozen=True)
class Hinge(PairLoss):
    """max(0, 1 - beta m): SLiC's hinge (arXiv 2305.10425, equation 4) on the diffusion margin."""

    def __call__(self, margin: Float[Tensor, " b"], beta: float) -> Float[Tensor, " b"]:
        return torch.relu(1 - beta * margin)


@dataclass(frozen=True, kw_only=True)
class PairQuery(DenoiserQuery):
    """Chosen rows first, then rejected; both halves share noise and timesteps."""

    target: Float[Tensor, "n c h w"]


@dataclass(frozen=True)
class DPO(Objective):
    """L = pair_loss(-D): the policy should beat the reference by more on the chosen picture than on the rejected.

    e(.) is the squared error of the network's prediction, averaged over c, h, w (official train.py:1125-1145), for
    noise and for velocity prediction. Chosen and rejected share t and noise; t is uniform over all timesteps.

    Args:
        beta: multiplies the difference of **mean** squared errors; ``Sigmoid`` halves it, as the official code does,
            so 5000 here is 5000 there and 2500 in the diffusers example. 5000 as a mean over SD 1.5's 4x64x64
            latents is 0.153 as a sum.
        loss_type: what a margin costs.
        label_smoothing: s, the probability that a label is wrong: (1 - s) loss(m) + s loss(-m), Mitchell's
            conservative DPO (ericmitchell.ai/cdpo.pdf, equation 3); 0 trusts every label.

    Logged: ``margin`` (m), ``accuracy`` (m > 0, ties half), ``chosen_error_delta`` and ``rejected_error_delta``
    (e_policy - e_ref; negative is better than the reference), ``chosen_error``, ``reward_margin`` (beta m / 2), and
    ``margin`` and ``accuracy`` by quarter of the timesteps (``accuracy/t0-249``, ...), NaN where a batch has none.
    """

    beta: float = 5000.0
    loss_type: PairLoss = field(default_factory=Sigmoid)
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        if self.beta <= 0:
            raise ConfigError(f"objective.beta must be above 0, got {self.beta}; Diffusion-DPO uses 2000 to 5000")
        if not 0 <= self.label_smoothing < 0.5:
            raise ConfigError(f"objective.label_smoothing must lie in [0, 0.5), got {self.label_smoothing}")

    def query(
        self, batch: LatentPairs, cond: Conditioning, schedule: NoiseSchedule, generators: Sequence[torch.Generator]
    ) -> PairQuery:
        assert batch.rejected is not None
        clean = torch.cat([batch.chosen, batch.rejected])
        timesteps = randint(schedule.num_timesteps, generators, clean.device).repeat(2)
        noise = randn(clean.shape[1:], generators, clean.device).repeat(2, 1, 1, 1)
        conds = [cond.with_time_ids(batch.chosen_time_ids), cond.with_time_ids(batch.rejected_time_ids)]
        return PairQuery(
            latents=schedule.add_noise(clean, noise, timesteps),
            timesteps=timesteps,
            cond=Conditioning.cat(conds),
            target=schedule.target(clean, noise, timesteps),
        )

    def loss(
        self,
        batch: LatentPairs,
        query: PairQuery,
        policy_output: Float[Tensor, "n c h w"],
        reference_output: Float[Tensor, "n c h w"] | None,
        schedule: NoiseSchedule,
    ) -> LossOutput:
        assert reference_output is not None
        policy_chosen, policy_rejected = _errors(policy_output, query.target).chunk(2)
        reference_chosen, reference_rejected = _errors(reference_output, query.target).chunk(2)
        chosen_delta, rejected_delta = policy_chosen - reference_chosen, policy_rejected - reference_rejected
        margin = rejected_delta - chosen_delta
        per_pair = self.loss_type(margin, self.beta)
        if self.label_smoothing:
            flipped = self.loss_type(-margin, self.beta)
            per_pair = (1 - self.label_smoothing) * per_pair + self.label_smoothing * flipped
        accurate = accuracy(margin)
        metrics = {
            "margin": margin.mean(),
            "reward_margin": 0.5 * self.beta * margin.mean(),
            "accuracy": accurate.mean(),
            "chosen_error": policy_chosen.mean(),
            "chosen_error_delta": chosen_delta.mean(),
            "rejected_error_delta": rejected_delta.mean(),
        } | by_quarter({"margin": margin, "accuracy": accurate}, query.timesteps.chunk(2)[0], schedule.num_timesteps)
        return LossOutput(per_pair.mean(), {name: value.detach() for name, value in metrics.items()})


def _errors(output: Float[Tensor, "n c h w"], target: Float[Tensor, "n c h w"]) -> Float[Tensor, " n"]:
    return (output - target).square().mean(dim=(1, 2, 3))
