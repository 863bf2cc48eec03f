"""The losses of preferences: reward models (Bradley-Terry), DPO and its family of pairs, KTO of single responses.

A pair's log-probs are sums over the response's tokens, or means where `PER_TOKEN` says so; `B` pairs or responses.
"""

import difflib
import math
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from hybrid.functional.precision import check_same_shape, to_float

__all__ = ["PER_TOKEN", "REFERENCE_FREE", "PreferenceKind", "bradley_terry_loss", "dpo_loss", "kto_loss", "wins"]

PreferenceKind = Literal["sigmoid", "robust", "hinge", "ipo", "apo_zero", "apo_down", "sppo", "exo", "simpo", "orpo"]
# Kinds whose method holds no reference model.
REFERENCE_FREE: frozenset[str] = frozenset({"simpo", "orpo"})
# Kinds whose method takes each response's mean log-prob per token. The caller passes the means.
PER_TOKEN: frozenset[str] = frozenset({"ipo", "simpo", "orpo"})

_SMOOTHED = frozenset({"sigmoid", "robust", "exo", "simpo"})  # kinds that use label_smoothing
_WITH_MARGIN = frozenset({"sigmoid", "simpo"})


def bradley_terry_loss(
    chosen: Tensor,
    rejected: Tensor,
    *,
    margin: Tensor | None = None,
    center_coef: float = 0.0,
    weight: Tensor | None = None,
    num_pairs: float | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The negative log-likelihood of the preferences under a reward model.

        loss = sum_i w_i (-log sigmoid(c_i - r_i - margin_i) + center_coef (c_i + r_i)²) / num_pairs

    chosen, rejected: (B,), the scores c and r.   margin: (B,), by how much the chosen one is to be better; 0 where
        None.   weight: (B,), each pair's; 1 where None.
    center_coef: pulls the scores to mean 0, which the likelihood leaves open.
    num_pairs: the global sum of the weights where these pairs are part of a larger step. None: these are the whole.
    Returns `(loss, metrics)`: a scalar, 0 without a pair, and over these pairs, weighted and detached: accuracy
    (c > r; a tie counts half) and margin_mean (of c - r).
    Raises ValueError for different shapes and a negative center_coef.
    Source: Christiano et al. 2017 (arXiv:1706.03741); margin: Llama 2 (arXiv:2307.09288); centring: Eisenstein et al.
    2023 (arXiv:2312.09244).
    """
    given = {"chosen": chosen, "rejected": rejected, "margin": margin, "weight": weight}
    check_same_shape(**{name: x for name, x in given.items() if x is not None})
    if not center_coef >= 0:
        raise ValueError(f"bradley_terry_loss: center_coef must be >= 0, got {center_coef}")
    chosen, rejected, weight = to_float(chosen, rejected, torch.ones_like(chosen) if weight is None else weight)
    difference = chosen - rejected
    loss = -logsigmoid(difference if margin is None else difference - margin.detach())
    if center_coef:
        loss = loss + center_coef * (chosen + rejected) ** 2
    return _weighted_sum(loss, weight, num_pairs), _pair_metrics(difference, weight)


def dpo_loss(
    chosen_logprob: Tensor,
    rejected_logprob: Tensor,
    ref_chosen_logprob: Tensor | None,
    ref_rejected_logprob: Tensor | None,
    *,
    beta: float = 0.1,
    kind: PreferenceKind = "sigmoid",
    label_smoothing: float = 0.0,
    margin: float | Tensor = 0.0,
    weight: Tensor | None = None,
    num_pairs: float | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Direct preference optimisation and its family: sum_i weight_i loss_i / num_pairs.

    With a and b the log-ratios of chosen and rejected, log-prob - reference's, d = a - b, e = label_smoothing:
        sigmoid   -(1-e) log s(beta d - margin) - e log s(-beta d + margin)    DPO, arXiv:2305.18290; e > 0: cDPO
        robust    (-(1-e) log s(beta d) + e log s(-beta d)) / (1 - 2e)         arXiv:2403.00409
        hinge     max(0, 1 - beta d)                                           SLiC, arXiv:2305.10425
        ipo       (d - 1 / (2 beta))²                                          arXiv:2310.12036
        apo_zero  1 - s(beta a) + s(beta b)                                    arXiv:2408.06266
        apo_down  1 + s(beta a) - s(beta d)                                    arXiv:2408.06266
        sppo      (a - 1 / (2 beta))² + (b + 1 / (2 beta))²                    arXiv:2405.00675, the winner's P = 1
        exo       KL((s(beta d), s(-beta d)) || (1-e, e))                      arXiv:2402.00856; e > 0, theirs 1e-3
    and of the log-probs alone, a = chosen's and b = rejected's:
        simpo     as sigmoid                                                   arXiv:2405.14734; margin: their gamma
        orpo      -beta log s(o(a) - o(b)), o(x) = x - log(1 - exp(x))         arXiv:2403.07691; beta: their lambda;
                                                                               their SFT term is another loss's
    where s is the sigmoid (cDPO: Mitchell 2023, ericmitchell.ai/cdpo.pdf).

    chosen_logprob, rejected_logprob, ref_chosen_logprob, ref_rejected_logprob: (B,), sums over the response's tokens,
        means where the kind is in `PER_TOKEN`. The reference's get no gradient; kinds in `REFERENCE_FREE` do not read
        them.
    beta: > 0.   label_smoothing: in [0, 0.5), the chance that a pair's label is flipped.   margin: a number or (B,),
        how much better the chosen one is to be, in units of reward.   weight, num_pairs: as in `bradley_terry_loss`.
    Returns `(loss, metrics)`: a scalar, 0 without a pair, and over these pairs, weighted and detached: chosen_reward
    (beta a), rejected_reward (beta b), margin_mean (of their difference), accuracy (it is > 0; a tie counts half).
    Raises ValueError for an unknown kind, different shapes, numbers out of range, a reference that is missing, and a
    label_smoothing or margin that the kind does not use.
    """
    _check_pair_options(kind, beta, label_smoothing, margin)
    given = {"chosen_logprob": chosen_logprob, "rejected_logprob": rejected_logprob, "weight": weight}
    if isinstance(margin, Tensor) and margin.dim():
        given["margin"] = margin
    if kind in REFERENCE_FREE:
        ref_chosen_logprob, ref_rejected_logprob = torch.zeros_like(chosen_logprob), torch.zeros_like(rejected_logprob)
    if ref_chosen_logprob is None or ref_rejected_logprob is None:
        raise ValueError(
            f"dpo_loss: kind {kind!r} needs ref_chosen_logprob and ref_rejected_logprob; without a reference: "
            + ", ".join(sorted(REFERENCE_FREE))
        )
    given |= {"ref_chosen_logprob": ref_chosen_logprob, "ref_rejected_logprob": ref_rejected_logprob}
    check_same_shape(**{name: x for name, x in given.items() if x is not None})
    chosen, rejected, ref_chosen, ref_rejected, weight = to_float(
        chosen_logprob,
        rejected_logprob,
        ref_chosen_logprob.detach(),
        ref_rejected_logprob.detach(),
        torch.ones_like(chosen_logprob) if weight is None else weight,
    )
    a, b = chosen - ref_chosen, rejected - ref_rejected
    if isinstance(margin, Tensor):
        margin = margin.detach()
    loss = _pair_loss(kind, a, b, beta, label_smoothing, margin)
    with torch.no_grad():
        rewards = {"chosen_reward": beta * a, "rejected_reward": beta * b}
        metrics = {name: _weighted_sum(x, weight, None) for name, x in rewards.items()}
    return _weighted_sum(loss, weight, num_pairs), {**metrics, **_pair_metrics(beta * (a - b), weight)}


def _pair_loss(kind: str, a: Tensor, b: Tensor, beta: float, smoothing: float, margin: float | Tensor) -> Tensor:
    """(B,), by the table of `dpo_loss`."""
    d = beta * (a - b)
    if kind in ("sigmoid", "simpo"):
        d = d - margin
        return -(1 - smoothing) * logsigmoid(d) - smoothing * logsigmoid(-d)
    if kind == "robust":
        return (smoothing * logsigmoid(-d) - (1 - smoothing) * logsigmoid(d)) / (1 - 2 * smoothing)
    if kind == "hinge":
        return (1 - d).clamp(min=0)
    if kind == "ipo":
        return (a - b - 0.5 / beta) ** 2
    if kind == "apo_zero":
        # 1 - s(x) is s(-x), which keeps its digits for a large x.
        return torch.sigmoid(-beta * a) + torch.sigmoid(beta * b)
    if kind == "apo_down":
        return torch.sigmoid(beta * a) + torch.sigmoid(-d)
    if kind == "sppo":
        return (a - 0.5 / beta) ** 2 + (b + 0.5 / beta) ** 2
    if kind == "exo":
        kept, flipped = logsigmoid(d) - math.log1p(-smoothing), logsigmoid(-d) - math.log(smoothing)
        return torch.sigmoid(d) * kept + torch.sigmoid(-d) * flipped
    return -beta * logsigmoid(_log_odds(a) - _log_odds(b))


def _log_odds(logprob: Tensor) -> Tensor:
    """log(p / (1 - p)) of p = exp(logprob), finite at p = 1: there p is taken to be the next number below."""
    logprob = logprob.clamp(max=-torch.finfo(logprob.dtype).eps)
    return logprob - torch.log(-torch.expm1(logprob))


def kto_loss(
    logprob: Tensor,
    ref_logprob: Tensor,
    label: Tensor,
    kl: Tensor | float,
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    num_examples: int | None = None,
    desirable_share: float | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Kahneman-Tversky optimisation, of responses that are each good or bad on their own.

        r = logprob - ref_logprob,   z = max(kl, 0)
        loss_i = desirable_weight   (1 - sigmoid(beta (r_i - z)))    where label is true
                 undesirable_weight (1 - sigmoid(beta (z - r_i)))    where it is false
        loss   = sum_i loss_i / num_examples

    logprob, ref_logprob: (B,), sums over the response's tokens.   label: (B,) bool, whether it is desirable.
    kl: a scalar, the estimate of KL(policy || reference) for a whole response, the same for all of a step. It gets no
        gradient, nor does ref_logprob.
    num_examples: the global count where these rows are part of a larger step. None: these are the whole.
    desirable_share: the share of desirable rows in that step; None: in these rows.
    Returns `(loss, metrics)`: a scalar, 0 without a row, and over these rows, detached: accuracy (r - z has the
    label's sign; a tie counts half), desirable_reward and undesirable_reward (the means of beta r over the rows of
    either label, 0 where there is none) and kl (z). Given the step's desirable_share, the two rewards of a part are
    its rows' contributions to the step's means: averaged over the parts by their rows they are exactly those.
    Raises ValueError for different shapes, a kl that is no scalar, and numbers out of range.
    Source: Ethayarajh et al. 2024 (arXiv:2402.01306).
    """
    check_same_shape(logprob=logprob, ref_logprob=ref_logprob, label=label)
    _check_kto_options(beta, desirable_weight, undesirable_weight, desirable_share)
    logprob, ref_logprob = to_float(logprob, ref_logprob.detach())
    z = torch.as_tensor(kl, dtype=logprob.dtype, device=logprob.device).detach().clamp(min=0)
    if z.dim():
        raise ValueError(f"kto_loss: kl must be a scalar, one estimate for all rows, got shape {tuple(z.shape)}")
    good = label.bool().to(logprob.dtype)
    ratio, sign = logprob - ref_logprob, 2 * good - 1
    gain = sign * (ratio - z)
    weight = desirable_weight * good + undesirable_weight * (1 - good)
    if num_examples is None:
        num_examples = label.numel()
    # sigmoid(-x) is 1 - sigmoid(x) without the cancellation where x is large.
    loss = _weighted_sum(torch.sigmoid(-beta * gain), weight, num_examples)
    with torch.no_grad():
        one = torch.ones_like(good)
        share = _weighted_sum(good, one, None) if desirable_share is None else good.new_tensor(desirable_share)
        metrics = {"accuracy": _weighted_sum(wins(gain), one, None), "kl": z}
        for name, rows, of_all in (("desirable_reward", good, share), ("undesirable_reward", 1 - good, 1 - share)):
            metrics[name] = _weighted_sum(beta * ratio * rows, one, None) / of_all.masked_fill(of_all <= 0, 1.0)
    return loss, metrics


def _weighted_sum(x: Tensor, weight: Tensor, divisor: float | None) -> Tensor:
    """sum_i weight_i x_i / divisor; None: the sum of the weights. A divisor of 0 divides by 1: there is no row."""
    weight = weight.detach()
    total = (weight * x).sum()
    if divisor is not None:
        return total / (divisor if divisor > 0 else 1.0)
    count = weight.sum()
    return total / count.masked_fill(count <= 0, 1.0)


@torch.no_grad()
def _pair_metrics(difference: Tensor, weight: Tensor) -> dict[str, Tensor]:
    return {
        "accuracy": _weighted_sum(wins(difference), weight, None),
        "margin_mean": _weighted_sum(difference, weight, None),
    }


def wins(difference: Tensor) -> Tensor:
    """1 where it is positive, 1/2 where it is 0, else 0."""
    return 0.5 * (1 + difference.sign())


def _check_pair_options(kind: str, beta: float, label_smoothing: float, margin: float | Tensor) -> None:
    kinds = get_args(PreferenceKind)
    if kind not in kinds:
        near = difflib.get_close_matches(str(kind), kinds, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise ValueError(f"dpo_loss: kind must be one of {', '.join(kinds)}, got {kind!r}{hint}")
    if not beta > 0:
        raise ValueError(f"dpo_loss: beta must be > 0, got {beta}")
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"dpo_loss: label_smoothing must lie in [0, 0.5), got {label_smoothing}")
    if kind == "exo" and not label_smoothing:
        raise ValueError("dpo_loss: kind 'exo' needs a label_smoothing > 0, for example the paper's 1e-3, got 0")
    if label_smoothing and kind not in _SMOOTHED:
        raise ValueError(
            f"dpo_loss: kind {kind!r} has no label_smoothing, got {label_smoothing}; "
            f"those that have: {', '.join(sorted(_SMOOTHED))}"
        )
    if kind not in _WITH_MARGIN and bool(torch.as_tensor(margin).any()):
        raise ValueError(
            f"dpo_loss: kind {kind!r} has no margin, got {margin}; those that have: {', '.join(sorted(_WITH_MARGIN))}"
        )


def _check_kto_options(beta: float, desirable: float, undesirable: float, share: float | None) -> None:
    if not beta > 0:
        raise ValueError(f"kto_loss: beta must be > 0, got {beta}")
    for name, number in (("desirable_weight", desirable), ("undesirable_weight", undesirable)):
        if not number >= 0:
            raise ValueError(f"kto_loss: {name} must be >= 0, got {number}")
    if share is not None and not 0 <= share <= 1:
        raise ValueError(f"kto_loss: desirable_share must lie in [0, 1], got {share}")
