"""Distributions over whole responses, and what proposes for them."""

from dataclasses import replace
from typing import Literal, Protocol

from torch import Tensor

from hybrid.rollout.asked import Asked
from hybrid.rollout.responses import Responses
from hybrid.rollout.sampling import SamplingConfig

__all__ = ["Target", "log_target", "proposal"]

Target = Literal["power", "tilted"]


class HasTarget(Protocol):
    """A decoder whose target is p^alpha (power), or p times something that a reward says (tilted)."""

    @property
    def target(self) -> Target: ...

    @property
    def alpha(self) -> float: ...

    @property
    def proposal_temperature(self) -> float | None: ...


def proposal(decoder: HasTarget, sampling: SamplingConfig) -> SamplingConfig:
    """How tokens are proposed: at the sampling's temperature times the decoder's factor."""
    factor = decoder.proposal_temperature
    if factor is None:
        factor = 1 / decoder.alpha if decoder.target == "power" else 1.0
    return replace(sampling.drawing(), temperature=sampling.temperature * factor)


def log_target(decoder: HasTarget, asked: Asked, prompts: Tensor, rows: Responses, drawn_as: SamplingConfig) -> Tensor:
    """Of each token what it adds to the log of the target, without the reward: (R, width) float64.

        alpha * log p(y_t | y_<t) of power, log p(y_t | y_<t) of tilted

    drawn_as: what the tokens were drawn from; where that is p itself, no forward is taken for it.
    """
    assert rows.logprob is not None
    is_p = drawn_as.temperature == asked.sampling.temperature and not drawn_as.is_truncated
    logprob = rows.logprob if is_p else asked.logprob(prompts, rows)
    return logprob.double() * (decoder.alpha if decoder.target == "power" else 1.0)
