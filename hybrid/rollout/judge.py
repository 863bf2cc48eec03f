"""What rewards read of responses, and what they say of them."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hybrid.core import Encoded
from hybrid.distributed import ALONE, World
from hybrid.rewards import Reward, RewardOutput
from hybrid.rollout.responses import Responses
from hybrid.rollout.sampling import SamplingConfig
from hybrid.rollout.stop import before_stop

__all__ = ["Judge", "judged", "response_texts"]


class Judge:
    """A reward's word on candidates, whole responses or their beginnings, which leaves its state as it was."""

    def __init__(self, reward: Reward, tokenizer: Any, sampling: SamplingConfig, world: World = ALONE):
        self.reward, self.tokenizer, self.sampling, self.world = reward, tokenizer, sampling, world

    def __call__(self, examples: Sequence[Encoded], candidates: Responses) -> Tensor:
        """(B,) float64, of each candidate for its example; -inf where the reward skips it."""
        scores = self.world.once(lambda: self._scores(examples, candidates))
        return torch.tensor(scores, dtype=torch.float64).nan_to_num(nan=-torch.inf)

    def _scores(self, examples: Sequence[Encoded], candidates: Responses) -> RewardOutput:
        state = self.reward.state_dict()
        try:
            return judged(self.reward, examples, candidates, self.tokenizer, self.sampling)[1]
        finally:
            self.reward.load_state_dict(state)


def judged(
    reward: Reward, examples: Sequence[Encoded], responses: Responses, tokenizer: Any, sampling: SamplingConfig
) -> tuple[list[str], RewardOutput]:
    """The responses as texts, behind the hints of their examples, and their scores."""
    hints = [e.prompt_ids[len(e.prompt_ids) - e.num_hint :] for e in examples]
    texts = response_texts(tokenizer, responses, hints, stop=sampling.stop)
    reward.before_score(examples, sampling)
    # A bare prompt comes from no row, and so has no target; a row's may be the empty text.
    targets = [e.target if e.target or e.item else None for e in examples]
    return texts, reward.score(texts, targets, [e.prompt for e in examples], [e.item for e in examples])


def response_texts(
    tokenizer: Any,
    responses: Responses,
    hints: Sequence[Sequence[int]] | None = None,
    *,
    stop: Sequence[str] = (),
) -> list[str]:
    """What the rewards read: each response, behind its hint where hints are given, without padding and specials.

    hints: ids, one list for each response, decoded together with it.   stop: a text ends before any of these.
    """
    rows = [ids[mask].tolist() for ids, mask in zip(responses.ids, responses.mask, strict=True)]
    fronts = [[]] * len(rows) if hints is None else hints
    texts: list[str] = tokenizer.batch_decode(
        [[*f, *row] for f, row in zip(fronts, rows, strict=True)], skip_special_tokens=True
    )
    if not stop:
        return texts
    begins = [len(text) for text in tokenizer.batch_decode(fronts, skip_special_tokens=True)]
    return [before_stop(text, stop, begin) for text, begin in zip(texts, begins, strict=True)]
