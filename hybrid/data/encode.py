"""From examples to token ids and labels: what is trained, and what a rollout starts from."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from hybrid.core import IGNORE, Encoded, Example, InputError
from hybrid.data.config import DataConfig
from hybrid.data.template import prompt_text
from hybrid.data.tokens import continuation, opening, specials_in, tokens
from hybrid.data.turns import encode_dialogue

__all__ = ["encode", "encode_all", "encode_turns"]

logger = logging.getLogger(__name__)


def encode(example: Example, tokenizer: Any, config: DataConfig) -> Encoded:
    """Token ids and labels of one example. A label is the token itself, or IGNORE where it is not trained.

    prompt and target: the template's text is the prompt; target and EOS are trained. Without a target nothing is. The
        ids are those of the whole text where these go on from the prompt's.
    messages: see `encode_dialogue`; of one that becomes several examples this is the last answer's.
    plain text: all is trained; the first `prompt_tokens` tokens, but never the whole text, are the prompt.
    tokens: as they are.
    The sequence ends with exactly one EOS, which is trained, and begins with at most one BOS; the text of any other
    special token in prompt or target stays text. Nothing is ever found out by comparing with the pad id.
    `prompt_ids` is empty for a plain text that leaves nothing to start from, where the tokenizer has no BOS either.
    Raises InputError: a tokenizer without EOS; a dialogue and a tokenizer without a fitting chat template.
    """
    return encode_turns(example, tokenizer, config)[-1]


def encode_turns(example: Example, tokenizer: Any, config: DataConfig) -> list[Encoded]:
    """`encode`, as all the examples that a dialogue becomes; a preference is one, with the rejected answer in it."""
    if example.rejected is not None:
        return [_encode_preference(example, tokenizer, config)]
    if tokenizer.eos_token_id is None:
        raise InputError("this tokenizer has no EOS token, without which no response ends; set tokenizer.eos_token")
    if example.input_ids:
        return [_encode_tokens(example, tokenizer)]
    if example.messages or (example.prompt and config.template == "chat"):
        return encode_dialogue(example, tokenizer, config)
    return [(_encode_pair if example.prompt else _encode_text)(example, tokenizer, config)]


def encode_all(
    examples: Sequence[Example], tokenizer: Any, config: DataConfig, *, what: str = "training"
) -> list[Encoded]:
    """All examples encoded, in order. Left out, and logged: those longer than `max_length` tokens (of a pair either
    side), and those without a token that a rollout could start from.

    what: "training" or "evaluation", for messages.   Raises InputError where none is left.
    """
    encoded = [e for example in examples for e in _located(example, tokenizer, config)]
    fitting = [e for e in encoded if _length(e) <= config.max_length]
    kept = [e for e in fitting if e.prompt_ids]
    reasons = (
        (len(encoded) - len(fitting), f"longer than data.max_length = {config.max_length} tokens"),
        (len(fitting) - len(kept), "without a token to start a rollout from"),
    )
    why = ", ".join(f"{count} {reason}" for count, reason in reasons if count)
    if not kept:
        raise InputError(f"no {what} example is left of {len(encoded)}: {why or 'there was none'}")
    if why:
        logger.warning("left out %d of %d %s examples: %s", len(encoded) - len(kept), len(encoded), what, why)
    return kept


def _length(e: Encoded) -> int:
    """Of the longer side, where there are two."""
    return len(e.input_ids) if e.rejected is None else max(len(e.input_ids), len(e.rejected.input_ids))


def _located(example: Example, tokenizer: Any, config: DataConfig) -> list[Encoded]:
    try:
        return encode_turns(example, tokenizer, config)
    except InputError as error:
        shown = example.prompt or example.target or list(example.input_ids)
        raise InputError(f"{error}. The example: {shown!r:.60}") from error


def _encode_preference(example: Example, tokenizer: Any, config: DataConfig) -> Encoded:
    """Both answers behind the same prompt. Raises InputError where the template makes two prompts of it."""
    assert example.rejected is not None
    other = encode(example.rejected, tokenizer, config)
    best = encode(replace(example, rejected=None), tokenizer, config)
    # Sides of several turns have them in common only up to the first that is trained.
    prompt_ids, of_other = _untrained_start(best), _untrained_start(other)
    if prompt_ids != of_other:
        raise InputError("the sides of a pair differ in their prompt, once it is written by the template as tokens")
    other = replace(other, prompt_ids=prompt_ids)
    return replace(best, prompt_ids=prompt_ids, rejected=other, margin=example.margin, weight=example.weight)


def _untrained_start(e: Encoded) -> tuple[int, ...]:
    """The ids before the first that is trained."""
    return e.input_ids[: next((i for i, label in enumerate(e.labels) if label != IGNORE), len(e.labels))]


def _encode_pair(example: Example, tokenizer: Any, config: DataConfig) -> Encoded:
    target = _without_eos(tokenizer, example.target)
    start = prompt_text(example.prompt, config.template)
    literal = _is_literal(tokenizer, example.prompt, target)
    if literal and (own := specials_in(tokenizer, prompt_text("", config.template))):
        raise InputError(
            f"a prompt or target holds the text of a special token, and data.template that of {own[0]!r}: they cannot "
            f"be told apart; take it out of {example.prompt!r:.60}"
        )
    prompt_ids = opening(tokenizer, start, literal=literal)
    if not example.target:
        return _encoded(example, prompt_ids, [IGNORE] * len(prompt_ids), prompt_ids)
    answer = continuation(tokenizer, prompt_ids, start, start + target, begins=True, literal=literal)
    answer = [*answer, tokenizer.eos_token_id]
    return _encoded(example, prompt_ids + answer, [IGNORE] * len(prompt_ids) + answer, prompt_ids)


def _encode_text(example: Example, tokenizer: Any, config: DataConfig) -> Encoded:
    text = _without_eos(tokenizer, example.target)
    literal = _is_literal(tokenizer, text)
    ids = opening(tokenizer, text, literal=literal)
    # What the tokenizer puts in front of a text: BOS, or nothing. Of that, and of the first token, nothing is learnt.
    num_special = max(len(ids) - len(tokens(tokenizer, text, literal=literal)), 0)
    num_ignored = max(num_special, 1)
    cut = max(num_special, min(num_special + config.prompt_tokens, len(ids) - 1))
    prompt, target = (tokenizer.decode(half, skip_special_tokens=True) for half in (ids[:cut], ids[cut:]))
    ids_and_eos = [*ids, tokenizer.eos_token_id]
    labels = [IGNORE] * num_ignored + ids_and_eos[num_ignored:]
    return Encoded(tuple(ids_and_eos), tuple(labels), tuple(ids[:cut]), prompt, target, example.item)


def _encode_tokens(example: Example, tokenizer: Any) -> Encoded:
    """A tokenised row; a rollout starts from what stands before its first trained token."""
    ids, labels = example.input_ids, example.labels or example.input_ids
    if outside := [token for token in ids if not 0 <= token < len(tokenizer)]:
        raise InputError(f"a tokenised row holds the id {outside[0]}, and the tokenizer has {len(tokenizer)} tokens")
    first = next((i for i, label in enumerate(labels) if label != IGNORE), len(ids))
    # Nothing predicts the first token of a row.
    first = max(first, 1)
    prompt, target = (tokenizer.decode(half, skip_special_tokens=True) for half in (ids[:first], ids[first:]))
    return Encoded(ids, labels, ids[:first], example.prompt or prompt, example.target or target, example.item)


def _without_eos(tokenizer: Any, text: str) -> str:
    """The text without the EOS that it ends with: one is put there."""
    return text.removesuffix(tokenizer.eos_token)


def _is_literal(tokenizer: Any, first: str, *others: str) -> bool:
    """Whether a special token's text stands in what the user wrote, but for a BOS at its very beginning and an EOS at
    its end, which are what they say."""
    start = first.removeprefix(tokenizer.bos_token or "")
    return bool(specials_in(tokenizer, _without_eos(tokenizer, start), *others))


def _encoded(example: Example, ids: list[int], labels: list[int], prompt_ids: list[int]) -> Encoded:
    return Encoded(tuple(ids), tuple(labels), tuple(prompt_ids), example.prompt, example.target, example.item)
