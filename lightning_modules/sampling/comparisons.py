"""What a rollout compared, whether a pair came of it or not; a pool's statistics are made of it."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Bool, Float, Real
from torch import Tensor

from lightning_modules.batches import Record


@dataclass(frozen=True)
class Comparisons(Record):
    """One row per comparison of k candidates, on the CPU.

    Attributes:
        timesteps: the t whose candidates were compared (x_t is what they share).
        judged_at: the timestep that the scorer took them to be at; 0 after the last step, but for latent scorers.
        scores: of every candidate.
        gaps: softmax([best, worst])[0] - [1].
        valid: whether the gap passed the sampler's threshold.
        checked: whether the prompt was judged behind the policy's own decoder too.
        same_choice: where it was: whether the same candidate scored highest and the same one lowest.
        same_valid: likewise: whether both judgements pass the threshold, or neither.
    """

    timesteps: Real[Tensor, " m"]
    judged_at: Real[Tensor, " m"]
    scores: Float[Tensor, "m k"]
    gaps: Float[Tensor, " m"]
    valid: Bool[Tensor, " m"]
    checked: Bool[Tensor, " m"]
    same_choice: Bool[Tensor, " m"]
    same_valid: Bool[Tensor, " m"]

    def __len__(self) -> int:
        return len(self.timesteps)

    def metrics(self) -> dict[str, float]:
        """Mean score, valid fraction and score gap, over all and by timestep (``score_gap/t751``).

        Where the policy's own decoder was asked too, ``decoder_agreement`` is the fraction of these comparisons with
        the same best and the same worst candidate behind both decoders (1 / (k (k - 1)) by chance), and
        ``decoder_agreement_valid`` of those that both keep or both drop.
        """
        rows = {"score": self.scores.mean(dim=1), "valid_fraction": self.valid.float(), "score_gap": self.gaps}
        metrics = _means(rows, self.timesteps)
        if self.checked.any():
            both = {"decoder_agreement": self.same_choice, "decoder_agreement_valid": self.same_valid}
            checked = {name: value[self.checked].float() for name, value in both.items()}
            metrics |= _means(checked, self.timesteps[self.checked])
        return metrics


def _means(rows: dict[str, Float[Tensor, " m"]], timesteps: Real[Tensor, " m"]) -> dict[str, float]:
    order = timesteps.argsort(descending=True, stable=True)  # whatever the chunks, the sums are of one order
    means = {name: value[order].mean().item() for name, value in rows.items()}
    for t in sorted(set(timesteps.tolist()), reverse=True):
        here = timesteps == t
        means |= {f"{name}/t{round(t)}": value[here].mean().item() for name, value in rows.items()}
    return means
