"""Block by block, the best of several continuations."""

from dataclasses import dataclass

import torch

from hybrid.rollout.asked import Asked
from hybrid.rollout.decoder import register_decoder
from hybrid.rollout.judging import JudgingDecoder
from hybrid.rollout.responses import Responses
from hybrid.rollout.sampling import SamplingConfig

__all__ = ["RewardGuided"]


@register_decoder("reward_guided")
@dataclass(frozen=True, kw_only=True)
class RewardGuided(JudgingDecoder):
    """Of `n` continuations by `block` tokens the one whose text so far is worth most, again and again to the end.

    With a block of `sampling.max_new_tokens` it is best_of_n.
    Source: Mudgal et al. 2024, controlled decoding (arXiv:2310.17022), with the reward of the beginning for its value.
    """

    n: int = 4
    block: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least(2, "n")
        self._at_least(1, "block")

    def check_sampling(self, sampling: SamplingConfig) -> None:
        self._needs_chance(sampling)

    def answers(self, asked: Asked) -> Responses:
        prompts = asked.numbers(asked.repeats)
        rows = Responses.empty(len(prompts), asked.width, pad_id=asked.pad_id, device=asked.device)
        while len(going := (~rows.ended & (rows.lengths < asked.width)).nonzero().squeeze(1)):
            each = going.repeat_interleave(self.n)
            candidates = asked.continued(prompts[each], rows.of(each), rows.lengths[each], limit=self.block)
            worth = self.worth(asked, prompts[each], candidates).view(-1, self.n)
            best = worth.argmax(1) + self.n * torch.arange(len(going), device=worth.device)
            rows = rows.put(going, candidates.of(best))
        return rows.trimmed()
