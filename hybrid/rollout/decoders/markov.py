"""A policy that sees the last few tokens only."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hybrid.core import InputError
from hybrid.models import Backbone
from hybrid.rollout.asked import Asked
from hybrid.rollout.decoder import Decoder, register_decoder
from hybrid.rollout.responses import Responses
from hybrid.rollout.sample import decoded
from hybrid.rollout.steps import Decoding, Ends

__all__ = ["Markov"]


@register_decoder("markov")
@dataclass(frozen=True)
class Markov(Decoder):
    """Every token is drawn from the policy given the last `window` tokens, as if nothing stood before them.

        y_t ~ pi(. | the last `window` tokens before t, at positions 0, 1, ...)

    A policy of its own, which PPO and raft train: the log-probs of policy, old policy and references have the same
    window (`windowed`). No keys and values are kept: they would have seen more. A token costs a forward over `window`.
    Where no prompt with its response is longer than `window`, this is `sample`, to the last bit.
    """

    window: int

    is_policy: ClassVar[bool] = True

    def __post_init__(self) -> None:
        self._at_least(1, "window")

    @property
    def policy_window(self) -> int:
        return self.window

    def check_context(self, context: int | None) -> None:
        if context is not None and self.window > context:
            raise InputError(
                f"sampling.decoder.window must be at most the model's context of {context} tokens, got {self.window}"
            )

    def answers(self, asked: Asked) -> Responses:
        seen = int(asked.prompt_mask.sum(1).max())
        if seen + asked.width - 1 <= self.window:
            return asked.drawn(asked.repeats)
        rows = asked.numbers(asked.repeats)
        prompt_ids, prompt_mask = asked.prompt_ids[rows], asked.prompt_mask[rows]
        ends = Ends(asked.eos_ids, asked.pad_id)
        state = Decoding(asked.sampling, ends, len(rows), prompt_ids.shape[1] + asked.width, asked.device)
        steps = _WindowSteps(asked.engine.backbone(), state, prompt_ids, self.window)
        state.begin(prompt_mask, asked.generator)
        return decoded(steps, steps.logits(0), is_over=asked.is_over)


class _WindowSteps:
    """A call is one token more, by a forward over the window behind each row.   ids: (B, P), left-padded prompts."""

    def __init__(self, backbone: Backbone, state: Decoding, ids: Tensor, size: int):
        self.backbone, self.state, self.ids, self.size, self.count = backbone, state, ids, size, 0

    def __call__(self) -> None:
        self.count += 1
        self.state.take(self.logits(self.count))

    def logits(self, count: int) -> Tensor:
        """(B, V), of the token behind the first `count`."""
        ids = torch.cat([self.ids, self.state.ids[:, :count]], 1)[:, -self.size :]
        mask = self.state.mask[:, : self.ids.shape[1] + count][:, -self.size :]
        logits, _ = self.backbone.next_logits(ids, mask)
        return logits
