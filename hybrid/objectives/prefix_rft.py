"""Prefix-RFT: responses that begin with a part of the demonstration, which is learnt with them."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hybrid.core import InputError, Rollout
from hybrid.functional import entropy_threshold
from hybrid.memory import Kept
from hybrid.objectives.accumulate import Loss
from hybrid.objectives.advantages import with_advantages
from hybrid.objectives.demonstrations import by_group, examples_of
from hybrid.objectives.earlier import assembled_as, beside, rescored
from hybrid.objectives.luffy import LUFFY
from hybrid.objectives.objective import Parts, register_objective
from hybrid.objectives.ppo import Divisors, PolicyTerm, policy_term
from hybrid.objectives.ppo_config import PPOConfig
from hybrid.rollout import KLConfig, SamplingConfig, ScoreConfig

__all__ = ["PrefixRFT"]


@register_objective("prefix_rft")
class PrefixRFT(LUFFY):
    """`ppo` on responses some of which begin with a hint, where the hint's own tokens are learnt as the response's are.

        A      of all responses of a group, by `ppo.advantage`; the same for a hint and what follows it
        loss = sum over drawn and given tokens of PPO's loss / their number,   A = 0 at a hint's surest tokens

    share: of an update's hint tokens, those with the most entropy before the step's updates; the others count in the
    number alone. Strategy `prefix_rft` gives the hints; where there are none this is `ppo`.
    Source: Huang et al. 2025 (arXiv:2507.01679), as two readers of its appendix and released code describe it: one of 8
    responses is hinted, of whose hint the top 20 % count in a minibatch, the advantages of the others being set to 0.
    There a hint is measured against the responses without one alone, and H is the policy's during the updates.
    """

    def __init__(
        self,
        parts: Parts,
        ppo: PPOConfig,
        kl: KLConfig,
        sampling: SamplingConfig,
        score: ScoreConfig | None = None,
        share: float = 0.2,
    ):
        super().__init__(parts, ppo, kl, sampling, score)
        self.share = share

    @classmethod
    def check_settings(cls, **settings: Any) -> None:
        if not 0 < settings.get("share", 1) <= 1:
            raise InputError(f"share must lie in (0, 1], got {settings['share']}")

    @classmethod
    def check_sections(cls, name: str, sections: Mapping[str, Any]) -> None:
        super().check_sections(name, sections)
        prefixed, number = sections["mixing"].get("prefixed", 1), sections["ppo"].samples_per_prompt
        if prefixed >= number:
            raise InputError(
                f"config: mixing.prefixed must be less than ppo.samples_per_prompt = {number}, got {prefixed}: what a "
                "hint is worth is seen beside responses without one"
            )

    def learnt(self, rollout: Rollout) -> Rollout:
        examples_of(rollout, self.name)
        hints = [example.num_hint for example in rollout.examples]
        hinted, given = [row for row, hint in enumerate(hints) if hint], torch.zeros_like(rollout.mask)
        if not hinted:
            return replace(rollout, given=given)
        rows = [self._whole(rollout, row, hints[row]) for row in hinted]
        assert rollout.group is not None
        device = rollout.group.device
        group = rollout.group[torch.tensor(hinted, device=device)]
        options = assembled_as(self.parts, self.config, self.kl, self.score)
        found = rescored(rows, self.parts, self.parts.references, rollout, group, options)
        columns = torch.arange(found.mask.shape[1], device=device)
        prefix = columns < torch.tensor([hints[row] for row in hinted], device=device).unsqueeze(1)
        # Nobody drew a hint, so there is nothing to correct for.
        sampled = found.sampling_logprob
        sampled = None if sampled is None else torch.where(prefix, found.old_logprob, sampled)
        found = replace(found, given=prefix, sampling_logprob=sampled, advantage=torch.zeros_like(found.reward))
        plain = torch.tensor([row for row, hint in enumerate(hints) if not hint], dtype=torch.int64, device=device)
        others = replace(rollout, given=given)[plain]
        return with_advantages(by_group(beside(others, found, num_groups=0)), self.config)

    def _whole(self, rollout: Rollout, row: int, hint: int) -> Kept:
        """A response with its hint, as the answer to the prompt alone."""
        prompt, mask = rollout.examples[row].prompt_ids, rollout.mask[row]
        own = rollout.input_ids[row, rollout.prompt_length :][mask].tolist()
        drawn = None if rollout.sampling_logprob is None else rollout.sampling_logprob[row][mask].tolist()
        start = len(prompt) - hint
        return Kept(
            prompt=prompt[:start], response=(*prompt[start:], *own),
            logprob=None if drawn is None else (*[0.0] * hint, *drawn),
            score=float(rollout.score[row]), entropy=0.0, step=0, ended=bool(rollout.ended[row]),
        )  # fmt: skip

    def policy_term(self, whole: Rollout) -> PolicyTerm:
        given = torch.zeros_like(whole.mask) if whole.given is None else whole.given
        return partial(_term, least=entropy_threshold(whole.entropy, given, self.share))


def _term(logprob: Tensor, rollout: Rollout, config: PPOConfig, divisors: Divisors, *, least: Tensor) -> Loss:
    assert rollout.given is not None and rollout.advantage is not None
    sure = rollout.given & (rollout.entropy < least)
    # Without `given` all tokens are treated as drawn.
    chosen = replace(rollout, given=None, advantage=rollout.advantage.masked_fill(sure, 0.0))
    loss, _ = policy_term(logprob, chosen, config, divisors)
    # What is logged is of drawn tokens, as everywhere: over these the parts of an update are averaged.
    _, metrics = policy_term(logprob.detach(), rollout, config, divisors)
    return loss, {**metrics, "policy_loss": loss.detach()}
