"""Batched sampling from a policy."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hybrid.core import InputError, RunStopped
from hybrid.models import Backbone

__all__ = ["Responses", "SamplingConfig", "sample"]


@dataclass(frozen=True)
class SamplingConfig:
    """How responses are drawn.

    PPO's ratios use the softmax at `temperature` over the whole vocabulary. top_k, top_p and min_new_tokens draw
    from less than that, so with them the ratio is no longer that of the sampled distribution: they are off by
    default. `PPOConfig.importance` corrects for them.
    """

    max_new_tokens: int = 32
    min_new_tokens: int = 0  # EOS cannot be drawn before the response has this many tokens
    temperature: float = 1.0  # 0: the likeliest token (for generate; PPO needs > 0)
    top_k: int = 0  # draw from the k likeliest tokens; 0: all
    top_p: float = 1.0  # draw from the smallest set of tokens with this much probability; 1: all
    stop: tuple[str, ...] = ()  # texts that end a response, as EOS does; rewards read what stands before them

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"SamplingConfig.max_new_tokens must be >= 1, got {self.max_new_tokens}")
        if not 0 <= self.min_new_tokens <= self.max_new_tokens:
            raise ValueError(
                f"SamplingConfig.min_new_tokens must lie in [0, max_new_tokens = {self.max_new_tokens}], "
                f"got {self.min_new_tokens}"
            )
        if not self.temperature >= 0:
            raise ValueError(f"SamplingConfig.temperature must be >= 0, got {self.temperature}")
        if self.top_k < 0:
            raise ValueError(f"SamplingConfig.top_k must be >= 0, got {self.top_k}")
        if isinstance(self.stop, str) or not all(isinstance(text, str) and text for text in self.stop):
            raise ValueError(f"SamplingConfig.stop must be a list of texts that are not empty, got {self.stop!r}")
        object.__setattr__(self, "stop", tuple(self.stop))
        if not 0 < self.top_p <= 1:
            raise ValueError(f"SamplingConfig.top_p must lie in (0, 1], got {self.top_p}")

    @property
    def is_truncated(self) -> bool:
        """Whether less than the whole distribution is drawn from."""
        return bool(self.top_k or self.top_p < 1 or self.min_new_tokens)

    def check_room(self, num_tokens: int, context: int | None, *, prompt: str = "") -> None:
        """Raise InputError where a prompt of so many tokens leaves no room to answer in the model's context."""
        if context is not None and num_tokens + self.max_new_tokens > context:
            raise InputError(
                f"a prompt of {num_tokens} tokens leaves no room for sampling.max_new_tokens = {self.max_new_tokens} "
                f"in the model's context of {context}; lower max_new_tokens or data.max_length"
                + (f". The prompt: {prompt[:60]!r}" if prompt else "")
            )


@dataclass(frozen=True)
class Responses:
    """ids: (B, T) int64, right-padded.   mask: (B, T) bool, up to and including the first EOS, or the token that
        completes a stop string.
    ended: (B,) bool, whether one of these came.
    logprob: (B, T) float32, of each token under the very distribution it was drawn from, 0 outside the mask; None
        where that is not known."""

    ids: Tensor
    mask: Tensor
    ended: Tensor
    logprob: Tensor | None = None

    def of(self, rows: Sequence[int]) -> "Responses":
        """Some of the rows."""
        logprob = None if self.logprob is None else self.logprob[rows]
        return Responses(self.ids[rows], self.mask[rows], self.ended[rows], logprob)


@torch.no_grad()
def sample(
    backbone: Backbone,
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    config: SamplingConfig,
    *,
    eos_ids: Sequence[int],
    pad_id: int = 0,
    generator: torch.Generator | None = None,
    is_over: Callable[[Sequence[int]], bool] | None = None,
) -> Responses:
    """Draw one response for each prompt.

    prompt_ids, prompt_mask: (B, P), left-padded.   eos_ids: any of these ends a response.
    pad_id: what fills the rows that have ended; it may be a real token or EOS itself, for the mask is kept
        by what happened, never by comparing ids with it.
    generator: on the backbone's device; None draws from torch's global one.
    is_over: whether a response ends with the last of its ids so far (`stop_rule`), beside those that EOS ends.
    The caller switches dropout off (`policy.eval()`).
    Raises RunStopped where the logits are not finite.
    """
    eos = torch.tensor(sorted(set(eos_ids)), device=prompt_ids.device)
    mask, cache, new = prompt_mask.bool(), None, prompt_ids
    running = torch.ones(len(prompt_ids), dtype=torch.bool, device=prompt_ids.device)
    ids: list[Tensor] = []
    masks: list[Tensor] = []
    logprobs: list[Tensor] = []
    for position in range(config.max_new_tokens):
        logits, cache = backbone.next_logits(new, mask, cache)
        # The maximum is NaN where a logit is.
        if not logits.amax(-1).isfinite().all():
            raise RunStopped(
                f"the policy's logits are not finite at token {position + 1} of its responses: its weights have "
                "diverged. Lower optimizer.lr"
            )
        if position < config.min_new_tokens:
            logits[:, eos] = -torch.inf
        token, logprob = _draw(logits, config, generator)
        ids.append(torch.where(running, token, pad_id))
        masks.append(running)
        logprobs.append(torch.where(running, logprob, 0.0))
        running = running & ~torch.isin(token, eos)
        if is_over is not None:
            so_far = torch.stack(ids, 1).tolist()
            over = [going and is_over(row) for going, row in zip(running.tolist(), so_far, strict=True)]
            running = running & ~torch.tensor(over, device=running.device)
        if not running.any():
            break
        # A row that has ended goes on as attended padding: nothing reads what it computes.
        new = ids[-1].unsqueeze(1)
        mask = torch.cat([mask, torch.ones_like(new, dtype=torch.bool)], 1)
    return Responses(torch.stack(ids, 1), torch.stack(masks, 1), ~running, torch.stack(logprobs, 1))


def _draw(logits: Tensor, config: SamplingConfig, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """One token a row and its log-prob, (B, V) -> (B,) each; a greedy token is certain, its log-prob 0."""
    if config.temperature == 0:
        return logits.argmax(-1), logits.new_zeros(len(logits))
    logits = logits / config.temperature
    if 0 < config.top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(config.top_k).values[:, -1:], -torch.inf)
    if config.top_p < 1:
        ordered, index = logits.sort(descending=True)
        probs = ordered.softmax(-1)
        # Keep a token while the ones before it hold less than top_p: the likeliest is always kept.
        outside = probs.cumsum(-1) - probs >= config.top_p
        logits = logits.masked_fill(outside.scatter(1, index, outside), -torch.inf)
    probs = logits.softmax(-1)
    token = torch.multinomial(probs, 1, generator=generator)
    return token.squeeze(1), probs.gather(1, token).log().squeeze(1)
