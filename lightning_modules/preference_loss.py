"""The criterion of the step-aware preference model (PickScore's, arXiv 2305.01569), and labels from scores."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed
import torch.distributed.nn
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def preference_loss(
    chosen: Float[Tensor, "b d"],
    rejected: Float[Tensor, "b d"],
    text: Float[Tensor, "b d"],
    logit_scale: Float[Tensor, ""],
    labels: Float[Tensor, " b"],
    weights: Float[Tensor, " b"],
    in_batch_negatives: bool = False,
) -> Float[Tensor, ""]:
    """sum_i w_i KL(label_i || softmax of the pair's two logits) / sum_i w_i.

    The logits are logit_scale cos(picture, prompt). For a clear label KL is the cross-entropy; for a tie it is the
    cross-entropy less ln 2, so that 0 is the best loss of every pair (official spm_criterion.py:53-132).

    Args:
        chosen, rejected, text: unit vectors; where there are several ranks, of all of them.
        logit_scale: multiplies the cosines; exp of the model's parameter.
        labels: probability that ``chosen`` is preferred: 1, 0, or 0.5 for a tie.
        weights: what each pair counts: 1 / (number of pairs of its prompt).
        in_batch_negatives: the softmax also runs over the other pairs' pictures, and half the loss is the
            cross-entropy of each picture's own prompt against the other pairs' prompts.
    """
    entropy = torch.special.entr(labels) + torch.special.entr(1 - labels)
    if not in_batch_negatives:
        logits = logit_scale * torch.stack([(chosen * text).sum(-1), (rejected * text).sum(-1)], dim=-1)
        per_pair = _expected(F.log_softmax(logits, dim=-1).unbind(-1), labels) - entropy
    else:
        own = torch.arange(len(text), device=text.device)
        logits = logit_scale * text @ torch.cat([chosen, rejected]).T
        by_text, by_picture = F.log_softmax(logits, dim=1), F.log_softmax(logits, dim=0)
        columns = own, own + len(text)
        of_pictures = _expected([by_text[own, column] for column in columns], labels) - entropy
        of_texts = _expected([by_picture[own, column] for column in columns], labels)
        per_pair = (of_pictures + of_texts) / 2
    return (weights * per_pair).sum() / weights.sum()


def _expected(log_probs: Sequence[Tensor], labels: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
    """Cross-entropy of the labels with the log-probabilities of (chosen, rejected)."""
    return -(labels * log_probs[0] + (1 - labels) * log_probs[1])


def labels_from_scores(
    first: Float[Tensor, " b"], second: Float[Tensor, " b"], threshold: float
) -> Float[Tensor, " b"]:
    """Probability that the first picture is preferred: 1 or 0 where |p_1 - p_2| > threshold, else 0.5 (a tie).

    (p_1, p_2) = softmax([first, second]), so scores that are logits are meant (official spm_task.py:424-481).
    """
    gap = torch.tanh((first - second) / 2)  # = p_1 - p_2
    return torch.where(gap.abs() > threshold, (gap > 0).float(), torch.full_like(gap, 0.5))


def agreement(margin: Float[Tensor, " b"], labels: Float[Tensor, " b"]) -> Float[Tensor, ""]:
    """Fraction of the pairs that are no ties in which the model sides with the label; 1/2 where it sides with neither.

    NaN where all are ties.

    Args:
        margin: the chosen picture's score less the rejected one's.
        labels: as in ``preference_loss``.
    """
    sided = margin * (2 * labels - 1)
    return (0.5 * ((sided > 0).float() + (sided >= 0).float()))[labels != 0.5].mean()


def of_all_ranks(columns: Float[Tensor, "k b *d"]) -> Float[Tensor, "k all *d"]:
    """The pairs of all ranks, in the order of the ranks; every rank must have as many.

    Gradients flow back to each rank from the loss of every rank. Where all compute one and the same loss, DDP's mean
    over the ranks is then that loss's gradient.
    """
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return columns
    return torch.cat(torch.distributed.nn.functional.all_gather(columns.contiguous()), dim=1)
