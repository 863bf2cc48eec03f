"""Texts that are longer than a model reads: which part of them it gets, and how many there were."""

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

__all__ = ["count_cut", "count_longer", "counted_cuts", "fitted"]

_cuts: ContextVar[list[int] | None] = ContextVar("_cuts", default=None)


@contextmanager
def counted_cuts() -> Iterator[list[int]]:
    """What `count_cut` is told inside the block, outside of blocks inside it."""
    cuts: list[int] = []
    token = _cuts.set(cuts)
    try:
        yield cuts
    finally:
        _cuts.reset(token)


def count_cut(num_texts: int = 1) -> None:
    """Say that a model got so many texts in part only; the reward that is asking logs it as `truncated`."""
    cuts = _cuts.get()
    if cuts is not None:
        cuts.append(num_texts)


def count_longer(tokenizer: Any, texts: Sequence[str], longest: int) -> None:
    """`count_cut` the texts of more than `longest` tokens, which a library cuts without a word."""
    if texts:
        count_cut(sum(len(ids) > longest for ids in tokenizer(list(texts), verbose=False)["input_ids"]))


def fitted(
    prompt: str,
    response: str,
    *,
    num_tokens: Callable[[str, str], int],
    starts: Callable[[str], Sequence[int]],
    longest: int,
) -> tuple[str, str]:
    """Prompt and response, as much of them as `longest` tokens hold: the prompt loses its beginning.

    Where the response alone is too long, it loses its end, and the prompt keeps half of the tokens at most.
    num_tokens: of prompt and response, put as the model reads them.   starts: where a text's tokens begin in it.
    """
    if num_tokens(prompt, response) <= longest:
        return prompt, response
    count_cut()
    ends = [prompt[start:] for start in reversed(starts(prompt))]
    if num_tokens("", response) <= longest:
        return _last(ends, lambda end: num_tokens(end, response) <= longest), response
    prompt = _last(ends, lambda end: num_tokens(end, "") <= longest // 2)
    beginnings = [response[:start] for start in starts(response)]
    return prompt, _last(beginnings, lambda beginning: num_tokens(prompt, beginning) <= longest)


def _last(texts: Sequence[str], fits: Callable[[str], bool]) -> str:
    """The last of the texts that fits, each being longer than those before it; "" where none does."""
    count = bisect_left(texts, True, key=lambda text: not fits(text))
    return texts[count - 1] if count else ""
