"""Particles that are weighed and resampled while they grow."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hybrid.core import InputError
from hybrid.rollout.asked import Asked
from hybrid.rollout.decoder import register_decoder
from hybrid.rollout.judging import JudgingDecoder
from hybrid.rollout.responses import Responses
from hybrid.rollout.sampling import SamplingConfig
from hybrid.rollout.target import Target, log_target, proposal

__all__ = ["SMC"]


@register_decoder("smc")
@dataclass(frozen=True, kw_only=True)
class SMC(JudgingDecoder):
    """One of `n` particles that grow by `block` tokens, are weighed, and resampled where their weights grow uneven.

        tilted:  pi(y) ~ p(y) exp(r(y) / beta)          power:  pi(y) ~ p(y)^alpha
        w <- w * p^(alpha) / q of the new tokens * psi(y_1:t) / psi(y_1:s)
        resampled where (sum w)^2 / sum w^2 < threshold * n

    psi: of tilted the twist exp(x / beta), x the reward of the beginning (by: reward) or its value (by: value), and
    the reward of a whole response; of power 1.   p, q, proposal_temperature: as `mcmc` has them.
    Every response has particles of its own, of which one is drawn by the weights: exact as n grows.
    ess: the effective sample size at the end, as a share of n.   resampled: how often, in the mean.
    Source: Zhao et al. 2024, twisted SMC (arXiv:2404.17546), with a twist that is given instead of learnt.
    """

    n: int = 16
    block: int = 1
    target: Target = "tilted"
    alpha: float = 4.0
    beta: float = 1.0
    threshold: float = 0.5
    proposal_temperature: float | None = None

    def __post_init__(self) -> None:
        self._reward_is_asked("target", "leave it out, or take 'tilted'")
        if self.target == "power" and self.by == "value":
            raise InputError("by means nothing with target 'power', which asks no value: leave it out")
        self._at_least(2, "n")
        self._at_least(1, "block")
        self._positive("alpha", "beta", "proposal_temperature")
        if not 0 <= self.threshold <= 1:
            raise InputError(f"threshold must lie in [0, 1], got {self.threshold}")

    @property
    def needs_reward(self) -> bool:
        return self.target == "tilted"

    def check_sampling(self, sampling: SamplingConfig) -> None:
        self._needs_chance(sampling)

    def answers(self, asked: Asked) -> Responses:
        prompts, q = asked.numbers(asked.repeats * self.n), proposal(self, asked.sampling)
        rows = Responses.empty(len(prompts), asked.width, pad_id=asked.pad_id, device=asked.device)
        log_w = torch.zeros(len(prompts), dtype=torch.float64, device=asked.device)
        twist, resampled = log_w.clone(), torch.zeros(len(prompts) // self.n, device=asked.device)
        while len(going := (~rows.ended & (rows.lengths < asked.width)).nonzero().squeeze(1)):
            before = rows.lengths[going]
            new = asked.continued(prompts[going], rows.of(going), before, limit=self.block, sampling=q)
            new_twist = self._log_twist(asked, prompts[going], new)
            log_w[going] += self._gain(asked, prompts[going], new, before, q) + new_twist - twist[going]
            twist[going] = new_twist
            rows = rows.put(going, new)
            uneven = _ess(log_w.view(-1, self.n)) < self.threshold * self.n
            unfinished = (~rows.ended & (rows.lengths < asked.width)).view(-1, self.n).any(1)
            if (chosen := uneven & unfinished).any():
                source = _resampled(log_w.view(-1, self.n), asked.uniform(len(chosen), 1))
                source = torch.where(chosen.unsqueeze(1), source, torch.arange(self.n, device=source.device))
                picked = (source + self.n * torch.arange(len(chosen), device=source.device).unsqueeze(1)).flatten()
                rows, twist = rows.of(picked), twist[picked]
                log_w = log_w.view(-1, self.n).masked_fill(chosen.unsqueeze(1), 0.0).flatten()
                resampled += chosen
        log_w = log_w.view(-1, self.n)
        one = torch.searchsorted(_weights(log_w).cumsum(1), asked.uniform(len(log_w), 1), right=True)
        one = one.clamp(max=self.n - 1).squeeze(1) + self.n * torch.arange(len(log_w), device=log_w.device)
        metrics = {"ess": float((_ess(log_w) / self.n).mean()), "resampled": float(resampled.mean())}
        return replace(rows.of(one), metrics=metrics).trimmed()

    def _gain(self, asked: Asked, prompts: Tensor, rows: Responses, before: Tensor, q: SamplingConfig) -> Tensor:
        """log p^alpha / q of the tokens behind the first `before`, (R,) float64."""
        assert rows.logprob is not None
        behind = torch.arange(asked.width, device=before.device) >= before.unsqueeze(1)
        return ((log_target(self, asked, prompts, rows, q) - rows.logprob.double()) * behind).sum(1)

    def _log_twist(self, asked: Asked, prompts: Tensor, rows: Responses) -> Tensor:
        """log psi of each row, (R,) float64."""
        if self.target == "power":
            return torch.zeros(len(rows), dtype=torch.float64, device=asked.device)
        if self.by == "reward":
            return asked.score(prompts, rows) / self.beta
        worth, whole = asked.value(prompts, rows).double(), rows.ended | (rows.lengths == asked.width)
        if whole.any():
            worth[whole] = asked.score(prompts[whole], rows.of(whole))
        return worth / self.beta


def _weights(log_w: Tensor) -> Tensor:
    """(G, n), which sum to 1 in each row; all the same where none has any."""
    top = log_w.amax(1, keepdim=True)
    return torch.where(top == -torch.inf, torch.zeros_like(log_w), log_w).softmax(1)


def _ess(log_w: Tensor) -> Tensor:
    """(G, n) -> (G,): the effective sample size, 1 to n."""
    return 1 / _weights(log_w).square().sum(1)


def _resampled(log_w: Tensor, uniform: Tensor) -> Tensor:
    """(G, n) particles for the places of a row, each as often as its weight says, by systematic resampling.

    uniform: (G, 1).
    """
    n = log_w.shape[1]
    places = (torch.arange(n, device=log_w.device) + uniform) / n
    return torch.searchsorted(_weights(log_w).cumsum(1), places, right=True).clamp(max=n - 1)
