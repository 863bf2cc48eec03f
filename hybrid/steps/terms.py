"""The two losses as terms of an update: each with its own mode, divisor and microbatches."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

from hybrid.core import Batch, InputError, Rollout
from hybrid.models import Policy
from hybrid.steps.accumulate import Loss, Term
from hybrid.steps.ppo import Divisors, ppo_batch_loss
from hybrid.steps.ppo_config import PPOConfig
from hybrid.steps.sft import SFTConfig, sft_batch_loss

__all__ = ["ppo_term", "sft_term"]

Autocast = Callable[[], AbstractContextManager[Any]]


def sft_term(
    policy: Policy, batch: Batch, config: SFTConfig, coef: float = 1.0, *, autocast: Autocast = nullcontext
) -> Term[Batch]:
    """coef * L_SFT of the batch, with dropout. Raises InputError where no token of it is trained."""
    if not batch.num_tokens:
        raise InputError("a supervised step: the batch has no target token to train on")
    loss_of = partial(sft_batch_loss, policy, config=config, num_tokens=batch.num_tokens)
    # A strategy may hand over more examples than a batch of the data has.
    size = config.microbatch_size or config.batch_size
    return Term("sft", batch, _run_in(policy, loss_of, True, autocast), coef, size)


def ppo_term(
    policy: Policy,
    minibatch: Rollout,
    config: PPOConfig,
    coef: float = 1.0,
    *,
    kl_loss_coef: float = 0.0,
    kl_kind: str = "k3",
    autocast: Autocast = nullcontext,
) -> Term[Rollout]:
    """coef * L_PPO of the minibatch, without dropout: the ratios compare log-probs."""
    divisors = Divisors.of(minibatch, config)
    loss_of = partial(
        ppo_batch_loss, policy, config=config, kl_loss_coef=kl_loss_coef, kl_kind=kl_kind, divisors=divisors
    )
    return Term("ppo", minibatch, _run_in(policy, loss_of, False, autocast), coef, config.microbatch_size)


def _run_in(policy: Policy, loss_of: Callable[..., Loss], train: bool, autocast: Autocast) -> Callable[..., Loss]:
    def loss(rows: Batch | Rollout) -> Loss:
        policy.train(train)
        with autocast():
            return loss_of(rows)

    return loss
