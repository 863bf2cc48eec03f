"""How the policy gradients of several rewards lie to each other."""

from collections.abc import Sequence

import torch
from torch import Tensor

from hybrid.core import Batch, Rollout
from hybrid.models import Policy, response_stats

__all__ = ["policy_gram"]


def policy_gram(policy: Policy, sides: Sequence[tuple[Rollout | Batch, Tensor]]) -> Tensor:
    """The inner products of policy gradients, G_ij = <g_i, g_j>, (K, K) float64 on the CPU.

        g_i = grad over the backbone's trained weights of  sum_b A_i[b] sum_t log pi(token t of row b) / N_i

    That is minus the gradient of PPO's surrogate at ratio 1, with one advantage for all tokens of a response.
    sides: of each i rows, and A_i, (B,).   N_i: the rows' valid tokens.   Of a `Batch` the trained tokens count, so
        that A = 1 is the direction in which its cross-entropy falls.
    Dropout is off. Neither .grad nor the policy's mode changes, and no random number is drawn. Sides with the very
    same rows share one forward; there is a backward for each, and K gradients are in memory at once.
    """
    weights = [x for x in policy.backbone.parameters() if x.requires_grad]
    was_training = policy.training
    policy.eval()
    try:
        gradients = _gradients(policy, sides, weights)
    finally:
        policy.train(was_training)
    gram = torch.zeros(len(sides), len(sides), dtype=torch.float64)
    for i, one in enumerate(gradients):
        for j, other in enumerate(gradients[: i + 1]):
            products = [(x.double() * y.double()).sum() for x, y in zip(one, other, strict=True)]
            gram[i, j] = gram[j, i] = torch.stack(products).sum().cpu()
    return gram


def _gradients(
    policy: Policy, sides: Sequence[tuple[Rollout | Batch, Tensor]], weights: Sequence[Tensor]
) -> list[list[Tensor]]:
    gradients: list[list[Tensor]] = []
    of: Rollout | Batch | None = None
    for number, (rows, advantage) in enumerate(sides):
        if rows is not of:
            of, logprob = rows, _row_logprob(policy, rows)
        mean = (advantage.to(logprob) * logprob).sum() / max(rows.num_tokens, 1)
        again = number + 1 < len(sides) and sides[number + 1][0] is rows
        found = torch.autograd.grad(mean, weights, retain_graph=again, allow_unused=True)
        gradients.append([torch.zeros_like(x) if g is None else g for x, g in zip(weights, found, strict=True)])
    return gradients


def _row_logprob(policy: Policy, rows: Rollout | Batch) -> Tensor:
    """The log-prob of each row's valid tokens together, (B,), with gradient."""
    rows = rows.trimmed()
    if isinstance(rows, Batch):
        logprob, _ = policy.batch_logprob(rows)
        return logprob.sum(1)
    out = policy(rows.input_ids, rows.attention_mask, window=rows.window, length=rows.mask.shape[1])
    stats = response_stats(policy.backbone, out.hidden, rows.input_ids, rows.mask, temperature=rows.temperature)
    assert stats.logprob is not None
    return stats.logprob.sum(1)
