"""What objectives on pairs of pictures share: where the networks are asked, errors, margins, and what is logged.

e(.) is the squared error of the network's prediction, averaged over c, h, w (official Diffusion-DPO
train.py:1125-1145), for noise and for velocity prediction alike. A new objective subclasses
``PairwiseObjective`` and is its ``loss``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Real
from torch import Tensor

from lightning_modules.batches import Conditioning, DenoiserQuery, LatentPairs
from lightning_modules.errors import ConfigError
from lightning_modules.objectives.base import LossOutput, Objective
from lightning_modules.randomness import randn
from lightning_modules.schedules.base import Schedule


@dataclass(frozen=True, kw_only=True)
class NoisedPairs(DenoiserQuery):
    """Chosen rows first, then rejected ones where the objective needs them; all pictures of a pair share noise and t.

    Attributes:
        target: what the network should answer.
    """

    target: Float[Tensor, "n c h w"]

    def errors(self, output: Float[Tensor, "n c h w"]) -> Float[Tensor, " n"]:
        """e of each picture."""
        return (output - self.target).square().mean(dim=(1, 2, 3))


def noised(
    pictures: Sequence[Float[Tensor, "b c h w"]],
    conds: Sequence[Conditioning],
    schedule: Schedule,
    generators: Sequence[torch.Generator],
) -> NoisedPairs:
    """Where the network is asked about one or several pictures of each sample, which share noise and t."""
    clean = torch.cat(list(pictures))
    timesteps = schedule.draw(generators, clean.device).repeat(len(pictures))
    noise = randn(clean.shape[1:], generators, clean.device).repeat(len(pictures), 1, 1, 1)
    return NoisedPairs(
        latents=schedule.add_noise(clean, noise, timesteps),
        timesteps=timesteps,
        cond=Conditioning.cat(conds),
        target=schedule.target(clean, noise, timesteps),
    )


class PairwiseObjective(Objective):
    """Asks at the chosen picture, and at the rejected one unless ``needs_rejected`` is False, noised alike.

    t is drawn as the schedule draws it (a table's: uniform over all timesteps).
    """

    def query(
        self, batch: LatentPairs, cond: Conditioning, schedule: Schedule, generators: Sequence[torch.Generator]
    ) -> NoisedPairs:
        pictures, conds = [batch.chosen], [cond.with_time_ids(batch.chosen_time_ids)]
        if self.needs_rejected:
            assert batch.rejected is not None
            pictures.append(batch.rejected)
            conds.append(cond.with_time_ids(batch.rejected_time_ids))
        return noised(pictures, conds, schedule, generators)


@dataclass(frozen=True)
class Gains:
    """How far the policy has come from the reference on b pairs: e_policy - e_reference, negative where it is better.

    Attributes:
        chosen, rejected: of each picture.
        chosen_error: e_policy of the chosen one.
    """

    chosen: Float[Tensor, " b"]
    rejected: Float[Tensor, " b"]
    chosen_error: Float[Tensor, " b"]

    @staticmethod
    def of(query: NoisedPairs, policy_output: Tensor, reference_output: Tensor | None) -> Gains:
        assert reference_output is not None
        policy_chosen, policy_rejected = query.errors(policy_output).chunk(2)
        reference_chosen, reference_rejected = query.errors(reference_output).chunk(2)
        return Gains(policy_chosen - reference_chosen, policy_rejected - reference_rejected, policy_chosen)

    @property
    def margin(self) -> Float[Tensor, " b"]:
        """m: how much more the policy has gained on the chosen picture than on the rejected one; mean squared error."""
        return self.rejected - self.chosen

    def metrics(self, query: NoisedPairs, schedule: Schedule) -> dict[str, Float[Tensor, ""]]:
        """``margin`` (m), ``accuracy`` (m > 0, ties half), ``chosen_error_delta`` and ``rejected_error_delta``,
        ``chosen_error``, and ``margin`` and ``accuracy`` by quarter of the timesteps, NaN where a batch has none."""
        per_pair = {"margin": self.margin, "accuracy": accuracy(self.margin)}
        means = {name: value.mean() for name, value in per_pair.items()} | {
            "chosen_error": self.chosen_error.mean(),
            "chosen_error_delta": self.chosen.mean(),
            "rejected_error_delta": self.rejected.mean(),
        }
        return means | by_quarter(per_pair, query.timesteps.chunk(2)[0], schedule)


def check_label_smoothing(label_smoothing: float) -> None:
    """
    Raises:
        ConfigError: it is no probability below one half.
    """
    if not 0 <= label_smoothing < 0.5:
        raise ConfigError(f"objective.label_smoothing must lie in [0, 0.5), got {label_smoothing}")


def smoothed(
    cost: Callable[[Float[Tensor, " b"]], Float[Tensor, " b"]], margin: Float[Tensor, " b"], label_smoothing: float
) -> Float[Tensor, " b"]:
    """(1 - s) cost(m) + s cost(-m), where s is the probability that a label is wrong: Mitchell's conservative DPO
    (ericmitchell.ai/cdpo.pdf, equation 3); 0 trusts every label."""
    per_pair = cost(margin)
    if label_smoothing:
        per_pair = (1 - label_smoothing) * per_pair + label_smoothing * cost(-margin)
    return per_pair


def loss_output(per_pair: Float[Tensor, " b"], metrics: Mapping[str, Float[Tensor, ""]]) -> LossOutput:
    """The mean over the pairs, and the metrics without their graph."""
    return LossOutput(per_pair.mean(), {name: value.detach() for name, value in metrics.items()})


def accuracy(margin: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
    """1 where the policy sides with the label, 1/2 where it sides with neither (as at the very start)."""
    return 0.5 * ((margin > 0).float() + (margin >= 0).float())


def by_quarter(
    values: Mapping[str, Float[Tensor, " b"]], timesteps: Real[Tensor, " b"], schedule: Schedule
) -> dict[str, Float[Tensor, ""]]:
    """Means of per-pair values over each quarter of the schedule, as ``margin/t0-249``, ...

    NaN, which the running means leave out, where a quarter has no pair. The last one is closed: t = T belongs to it.
    """
    quarters = (4 * schedule.progress(timesteps)).floor().clamp(max=3)
    total = schedule.num_timesteps
    metrics: dict[str, Tensor] = {}
    for quarter in range(4):
        label = f"t{quarter * total // 4}-{(quarter + 1) * total // 4 - 1}"
        inside = quarters == quarter
        count = inside.sum()  # picking the rows out would wait for the device
        metrics |= {f"{name}/{label}": value.where(inside, 0.0).sum() / count for name, value in values.items()}
    return metrics
