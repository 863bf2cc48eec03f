"""A reward for words that are spelt right."""

from collections.abc import Container
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal

from hybrid.rewards.base import Reward, register_reward
from hybrid.rewards.extras import require
from hybrid.rewards.words import words

__all__ = ["Spelling"]

ORDINALS = ("st", "nd", "rd", "th", "s")  # 1st, 2nd, 3rd, 4th, the 1990s


@register_reward("spelling")
@dataclass
class Spelling(Reward):
    """The share of the words that pyspellchecker's dictionary knows; 0 to 1, counting a word each time it is used.

    Case and punctuation do not matter. A hyphen parts words; around an apostrophe each part must be known or have
    at most two letters ("they've", "l'homme"). Numbers, URLs, e-mail addresses and @names are left out. A text
    without a word - empty, or numbers and emoji alone - scores 0: a policy must not learn to avoid words.
    Words of another language, names that the dictionary lacks and Japanese count as unknown.
    """

    reads = ("response",)

    language: Literal["en", "es", "fr", "it", "pt", "de", "ru", "ar", "lv", "eu", "nl", "fa"] = "en"
    extra_words: list[str] = field(default_factory=list)  # known as well: names, jargon

    def __post_init__(self) -> None:
        require("spellchecker", reward="spelling", install="pyspellchecker")
        self._extra = {word for phrase in self.extra_words for word in words(phrase)}

    def _score_one(self, response: str, target: str, prompt: str, item: Any) -> float:
        text = " ".join(chunk for chunk in response.split() if not _is_address(chunk))
        found = [word for word in words(text) if not _is_number(word)]
        dictionary = _dictionary(self.language)
        known = sum(word in self._extra or _is_known(word, dictionary, self._extra) for word in found)
        return known / len(found) if found else 0.0


def _is_known(word: str, dictionary: Container[str], extra: Container[str]) -> bool:
    if word in dictionary:
        return True
    parts = word.split("'")
    known = [part in dictionary or part in extra for part in parts]
    return any(known) and all(k or len(part) <= 2 for k, part in zip(known, parts, strict=True))


def _is_number(word: str) -> bool:
    """Whether it is a number: 12, 3.14, 21st, 1990s."""
    digits = word.rstrip("dhnrst") if word.endswith(ORDINALS) else word
    return bool(digits) and not any(character.isalpha() for character in digits)


def _is_address(chunk: str) -> bool:
    return "://" in chunk or "@" in chunk or chunk.lower().startswith("www.")


@cache
def _dictionary(language: str) -> Container[str]:
    """The words of a language, read once (0.1 s) and shared."""
    from spellchecker import SpellChecker

    return SpellChecker(language=language).word_frequency.dictionary
