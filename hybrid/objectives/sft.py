"""Imitation: the cross-entropy of the targets. No optimizer in here."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from hybrid.core import Batch
from hybrid.data import Loader
from hybrid.functional import TokenWeight, masked_mean, sft_loss
from hybrid.models import Policy
from hybrid.objectives.accumulate import Loss
from hybrid.objectives.objective import Objective, Parts, register_objective

__all__ = ["SFT", "SFTConfig", "sft_batch_loss"]


@dataclass(frozen=True)
class SFTConfig:
    """Supervised steps."""

    batch_size: int = 16  # examples of one optimizer step
    microbatch_size: int | None = None  # rows of one forward and backward; None: all
    lr_factor: float = 1.0  # on the optimizer's learning rate; beside other objectives their mean, weighted by coef
    token_weight: TokenWeight = "one"  # see functional.sft_loss
    markov_decay: float = 0.95  # of token_weight "markov", from a token to the one before it
    markov_window: int | None = None  # the last tokens of a row that it tells apart; None: all
    packing: bool = False  # several examples a row, each seeing only itself

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"SFTConfig.batch_size must be >= 1, got {self.batch_size}")
        if self.microbatch_size is not None and self.microbatch_size < 1:
            raise ValueError(f"SFTConfig.microbatch_size must be >= 1, got {self.microbatch_size}")
        if not 0 <= self.lr_factor < math.inf:
            raise ValueError(f"SFTConfig.lr_factor must be >= 0 and finite, got {self.lr_factor}")
        if self.packing and self.token_weight == "markov":
            raise ValueError(
                "SFTConfig.token_weight 'markov' counts a row's tokens, so SFTConfig.packing must be false"
            )
        if not 0 < self.markov_decay <= 1:
            raise ValueError(f"SFTConfig.markov_decay must lie in (0, 1], got {self.markov_decay}")
        if self.markov_window is not None and self.markov_window < 1:
            raise ValueError(f"SFTConfig.markov_window must be >= 1, got {self.markov_window}")


@register_objective("sft")
class SFT(Objective[Batch]):
    """The targets of the training data, with dropout."""

    def __init__(self, parts: Parts, sft: SFTConfig):
        super().__init__(parts)
        self.config, self.lr_factor = sft, sft.lr_factor
        # A strategy may hand over more examples than a batch of the data has.
        self.microbatch_size = sft.microbatch_size or sft.batch_size

    def rows(self) -> Loader:
        return self.parts.loader

    def loss_of(self, whole: Batch) -> Callable[[Batch], Loss]:
        return partial(
            sft_batch_loss, self.parts.policy, config=self.config, num_tokens=whole.num_tokens, told=self._told
        )

    def _told(self, batch: Batch, logprob: Tensor, trained: Tensor) -> None:
        if self.parts.memory is not None:
            self.parts.memory.after_supervised(batch, masked_mean(-logprob.detach(), trained, 1))


def sft_batch_loss(
    policy: Policy,
    batch: Batch,
    config: SFTConfig,
    *,
    num_tokens: int | None = None,
    told: Callable[[Batch, Tensor, Tensor], None] | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Masked cross-entropy of the batch's labels under the policy.

    num_tokens: trained tokens of the whole optimizer step where the batch is a part of it.
    told: is given the batch, its log-probs and which of them are trained, each (B, T-1).
    The value head takes no part, so it gets no gradient: None, not zeros.
    Returns `(loss, metrics)` of `functional.sft_loss`.
    """
    logprob, trained = policy.batch_logprob(batch)
    if told is not None:
        told(batch, logprob, trained)
    return sft_loss(
        logprob,
        trained,
        token_weight=config.token_weight,
        markov_decay=config.markov_decay,
        markov_window=config.markov_window,
        num_tokens=num_tokens,
    )
