"""Metropolis-Hastings over whole responses."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hybrid.rollout.asked import Asked
from hybrid.rollout.decoder import Decoder, register_decoder
from hybrid.rollout.responses import Responses
from hybrid.rollout.sampling import SamplingConfig
from hybrid.rollout.target import Target, log_target, proposal

__all__ = ["MCMC"]


@register_decoder("mcmc")
@dataclass(frozen=True, kw_only=True)
class MCMC(Decoder):
    """The last state of a Markov chain over responses, whose limit is a target that no token-wise sampling reaches.

        power:  pi(y) ~ p(y)^alpha              tilted:  pi(y) ~ p(y) exp(r(y) / beta)
        y' keeps the first c tokens of y, c uniform below its length L; the rest is drawn anew, from q
        accepted with min(1, A),  log A = log pi(y') - log pi(y) + log q(y[c:]) - log q(y'[c:]) + log L - log L'

    p: the policy at sampling.temperature.   q: the sampler, at that temperature times `proposal_temperature` (None:
    1 / alpha of power, 1 of tilted), cut to top_k and top_p, which the target then is too.
    burn_in: steps before the first response of a chain.   steps: those before each response of it, so that the first
    is the state after burn_in + steps.   chains: of one prompt; None: one for each response, all independent.
    block: a chain begins with responses of at most `block` tokens, takes `steps` among these, with the same target for
    what is there of them, grows by as many tokens, and so on up to whole responses, which have the steps above. It is
    a better beginning, the limit is the same; 0: whole responses from the start.
    reward: of tilted, the spec of its own; None: the run's. With blocks it also scores beginnings.
    acceptance_rate: of the steps after burn_in, among whole responses.
    Source: Karan & Du 2025 (arXiv:2510.14901), of power block by block.
    """

    target: Target = "power"
    alpha: float = 4.0
    beta: float = 1.0
    steps: int = 10
    burn_in: int = 0
    block: int = 0
    chains: int | None = None
    proposal_temperature: float | None = None
    reward: Any = None

    def __post_init__(self) -> None:
        self._positive("alpha", "beta", "proposal_temperature")
        self._at_least(1, "steps", "chains")
        self._at_least(0, "burn_in", "block")
        self._reward_is_asked("target", "leave it out, or take 'tilted'")

    @property
    def needs_reward(self) -> bool:
        return self.target == "tilted"

    def check_sampling(self, sampling: SamplingConfig) -> None:
        self._needs_chance(sampling)

    def answers(self, asked: Asked) -> Responses:
        chains = min(self.chains or asked.repeats, asked.repeats)
        each = -(-asked.repeats // chains)
        prompts, q = asked.numbers(chains), proposal(self, asked.sampling)
        *beginnings, whole = [*range(self.block, asked.width, self.block), asked.width] if self.block else [asked.width]
        now = Responses.empty(len(prompts), 0, pad_id=asked.pad_id, device=asked.device)
        for width in beginnings:
            now = self._grown(asked, prompts, now, width, q)
            log_pi = self._log_pi(asked, prompts, now, q)
            for _ in range(self.steps):
                now, log_pi, _ = self._step(asked, prompts, now, log_pi, q)
        now = self._grown(asked, prompts, now, whole, q)
        log_pi = self._log_pi(asked, prompts, now, q)
        kept, accepted = [], []
        for step in range(1, self.burn_in + self.steps * each + 1):
            now, log_pi, taken = self._step(asked, prompts, now, log_pi, q)
            if step > self.burn_in:
                accepted.append(taken.double().mean())
                if (step - self.burn_in) % self.steps == 0:
                    kept.append(now)
        # A chain's responses one behind the other, and as many chains as a prompt has.
        order = torch.arange(each * len(now), device=asked.device).view(each, -1, chains)
        rows = order.permute(1, 2, 0).reshape(len(asked.prompt_ids), -1)[:, : asked.repeats].flatten()
        rate = float(torch.stack(accepted).mean())
        return replace(Responses.joined(kept).of(rows), metrics={"acceptance_rate": rate}).trimmed()

    def _grown(self, asked: Asked, prompts: Tensor, rows: Responses, width: int, q: SamplingConfig) -> Responses:
        """The rows with room for `width` tokens, those that have not ended drawn up to there."""
        rows, going = rows.widened(width, pad_id=asked.pad_id), (~rows.ended).nonzero().squeeze(1)
        if not len(going):
            return rows
        some = rows.of(going)
        return rows.put(going, asked.continued(prompts[going], some, some.lengths, sampling=q))

    def _step(
        self, asked: Asked, prompts: Tensor, now: Responses, log_pi: Tensor, q: SamplingConfig
    ) -> tuple[Responses, Tensor, Tensor]:
        """The next state of each chain, its log pi, and whether it is the one that was proposed: (R,) each."""
        cut = (asked.uniform(len(now)) * now.lengths).long()
        new = asked.continued(prompts, now, cut, sampling=q)
        new_log_pi = self._log_pi(asked, prompts, new, q)
        log_a = new_log_pi - log_pi + _log_q_behind(now, cut) - _log_q_behind(new, cut)
        log_a += _log_cuts(now) - _log_cuts(new)
        # Out of a state without probability, which only a start can be, every step leads.
        taken = (asked.uniform(len(now)).log() < log_a) | (log_pi == -torch.inf)
        return new.where(taken, now), torch.where(taken, new_log_pi, log_pi), taken

    def _log_pi(self, asked: Asked, prompts: Tensor, rows: Responses, q: SamplingConfig) -> Tensor:
        """(R,) float64, up to a constant."""
        found = log_target(self, asked, prompts, rows, q).sum(1)
        return found + asked.score(prompts, rows) / self.beta if self.target == "tilted" else found


def _log_cuts(rows: Responses) -> Tensor:
    """The log of the number of places where each row may be cut, (R,) float64."""
    return rows.lengths.double().log()


def _log_q_behind(rows: Responses, cut: Tensor) -> Tensor:
    """The log-prob that the tokens from `cut` on were drawn with, (R,) float64."""
    assert rows.logprob is not None
    behind = torch.arange(rows.ids.shape[1], device=cut.device) >= cut.unsqueeze(1)
    return (rows.logprob.double() * behind).sum(1)
