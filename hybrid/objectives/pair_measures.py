"""How well held-out pairs of answers are told apart."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hybrid.core import Encoded, Pairs
from hybrid.data import collate_pairs
from hybrid.functional import wins
from hybrid.objectives.objective import Measures, Parts

__all__ = ["expected_calibration_error", "pair_measures", "rated_pairs"]

NUM_BINS = 10


@torch.no_grad()
def rated_pairs(
    parts: Parts, pairs: Sequence[Encoded], batch_size: int, rated: Callable[[Pairs], tuple[Tensor, Tensor]]
) -> Measures:
    """`pair_measures` of held-out pairs, without dropout; of none there are none.

    rated: of a batch the rewards of its `sides`, (2B,), and the sum of its pairs' losses, weighted.
    """
    if not pairs:
        return Measures({}, [])
    rewards: list[list[float]] = []
    total = 0.0
    parts.policy.eval()
    with parts.autocast():
        for start in range(0, len(pairs), batch_size):
            batch = collate_pairs(pairs[start : start + batch_size], pad_id=0).to(parts.policy.device)
            of_sides, loss = rated(batch)
            rewards += torch.stack(batch.split(of_sides), 1).tolist()
            total += float(loss)
    return pair_measures(pairs, rewards, loss=total / sum(e.weight for e in pairs))


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
