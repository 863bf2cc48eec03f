"""Batched sampling from a policy."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from hybrid.core import RunStopped
from hybrid.models import Backbone
from hybrid.rollout.responses import Responses
from hybrid.rollout.sampling import SamplingConfig
from hybrid.rollout.steps import Decoding, EagerSteps, Ends, FixedSteps, Graphs, Speaker, Steps

__all__ = ["decoded", "sample"]

# Tokens between two looks at whether any row still goes on: on a GPU a look waits for all that was asked of it.
LOOK_EVERY = 8


@torch.no_grad()
def sample(
    backbone: Speaker,
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    config: SamplingConfig,
    *,
    eos_ids: Sequence[int],
    pad_id: int = 0,
    repeats: int = 1,
    generator: torch.Generator | None = None,
    uniform: Tensor | None = None,
    is_over: Callable[[Sequence[int]], bool] | None = None,
    graphs: Graphs | None = None,
    begun: Responses | None = None,
    limit: int | None = None,
) -> Responses:
    """Draw `repeats` responses for each prompt, which stand together; the prompt is read once.

    prompt_ids, prompt_mask: (B, P), left-padded.   eos_ids: any of these ends a response.
    pad_id: what fills the rows that have ended; it may be a real token or EOS itself, for the mask is kept
        by what happened, never by comparing ids with it.
    generator: on the backbone's device; None draws from torch's global one. As many numbers are taken from it as the
        responses can need, however soon they end.
    uniform: these numbers, (max_new_tokens, B * repeats), where they are drawn already.
    is_over: whether a response ends with the last of its ids so far (`stop_rule`), beside those that EOS ends.
    graphs: decode by steps of fixed shape, which it keeps, where a `Backbone` speaks; None: by a cache that grows. The
        same numbers to rounding.
    begun: what each prompt's last tokens are of its response, which is gone on with; what is returned comes after that.
    limit: draw no more tokens than this; None: `config.max_new_tokens`.
    The caller switches dropout off (`policy.eval()`).
    Raises RunStopped where the logits are not finite.
    """
    ends = Ends(eos_ids, pad_id)
    num_rows, seen = len(prompt_ids) * repeats, prompt_ids.shape[1]
    logits, cache = backbone.next_logits(prompt_ids, prompt_mask.bool())
    logits = logits.repeat_interleave(repeats, 0)
    steps: EagerSteps | FixedSteps | None = None
    if graphs is not None and isinstance(backbone, Backbone):
        steps = graphs.steps(backbone, config, cache, seen, repeats, num_rows, ends)
    if steps is None:
        cache = _for_rows(backbone, prompt_ids, prompt_mask, cache, seen + config.max_new_tokens, repeats)
        state = Decoding(config, ends, num_rows, seen + config.max_new_tokens, prompt_ids.device)
        steps = EagerSteps(backbone, state, cache, seen)
    lengths = None if begun is None else begun.lengths
    steps.state.begin(prompt_mask.repeat_interleave(repeats, 0), generator, lengths, uniform)
    return decoded(steps, logits, is_over=is_over, begun=begun, limit=limit)


def decoded(
    steps: Steps,
    logits: Tensor,
    *,
    is_over: Callable[[Sequence[int]], bool] | None = None,
    begun: Responses | None = None,
    limit: int | None = None,
) -> Responses:
    """The responses whose first tokens are drawn from `logits`, (B, V), and whose others `steps` takes.

    steps: behind prompts, its state just begun.   The others: see `sample`.
    """
    state = steps.state
    last = min(limit or state.how.max_new_tokens, state.how.max_new_tokens)
    before = [[]] * len(logits) if begun is None else begun.lists()
    state.take(logits)
    every = LOOK_EVERY if logits.is_cuda and is_over is None else 1
    for count in range(1, last + 1):
        if is_over is not None:
            _end(state, count, is_over, before)
        if count == last or (count % every == 0 and not _goes_on(state)):
            break
        steps()
    _check_finite(state)
    length = int(state.taken.sum(1).max())
    # Copies: steps that are kept write the next responses there.
    ids, mask, logprob = (x[:, :length].clone() for x in (state.ids, state.taken, state.logprob))
    return Responses(ids, mask, ~state.running, logprob)


def _for_rows(backbone: Speaker, prompt_ids: Tensor, prompt_mask: Tensor, cache: Any, room: int, repeats: int) -> Any:
    """The prompts' cache with room for what comes, each prompt `repeats` times."""
    from hybrid.models.cache import growing_cache  # here: it loads transformers

    grown = growing_cache(cache, room, repeats)
    if grown is not None or repeats == 1:
        return cache if grown is None else grown
    # A state of another kind cannot be repeated: the prompts are read again, each as often as it is answered.
    rows = (x.repeat_interleave(repeats, 0) for x in (prompt_ids, prompt_mask.bool()))
    return backbone.next_logits(*rows)[1]


def _end(state: Decoding, count: int, is_over: Callable[[Sequence[int]], bool], before: Sequence[list[int]]) -> None:
    """Stop the rows whose ids so far end a response. before: those of each that were there first."""
    rows = zip(state.running.tolist(), before, state.ids[:, :count].tolist(), strict=True)
    over = [going and is_over(first + row) for going, first, row in rows]
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
