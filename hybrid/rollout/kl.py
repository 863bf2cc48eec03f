"""How the policy is held close to its references: the estimate, its coefficient, and where it enters."""

import math
from dataclasses import dataclass
from typing import Literal

from hybrid.functional import AdaptiveKL, FixedKL

__all__ = ["KLConfig", "KLKind", "kl_controller"]

KLKind = Literal["k1", "k2", "k3", "full"]


@dataclass(frozen=True)
class KLConfig:
    """The KL penalty."""

    kind: KLKind = "k1"  # see functional.kl_estimate; full: exact, over the whole vocabulary
    coef: float = 0.05  # the coefficient, or its first value where it adapts
    adaptive: bool = False  # steer the coefficient so that the KL meets `target`
    target: float = 6.0  # nats per response
    horizon: float = 10_000  # responses; how slowly the coefficient moves
    in_loss: bool = False  # penalise in the loss instead of in the reward (k2 or k3)
    limit: float | None = None  # nats per response; a run whose KL stays beyond it has diverged, and is stopped
    patience: int = 3  # after so many rollouts in a row beyond `limit`

    def __post_init__(self) -> None:
        if not 0 <= self.coef < math.inf:
            raise ValueError(f"KLConfig.coef must be >= 0 and finite, got {self.coef}")
        for name in ("target", "horizon", "limit"):
            number = getattr(self, name)
            if number is not None and not number > 0:
                raise ValueError(f"KLConfig.{name} must be > 0, got {number}")
        if self.patience < 1:
            raise ValueError(f"KLConfig.patience must be >= 1, got {self.patience}")
        if self.in_loss and self.kind not in ("k2", "k3"):
            # The gradient of k1 on sampled tokens is zero in expectation; full would need the reference's
            # hidden states in every minibatch.
            raise ValueError(f"KLConfig.in_loss needs kind k2 or k3, got {self.kind!r}")


def kl_controller(config: KLConfig) -> FixedKL | AdaptiveKL:
    """The coefficient that the config describes."""
    if config.adaptive:
        return AdaptiveKL(init=config.coef, target=config.target, horizon=config.horizon)
    return FixedKL(config.coef)
