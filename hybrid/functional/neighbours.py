"""Nearest keys, and the next token that they say: the maths of a datastore (kNN-LM).

`R` queries, `N` keys, `k` neighbours, `D` the width of both, `V` vocabulary.
Source: Khandelwal et al. 2020 (arXiv:1911.00172).
"""

import math

import torch
from torch import Tensor

from hybrid.functional.precision import to_float

__all__ = ["knn_label_prob", "knn_prob", "mixed_logprob", "nearest", "squared_distance"]

# Keys that are compared at a time: with a few hundred queries the distances take some ten MiB.
BLOCK = 16384


def nearest(queries: Tensor, keys: Tensor, k: int, *, block: int = BLOCK) -> tuple[Tensor, Tensor]:
    """(squared distance, index) of the k nearest keys of each query, (R, k) each, the nearest first.

        d² = sum_j (query_j - key_j)²

    queries: (R, D).   keys: (N, D), N >= k, of any dtype and on any device: a block at a time comes to the queries.
    Keys are ranked by |key|² - 2 query · key, so that two which differ by less than the rounding of that may change
    places; the distances are those of `squared_distance`. Of equal ones any may be among the k.
    Raises ValueError where there are fewer than k keys.
    """
    if not 1 <= k <= len(keys):
        raise ValueError(f"nearest: k must lie in [1, {len(keys)}], the number of keys, got {k}")
    (queries,) = to_float(queries)
    score = queries.new_zeros(len(queries), 0)
    index = torch.zeros(len(queries), 0, dtype=torch.long, device=queries.device)
    for start in range(0, len(keys), block):
        part = keys[start : start + block].to(queries)
        of_part = part.square().sum(1) - 2 * queries @ part.T
        best, place = of_part.topk(min(k, len(part)), dim=1, largest=False)
        score, index = torch.cat([score, best], 1), torch.cat([index, place + start], 1)
        score, kept = score.topk(min(k, score.shape[1]), dim=1, largest=False)
        index = index.gather(1, kept)
    squared, order = squared_distance(queries, keys, index).sort(dim=1, stable=True)
    return squared, index.gather(1, order)


def squared_distance(queries: Tensor, keys: Tensor, index: Tensor) -> Tensor:
    """d² of each query to the keys that index, (R, k), names for it: (R, k)."""
    (queries,) = to_float(queries)
    picked = keys[index.flatten().to(keys.device)].to(queries).view(*index.shape, -1)
    return (picked - queries.unsqueeze(1)).square().sum(-1)


def knn_prob(squared: Tensor, values: Tensor, vocab: int, *, temperature: float) -> Tensor:
    """The distribution of the next token that the neighbours say, (R, V).

        p(v) = sum over neighbours with value v of exp(-d²/temperature), over the same sum of all neighbours

    squared: (R, k), their d².   values: (R, k) int64, the token that came behind each.
    """
    weight = _weight(squared, temperature)
    return weight.new_zeros(len(weight), vocab).scatter_add(1, values, weight)


def knn_label_prob(squared: Tensor, values: Tensor, labels: Tensor, *, temperature: float) -> Tensor:
    """`knn_prob` at the labels, (R,) int64, without the rest of it: (R,)."""
    return (_weight(squared, temperature) * (values == labels.unsqueeze(1))).sum(1)


def mixed_logprob(logprob: Tensor, prob: Tensor, lam: float) -> Tensor:
    """log((1 - lam) exp(logprob) + lam prob), of tensors of one shape; lam in [0, 1], at 0 exactly `logprob`."""
    if not 0 <= lam <= 1:
        raise ValueError(f"mixed_logprob: lam must lie in [0, 1], got {lam}")
    logprob, prob = to_float(logprob, prob)
    if lam == 0:
        return logprob
    remembered = prob.log() + math.log(lam)
    return remembered if lam == 1 else torch.logaddexp(logprob + math.log1p(-lam), remembered)


def _weight(squared: Tensor, temperature: float) -> Tensor:
    """(R, k), which sum to 1 in each row."""
    if not temperature > 0:
        raise ValueError(f"temperature must be > 0, got {temperature}")
    return (-squared / temperature).softmax(1)
