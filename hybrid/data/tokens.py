"""Texts to token ids: what a user wrote stays text, and a continuation is what follows, not what it would be alone."""

from collections.abc import Iterable
from functools import lru_cache
from typing import Any

from hybrid.core import InputError

__all__ = ["continuation", "opening", "special_ids", "specials_in", "tokens"]

# Before one of these a text is tokenized as in the middle of another: a tokenizer puts a space before a first word.
LEADS = ("\n", ":")


def opening(tokenizer: Any, text: str, *, literal: bool = False) -> list[int]:
    """The ids of a text that stands at the beginning: with what the tokenizer puts in front, one BOS at most.

    A closing EOS is left out, whether the tokenizer added it or the text had it.   literal: see `tokens`.
    """
    bos, bos_id = tokenizer.bos_token, tokenizer.bos_token_id
    begins = literal and bos is not None and text.startswith(bos)
    ids = tokens(tokenizer, text.removeprefix(bos) if begins else text, special=True, literal=literal)
    # A lone EOS is the BOS of a tokenizer where the two are one token (OPT).
    ids = ids[:-1] if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id else ids
    if begins and ids[:1] != [bos_id]:
        return [bos_id, *ids]
    return ids[1:] if bos_id is not None and ids[:2] == [bos_id, bos_id] else ids


def continuation(
    tokenizer: Any, ids: list[int], text: str, longer: str, *, begins: bool = False, literal: bool = False
) -> list[int]:
    """The ids that lead from `text`, encoded as `ids`, to `longer`, which starts with it.

    begins: `ids` are the text's `opening`.   literal: see `tokens`.
    """
    encoded = opening if begins else tokens
    whole = encoded(tokenizer, longer, literal=literal)
    if whole[: len(ids)] == ids:
        return whole[len(ids) :]
    # A token would reach across the seam; a rollout, which starts there, could not say it.
    rest = longer[len(text) :]
    for lead in LEADS:
        before = tokens(tokenizer, lead)
        joined = tokens(tokenizer, lead + rest, literal=literal)
        if joined[: len(before)] == before:
            return joined[len(before) :]
    return tokens(tokenizer, rest, literal=literal)


def tokens(tokenizer: Any, text: str, *, special: bool = False, literal: bool = False) -> list[int]:
    """The ids of a text.   special: with what the tokenizer puts around one.

    literal: a special token's text in it is spelt out in ordinary tokens: it is no special token.
    """
    options = {"split_special_tokens": True} if literal else {}
    try:
        # verbose=False: how long is too long is for `max_length` to say, not for the tokenizer's warning.
        encoded = tokenizer(text, add_special_tokens=special, verbose=False, **options)
    except (TypeError, UnicodeError) as error:
        raise InputError(f"a text cannot be tokenized, it is not valid Unicode: {text[:60]!a}") from error
    return list(encoded["input_ids"])


def specials_in(tokenizer: Any, *texts: str) -> list[str]:
    """The special tokens whose text stands in one of the texts."""
    return [special for special in _specials(tokenizer, len(tokenizer)) if any(special in text for text in texts)]


def special_ids(tokenizer: Any) -> set[int]:
    """The ids of the special tokens."""
    return set(_specials(tokenizer, len(tokenizer)).values())


# Once a tokenizer, as long as no token is added to it: it is asked for every example.
@lru_cache(maxsize=8)
def _specials(tokenizer: Any, size: int) -> dict[str, int]:
    added: Iterable[tuple[int, Any]] = tokenizer.added_tokens_decoder.items()
    named = dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
    return named | {str(token): id for id, token in added if token.special}
