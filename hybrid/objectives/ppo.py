"""PPO: the loss of a rollout's rows. No optimizer in here."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from hybrid.core import InputError, Rollout
from hybrid.functional import aggregate, importance_weight, kl_estimate, loss_divisor, policy_loss, value_loss
from hybrid.models import Policy, before_response, response_stats
from hybrid.objectives.accumulate import Loss
from hybrid.objectives.earlier import check_staleness, with_stale
from hybrid.objectives.objective import Objective, Parts, register_objective
from hybrid.objectives.ppo_config import PPOConfig
from hybrid.rollout import KLConfig, ScoreConfig

__all__ = ["PPO", "Divisors", "policy_term", "ppo_batch_loss", "weights_of"]


@register_objective("ppo")
class PPO(Objective[Rollout]):
    """The clipped surrogate on a minibatch of the step's rollout, without dropout: the ratios compare log-probs.

    Where the run's memory has a `staleness`, on earlier responses too (`with_stale`), in the same number of updates.
    """

    rolls_out = True
    windowed = True
    dropout = False

    def __init__(self, parts: Parts, ppo: PPOConfig, kl: KLConfig, score: ScoreConfig | None = None):
        super().__init__(parts)
        self.config, self.kl, self.score = ppo, kl, score or ScoreConfig()
        self.lr_factor, self.microbatch_size = ppo.lr_factor, ppo.microbatch_size

    def check(self) -> None:
        check_staleness(self.parts.memory, self.config, self.score)

    def learnt(self, rollout: Rollout) -> Rollout:
        return with_stale(rollout, self.parts, self.config, self.kl, self.score)

    def loss_of(self, whole: Rollout) -> Callable[[Rollout], Loss]:
        return partial(
            ppo_batch_loss,
            self.parts.policy,
            config=self.config,
            kl_loss_coef=self.parts.kl.coef if self.kl.in_loss else 0.0,
            kl_kind=self.kl.kind,
            divisors=self.divisors(whole),
            term=self.policy_term(whole),
        )

    def divisors(self, whole: Rollout) -> "Divisors":
        """What an update's summed losses are divided by."""
        return Divisors.of(whole, self.config)

    def policy_term(self, whole: Rollout) -> "PolicyTerm":
        """What of the loss moves the policy towards the better responses of an update's rows; see `policy_term`."""
        return policy_term


@dataclass(frozen=True)
class Divisors:
    """What the summed losses of one optimizer step are divided by.

    tokens: the tokens that the policy has drawn.   policy: the same, or what the policy loss's aggregation counts
    instead.   given: the tokens of demonstrations.
    """

    tokens: int
    policy: int
    given: int = 0

    @classmethod
    def of(cls, rollout: Rollout, config: PPOConfig) -> "Divisors":
        """Those of a step over all these rows."""
        drawn = rollout.drawn
        if rollout.given is not None:
            drawn = drawn[drawn.any(1)]  # a row that is all given has nothing to count
        tokens = rollout.num_tokens if rollout.given is None else int(drawn.sum())
        policy = loss_divisor(drawn, config.aggregation, config.fixed_length)
        return cls(tokens, policy, rollout.num_tokens - tokens)


# (log-probs (B, T), the rows, the config, the divisors) -> (a summand of the loss, what there is to log of it).
PolicyTerm = Callable[[Tensor, Rollout, PPOConfig, Divisors], Loss]


def ppo_batch_loss(
    policy: Policy,
    rollout: Rollout,
    config: PPOConfig,
    *,
    kl_loss_coef: float = 0.0,
    kl_kind: str = "k3",
    divisors: Divisors | None = None,
    term: PolicyTerm | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of these rows of a rollout that has advantages.

        loss = policy_loss + value_coef * value_loss - entropy_coef * entropy + kl_loss_coef * kl

    Entropy and KL are averaged as the policy's token losses are (`aggregation`), values over tokens. All are of the
    tokens that the policy has drawn (`Rollout.drawn`); term: what stands in place of policy_loss, and sees all tokens.

    The value loss is there where the advantage has a critic; without, the value head gets no gradient.
    kl_loss_coef: the weight of the KL to the references as a loss, of kind k2 or k3; 0 where it is in the
        reward.
    divisors: those of the whole optimizer step, where these rows are a part of it.
    Returns `(loss, metrics)`. Metrics ending in `loss` add up over the parts; the others are token means
    (ratio_max a maximum). The first ratios are exactly 1 for rows that were scored together, if they are `trimmed()`.
    """
    if rollout.advantage is None or (config.has_critic and rollout.return_ is None):
        raise ValueError("ppo_batch_loss: the rollout has no advantages; call with_advantages(rollout, config) first")
    mask, drawn = rollout.mask, rollout.drawn
    divisors = divisors or Divisors.of(rollout, config)
    out = policy(rollout.input_ids, rollout.attention_mask, window=rollout.window, length=mask.shape[1])
    # The entropy's gradient costs a pass over the vocabulary: asked for only where it enters the loss.
    want = ("logprob", "entropy") if config.entropy_coef else ("logprob",)
    stats = response_stats(
        policy.backbone, out.hidden, rollout.input_ids, mask, temperature=rollout.temperature, want=want
    )
    assert stats.logprob is not None
    loss, metrics = (term or policy_term)(stats.logprob, rollout, config, divisors)
    if config.has_critic:
        value_term, metrics["value_clip_fraction"] = _value_term(out.value, rollout, config, divisors)
        loss = loss + config.value_coef * value_term
        metrics["value_loss"] = value_term.detach()
    if stats.entropy is not None:
        entropy = aggregate(stats.entropy, drawn, config.aggregation, num_tokens=divisors.policy)
        loss = loss - config.entropy_coef * entropy
    if kl_loss_coef:
        kl = _kl_to_references(stats.logprob, rollout, kl_kind)
        kl_term = aggregate(kl, drawn, config.aggregation, num_tokens=divisors.policy)
        loss = loss + kl_loss_coef * kl_term
        metrics["kl_loss"] = kl_term.detach()
    return loss, metrics


def policy_term(logprob: Tensor, rollout: Rollout, config: PPOConfig, divisors: Divisors) -> Loss:
    """(the clipped surrogate of the tokens that were drawn, what there is to log of it); logprob: (B, T)."""
    assert rollout.advantage is not None
    weight, weight_metrics = weights_of(rollout, config)
    term, metrics = policy_loss(
        logprob,
        rollout.old_logprob,
        rollout.advantage,
        rollout.drawn,
        clip=config.clip,
        clip_high=config.clip_high,
        dual_clip=config.dual_clip,
        surrogate=config.surrogate,
        ratio=config.ratio,
        weight=weight,
        aggregation=config.aggregation,
        fixed_length=config.fixed_length,
        num_tokens=divisors.policy,
    )
    clip_fraction = metrics.pop("clip_fraction")
    return term, {"policy_loss": term.detach(), "policy_clip_fraction": clip_fraction, **metrics, **weight_metrics}


def _value_term(value: Tensor, rollout: Rollout, config: PPOConfig, divisors: Divisors) -> tuple[Tensor, Tensor]:
    """(the value loss, the share of clipped values); value: (B, P+T)."""
    assert rollout.return_ is not None
    mask = rollout.drawn
    term, metrics = value_loss(
        before_response(value, mask.shape[1]), rollout.old_value, rollout.return_, mask,
        clip=config.value_clip, num_tokens=divisors.tokens,
    )  # fmt: skip
    return term, metrics["clip_fraction"]


def weights_of(rollout: Rollout, config: PPOConfig) -> tuple[Tensor | None, dict[str, Tensor]]:
    """(the weights by `ppo.importance` of the tokens that were drawn, or None; what there is to log of them)."""
    if config.importance is None:
        return None, {}
    if rollout.sampling_logprob is None:
        raise InputError(
            f"ppo.importance {config.importance!r} needs the log-probs that the responses were drawn with, and this "
            f"rollout has no sampling_logprob; give step(logprobs=...), or set ppo.importance=null"
        )
    return importance_weight(
        rollout.old_logprob, rollout.sampling_logprob, rollout.drawn,
        level=config.importance, mode=config.importance_mode, cap=config.importance_cap,
    )  # fmt: skip


def _kl_to_references(logprob: Tensor, rollout: Rollout, kind: str) -> Tensor:
    """The KL to the references, weighted and summed, (B, T)."""
    total = torch.zeros_like(logprob)
    for weight, ref_logprob in zip(rollout.ref_weight, rollout.ref_logprob, strict=True):
        total = total + weight * kl_estimate(logprob, ref_logprob, kind)
    return total
