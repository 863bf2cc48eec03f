"""Rewards that compare or search texts as they stand: equal, contained, matched, or how far apart."""

import math
import re
from dataclasses import dataclass
from typing import Any

from hybrid.core import InputError
from hybrid.rewards.base import Reward, RewardTimeout, register_reward
from hybrid.rewards.extras import require
from hybrid.rewards.words import UNSPACED, plain

__all__ = [
    "ExactMatch",
    "Jaccard",
    "KeywordCount",
    "Levenshtein",
    "RegexPresence",
    "TimedPattern",
    "check_timeout",
]

NEGATIVE = re.compile(r"\(\?<?!")
# What may stand inside a word of any other script.
_INSIDE_A_WORD = rf"[[\p{{L}}\p{{M}}\p{{N}}_]--{UNSPACED}]"


@register_reward("exact_match")
@dataclass
class ExactMatch(Reward):
    """1 where the response equals the target, else 0.

    Nothing is normalised but what is asked for: an accent as one character differs from one as two.
    """

    reads = ("response", "target")
    needs_target = True

    lowercase: bool = False
    strip: bool = False  # leave out white space at both ends

    def _score_one(self, response: str, target: str, prompt: str, item: Any) -> float:
        return float(self._seen(response) == self._seen(target))

    def _seen(self, text: str) -> str:
        text = text.strip() if self.strip else text
        return text.lower() if self.lowercase else text


@register_reward("keyword_count")
@dataclass
class KeywordCount(Reward):
    """The share of the keywords that the response holds, 0 to 1; or how many of them, with normalize false.

    Case does not count, nor does which white space stands inside a phrase. With `whole_words` a keyword that
    begins or ends with a letter or digit must not be part of a longer word there: "cat" is not in "category",
    "c++" is in "c++11". In scripts that put no spaces between words, and beside them, any place will do.
    """

    reads = ("response",)

    keywords: list[str]
    normalize: bool = True
    whole_words: bool = True

    def __post_init__(self) -> None:
        if not self.keywords:
            raise InputError("keywords must hold at least one text, got none")
        for keyword in self.keywords:
            if not isinstance(keyword, str) or not keyword.strip():
                raise InputError(f"keywords must be texts that are not blank, got {keyword!r}")
        require("regex", reward=self.component_name)
        self._patterns = [_keyword_pattern(keyword, self.whole_words) for keyword in self.keywords]

    def _score_one(self, response: str, target: str, prompt: str, item: Any) -> float:
        text = plain(response).casefold()
        count = sum(pattern.search(text) is not None for pattern in self._patterns)
        return count / len(self._patterns) if self.normalize else float(count)


@register_reward("regex_presence")
@dataclass
class RegexPresence(Reward):
    """1 where the pattern matches somewhere in the response, else 0.

    The pattern is one of the `regex` module, which knows all that `re` does. A search that takes longer than
    `timeout` raises RewardTimeout: `on_error` says what that sample gets.
    """

    reads = ("response",)

    pattern: str
    ignore_case: bool = True
    timeout: float = 1.0  # seconds for one response

    def __post_init__(self) -> None:
        self._pattern = TimedPattern(
            self.pattern, self.timeout, reward=self.component_name, ignore_case=self.ignore_case
        )
        # What finds no character in either of two signs that no pattern is about finds nothing in any text: x*, ^, a|.
        # A negative lookaround finds none too, and says much.
        if not NEGATIVE.search(self.pattern) and all(map(self._pattern.finds_nothing_in, "\u2603\ufdd0")):
            raise InputError(f"pattern {self.pattern!r} matches any text, at no character of it; ask for one, as in a+")

    def _score_one(self, response: str, target: str, prompt: str, item: Any) -> float:
        return float(self._pattern.found_in(response))


class TimedPattern:
    """A pattern that cannot hang the run. Raises InputError where it is none."""

    def __init__(self, pattern: str, timeout: float, *, reward: str, ignore_case: bool = False):
        check_timeout(timeout)
        require("regex", reward=reward)
        import regex

        if not pattern:
            raise InputError("pattern must say what to look for, got the empty one, which any text matches")
        try:
            self._compiled = regex.compile(pattern, regex.IGNORECASE if ignore_case else 0)
        except regex.error as error:
            raise InputError(f"pattern {pattern!r} is no regular expression: {error}") from error
        except RecursionError as error:
            raise InputError(f"pattern {pattern[:40]!r}... is nested too deeply") from error
        self.timeout = timeout

    def finds_nothing_in(self, text: str) -> bool:
        """Whether it matches somewhere in `text` at no character. Raises RewardTimeout."""
        found = self._compiled.search(text, timeout=self.timeout)
        return found is not None and not found[0]

    def found_in(self, text: str, *, whole: bool = False) -> bool:
        """Whether it matches somewhere in `text`, or all of it. Raises RewardTimeout."""
        search = self._compiled.fullmatch if whole else self._compiled.search
        try:
            return search(text, timeout=self.timeout) is not None
        except TimeoutError as error:
            raise RewardTimeout(f"pattern {self._compiled.pattern!r} took longer than {self.timeout} s") from error


@register_reward("jaccard")
@dataclass
class Jaccard(Reward):
    """Words in both texts / words in either, each word once; 0 to 1, and 1 for two texts without words.

    Words are what white space separates.   Source: Jaccard 1912.
    """

    reads = ("response", "target")
    needs_target = True

    lowercase: bool = True

    def _score_one(self, response: str, target: str, prompt: str, item: Any) -> float:
        ours, theirs = (set((text.lower() if self.lowercase else text).split()) for text in (response, target))
        either = ours | theirs
        return len(ours & theirs) / len(either) if either else 1.0


@register_reward("levenshtein")
@dataclass
class Levenshtein(Reward):
    """1 - edit distance / length of the longer text, 0 to 1; with normalize false, minus the distance.

    Insertions, deletions and substitutions of characters cost 1 each; two empty texts score 1 (or 0, the distance).
    Source: Levenshtein 1966.
    """

    reads = ("response", "target")
    needs_target = True

    normalize: bool = True

    def __post_init__(self) -> None:
        require("rapidfuzz", reward=self.component_name)

    def _score_one(self, response: str, target: str, prompt: str, item: Any) -> float:
        from rapidfuzz.distance import Levenshtein as Distance

        distance = Distance.distance(response, target)
        if not self.normalize:
            return float(-distance)
        return 1 - distance / max(len(response), len(target), 1)


def check_timeout(timeout: float) -> None:
    """Raises InputError if `timeout` is no number of seconds to wait."""
    if not 0 < timeout < math.inf:
        raise InputError(f"timeout must be above 0 and finite, got {timeout}")


def _keyword_pattern(keyword: str, whole_words: bool) -> Any:
    """`keyword` in a casefolded text."""
    import regex

    keyword = " ".join(plain(keyword).casefold().split())
    pattern = r"\s+".join(map(regex.escape, keyword.split()))
    inside = regex.compile(_INSIDE_A_WORD, regex.V1)
    if whole_words and inside.match(keyword[0]):
        pattern = rf"(?<!{_INSIDE_A_WORD}){pattern}"
    if whole_words and inside.match(keyword[-1]):
        pattern = rf"{pattern}(?!{_INSIDE_A_WORD})"
    return regex.compile(pattern, regex.V1)
