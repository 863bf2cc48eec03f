"""The best of several responses."""

import math
from dataclasses import dataclass, replace

import torch

from hybrid.rollout.asked import Asked
from hybrid.rollout.decoder import register_decoder
from hybrid.rollout.judging import JudgingDecoder
from hybrid.rollout.responses import Responses
from hybrid.rollout.sampling import SamplingConfig

__all__ = ["BestOfN"]


@register_decoder("best_of_n")
@dataclass(frozen=True, kw_only=True)
class BestOfN(JudgingDecoder):
    """The one of `n` drawn responses that is worth most, by a reward or the value head; of equals the first.

        P(y) = p(y) / P(r = r(y)) * (P(r <= r(y))^n - P(r < r(y))^n)

    Its KL to the sampler is at most kl_bound = log n - (n - 1) / n nats a response.
    Source: of the bound Beirami et al. 2024 (arXiv:2401.01879).
    """

    n: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least(2, "n")

    def check_sampling(self, sampling: SamplingConfig) -> None:
        self._needs_chance(sampling)

    def answers(self, asked: Asked) -> Responses:
        times = asked.repeats * self.n
        drawn = asked.drawn(times)
        worth = self.worth(asked, asked.numbers(times), drawn.widened(asked.width, pad_id=asked.pad_id))
        best = worth.view(-1, self.n).argmax(1) + self.n * torch.arange(len(worth) // self.n, device=worth.device)
        metrics = {"kl_bound": math.log(self.n) - (self.n - 1) / self.n}
        return replace(drawn.of(best), metrics=metrics).trimmed()
