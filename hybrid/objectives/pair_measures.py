"""How well held-out pairs of answers are told apart."""

from collections.abc import Sequence

import torch
from torch import Tensor

from hybrid.core import Encoded
from hybrid.functional import wins
from hybrid.objectives.objective import Measures

__all__ = ["expected_calibration_error", "pair_measures"]

NUM_BINS = 10


def pair_measures(pairs: Sequence[Encoded], rewards: Sequence[Sequence[float]], *, loss: float) -> Measures:
    """What there is to say of held-out pairs whose sides were given these rewards, (chosen, rejected) each.

    accuracy: the share of pairs whose chosen side has the higher one, ties half; with its standard error, _sem.
    margin_mean: of the difference.   All are weighted as the pairs are.
    """
    weights = torch.tensor([e.weight for e in pairs], dtype=torch.float64)
    chosen, rejected = torch.tensor(rewards, dtype=torch.float64).T
    share = weights / weights.sum()
    right = wins(chosen - rejected)
    accuracy = (share * right).sum()
    metrics = {
        "loss": loss,
        "accuracy": float(accuracy),
        "accuracy_sem": float((share.square() * (right - accuracy).square()).sum().sqrt()),
        "chosen_reward": float((share * chosen).sum()),
        "rejected_reward": float((share * rejected).sum()),
        "margin_mean": float((share * (chosen - rejected)).sum()),
        "num_pairs": float(len(pairs)),
    }
    rows = [
        {
            "prompt": e.prompt,
            "chosen": e.target,
            "rejected": e.rejected.target,
            "chosen_reward": a,
            "rejected_reward": b,
        }
        for e, (a, b) in zip(pairs, rewards, strict=True)
        if e.rejected is not None
    ]
    return Measures(metrics, rows)


def expected_calibration_error(difference: Tensor) -> float:
    """How far the confidence of a Bradley-Terry model in its choices is from their being right; 0 is the best.

        ece = sum over bins of n_bin / n * |share of right choices in it - mean confidence in it|

    difference: (n,), score of the chosen answer - that of the rejected one. The model chooses the higher score, with
    confidence sigmoid(|difference|), in [1/2, 1], which ten bins of one width divide; a tie is half right.
    Source: Guo et al. 2017, section 2 (arXiv:1706.04599).
    """
    confidence = difference.abs().sigmoid()
    right = wins(difference)
    bins = ((confidence - 0.5) * 2 * NUM_BINS).long().clamp(max=NUM_BINS - 1)
    gaps = torch.zeros(NUM_BINS, dtype=difference.dtype).index_add_(0, bins, right - confidence)
    return float(gaps.abs().sum() / max(len(difference), 1))
