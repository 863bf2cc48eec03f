"""Prompts answered by a decoder."""

from collections.abc import Sequence
from dataclasses import replace
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

import torch
from torch import Tensor

from hybrid.core import Encoded
from hybrid.data import filler_id, left_pad
from hybrid.rewards import Reward, Unjudged
from hybrid.rollout import decoders
from hybrid.rollout.asked import Asked
from hybrid.rollout.engine import Engine
from hybrid.rollout.judge import Judge
from hybrid.rollout.responses import Responses
from hybrid.rollout.sampling import SamplingConfig
from hybrid.rollout.stop import stop_rule

__all__ = ["respond"]

# A new file in decoders/ is a new decoder: there is no list to add it to.
for _file in iter_modules(decoders.__path__):
    import_module(f"{decoders.__name__}.{_file.name}")


def respond(
    engine: Engine,
    examples: Sequence[Encoded],
    *,
    tokenizer: Any,
    sampling: SamplingConfig,
    generator: torch.Generator | None = None,
    samples_per_prompt: int = 1,
    reward: Reward | None = None,
) -> tuple[Tensor, Tensor, Responses]:
    """Answer the examples' prompts, without dropout: (prompt_ids (B, P), prompt_mask (B, P), responses).

    Each prompt stands there as often as it is answered.
    reward: what decoders that need one judge by; its state stays as it was.
    Raises InputError where the decoder of `sampling` cannot work here.
    """
    backbone, pad_id, decoder = engine.policy.backbone, filler_id(tokenizer), sampling.search
    reward = None if isinstance(reward, Unjudged) else reward
    engine.config.check_sampling(sampling)
    decoder.check_reward(reward)
    decoder.check_context(backbone.context_length)
    decoder.check_tokenizer(tokenizer)
    decoder.check_policy(engine.policy)
    judge = decoder.own_reward or reward
    prompt_ids, prompt_mask = left_pad([e.prompt_ids for e in examples], pad_id=pad_id)
    sampling.check_room(int(prompt_mask.sum(1).max()), backbone.context_length)
    prompt_ids, prompt_mask = prompt_ids.to(backbone.device), prompt_mask.to(backbone.device)
    asked = Asked(
        engine, prompt_ids, prompt_mask.bool(), tuple(examples), sampling,
        eos_ids=tuple(backbone.eos_ids(tokenizer)), pad_id=pad_id, repeats=samples_per_prompt, generator=generator,
        is_over=stop_rule(tokenizer, sampling.stop),
        judge=None if judge is None else Judge(judge, tokenizer, sampling, engine.world),
    )  # fmt: skip
    engine.policy.eval()
    with torch.no_grad():
        responses = decoder.answers(asked)
    if not decoder.is_policy:
        cost = asked.num_tokens / (len(examples) * samples_per_prompt)
        # What a search draws by the way is not what its responses were drawn by.
        responses = replace(responses, logprob=None, metrics={**responses.metrics, "tokens": cost})
    times = samples_per_prompt
    return prompt_ids.repeat_interleave(times, 0), prompt_mask.repeat_interleave(times, 0), responses
