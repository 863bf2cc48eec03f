"""A reward for responses of the asked-for length."""

from dataclasses import dataclass
from typing import Any, Literal

from hybrid.core import InputError
from hybrid.rewards.base import Reward, register_reward

__all__ = ["LengthWindow"]


@register_reward("length_window", "length")
@dataclass
class LengthWindow(Reward):
    """1 for a response of `min` to `max` units, falling off linearly outside; 0 to 1.

        n < min   n / min
        n > max   max(0, 1 - (n - max) / max)        0 from twice `max` on

    Words are what white space separates; tokens are counted without special ones.
    """

    reads = ("response",)

    min: int = 30
    max: int = 200
    unit: Literal["words", "chars", "tokens"] = "words"
    tokenizer: Any = None  # for tokens: a name or path for transformers, or a tokenizer

    def __post_init__(self) -> None:
        if self.min < 0:
            raise InputError(f"min must be at least 0, got {self.min}")
        if self.max < max(self.min, 1):
            raise InputError(f"max must be at least 1 and at least min ({self.min}), got {self.max}")
        if (self.unit == "tokens") != (self.tokenizer is not None):
            raise InputError(f"tokenizer must be given with unit 'tokens' and only then; unit is {self.unit!r}")

    def setup(self, device: Any = None) -> None:
        if isinstance(self.tokenizer, str):
            self.tokenizer = _tokenizer(self.tokenizer)

    def _score_one(self, response: str, target: str, prompt: str, item: Any) -> float:
        n = self._length(response)
        if n < self.min:
            return n / self.min
        return min(1.0, max(0.0, 1 - (n - self.max) / self.max))

    def _length(self, text: str) -> int:
        if self.unit == "words":
            return len(text.split())
        if self.unit == "chars":
            return len(text)
        self.setup()
        return len(self.tokenizer.encode(text, add_special_tokens=False))


def _tokenizer(name_or_path: str) -> Any:
    from transformers import AutoTokenizer  # takes seconds: only where tokens are counted

    try:
        return AutoTokenizer.from_pretrained(name_or_path)
    except (OSError, ValueError) as error:
        raise InputError(f"tokenizer {name_or_path!r} cannot be loaded: {error}") from error
