"""Stop strings: texts at which a response ends, wherever the tokens' borders fall."""

from collections.abc import Callable, Sequence
from typing import Any

__all__ = ["before_stop", "stop_rule"]

# Tokens beside those that a stop string itself may be made of: some are only a part of a character.
SPARE = 8


def stop_rule(tokenizer: Any, stop: Sequence[str]) -> Callable[[Sequence[int]], bool] | None:
    """Whether a response's ids so far hold one of the texts; None where there are none."""
    if not stop:
        return None
    # A longer text than this was looked at when its earlier tokens were drawn.
    num_last = max(map(len, stop)) + SPARE

    def is_over(ids: Sequence[int]) -> bool:
        text = tokenizer.decode(ids[-num_last:], skip_special_tokens=True)
        return any(end in text for end in stop)

    return is_over


def before_stop(text: str, stop: Sequence[str], begin: int = 0) -> str:
    """The text up to the first of the stop strings that comes at `begin` or later."""
    places = [text.find(end, begin) for end in stop]
    return text[: min((place for place in places if place >= 0), default=len(text))]
