"""Batched sampling from a policy."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hybrid.core import RunStopped
from hybrid.models import Backbone
from hybrid.rollout.decode import Decoding, EagerSteps, Ends, FixedSteps, Graphs
from hybrid.rollout.sampling import SamplingConfig

__all__ = ["Responses", "sample"]

# Tokens between two looks at whether any row still goes on: on a GPU a look waits for all that was asked of it.
LOOK_EVERY = 8


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
    repeats: int = 1,
    generator: torch.Generator | None = None,
    is_over: Callable[[Sequence[int]], bool] | None = None,
    graphs: Graphs | None = None,
) -> Responses:
    """Draw `repeats` responses for each prompt, which stand together; the prompt is read once.

    prompt_ids, prompt_mask: (B, P), left-padded.   eos_ids: any of these ends a response.
    pad_id: what fills the rows that have ended; it may be a real token or EOS itself, for the mask is kept
        by what happened, never by comparing ids with it.
    generator: on the backbone's device; None draws from torch's global one. As many numbers are taken from it as the
        responses can need, however soon they end.
    is_over: whether a response ends with the last of its ids so far (`stop_rule`), beside those that EOS ends.
    graphs: decode by steps of fixed shape, which it keeps; None: by a cache that grows. The same numbers to rounding.
    The caller switches dropout off (`policy.eval()`).
    Raises RunStopped where the logits are not finite.
    """
    ends = Ends(eos_ids, pad_id)
    num_rows, seen = len(prompt_ids) * repeats, prompt_ids.shape[1]
    logits, cache = backbone.next_logits(prompt_ids, prompt_mask.bool())
    logits = logits.repeat_interleave(repeats, 0)
    steps: EagerSteps | FixedSteps | None = None
    if graphs is not None:
        steps = graphs.steps(backbone, config, cache, seen, repeats, num_rows, ends)
    if steps is None:
        cache = _for_rows(backbone, prompt_ids, prompt_mask, cache, seen + config.max_new_tokens, repeats)
        state = Decoding(config, ends, num_rows, seen + config.max_new_tokens, prompt_ids.device)
        steps = EagerSteps(backbone, state, cache, seen)
    state = steps.state
    state.begin(prompt_mask.repeat_interleave(repeats, 0), generator)
    state.take(logits)
    every = LOOK_EVERY if prompt_ids.is_cuda and is_over is None else 1
    for count in range(1, config.max_new_tokens + 1):
        if is_over is not None:
            _end(state, count, is_over)
        if count == config.max_new_tokens or (count % every == 0 and not _goes_on(state)):
            break
        steps()
    _check_finite(state)
    length = int(state.taken.sum(1).max())
    # Copies: steps that are kept write the next responses there.
    ids, mask, logprob = (x[:, :length].clone() for x in (state.ids, state.taken, state.logprob))
    return Responses(ids, mask, ~state.running, logprob)


def _for_rows(backbone: Backbone, prompt_ids: Tensor, prompt_mask: Tensor, cache: Any, room: int, repeats: int) -> Any:
    """The prompts' cache with room for what comes, each prompt `repeats` times."""
    from hybrid.models.cache import growing_cache  # here: it loads transformers

    grown = growing_cache(cache, room, repeats)
    if grown is not None or repeats == 1:
        return cache if grown is None else grown
    # A state of another kind cannot be repeated: the prompts are read again, each as often as it is answered.
    rows = (x.repeat_interleave(repeats, 0) for x in (prompt_ids, prompt_mask.bool()))
    return backbone.next_logits(*rows)[1]


def _end(state: Decoding, count: int, is_over: Callable[[Sequence[int]], bool]) -> None:
    """Stop the rows whose ids so far end a response."""
    so_far = state.ids[:, :count].tolist()
    over = [going and is_over(row) for going, row in zip(state.running.tolist(), so_far, strict=True)]
    state.running &= ~torch.tensor(over, device=state.running.device)


def _goes_on(state: Decoding) -> bool:
    _check_finite(state)
    return bool(state.running.any())


def _check_finite(state: Decoding) -> None:
    if (token := int(state.broken_at)) < state.how.max_new_tokens:
        raise RunStopped(
            f"the policy's logits are not finite at token {token + 1} of its responses: its weights have "
            "diverged. Lower optimizer.lr"
        )
