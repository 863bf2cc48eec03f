"""A reward for texts that are as easy, or as hard, to read as asked for."""

import math
import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any, Literal, NamedTuple

from hybrid.core import InputError
from hybrid.rewards.base import Reward, register_reward
from hybrid.rewards.words import words

__all__ = ["Readability"]


class Counts(NamedTuple):
    """What the formulas count in a text that has at least one word."""

    sentences: int
    words: int
    characters: int  # letters and digits
    syllables: int
    polysyllables: int  # words of three syllables or more
    complex_words: int  # those that are so without an ending -es, -ed or -ing


def flesch_kincaid(c: Counts) -> float:
    """School grade. Source: Kincaid et al. 1975, Navy Research Branch Report 8-75."""
    return 0.39 * c.words / c.sentences + 11.8 * c.syllables / c.words - 15.59


def flesch_reading_ease(c: Counts) -> float:
    """About 0 (hard) to 100 (easy). Source: Flesch 1948, "A new readability yardstick"."""
    return 206.835 - 1.015 * c.words / c.sentences - 84.6 * c.syllables / c.words


def gunning_fog(c: Counts) -> float:
    """Years of schooling. Source: Gunning 1952, "The technique of clear writing". Here names count like other words."""
    return 0.4 * (c.words / c.sentences + 100 * c.complex_words / c.words)


def coleman_liau(c: Counts) -> float:
    """School grade. Source: Coleman & Liau 1975, "A computer readability formula designed for machine scoring"."""
    return 0.0588 * 100 * c.characters / c.words - 0.296 * 100 * c.sentences / c.words - 15.8


def automated_readability(c: Counts) -> float:
    """School grade. Source: Smith & Senter 1967, "Automated Readability Index", AMRL-TR-66-220."""
    return 4.71 * c.characters / c.words + 0.5 * c.words / c.sentences - 21.43


def smog(c: Counts) -> float:
    """Years of schooling. Source: McLaughlin 1969, "SMOG grading: a new readability formula"."""
    return 1.0430 * math.sqrt(c.polysyllables * 30 / c.sentences) + 3.1291


def linsear_write(c: Counts) -> float:
    """School grade, over the whole text, where the US Air Force's original takes 100 words of it."""
    points = (c.words + 2 * c.polysyllables) / c.sentences
    return points / 2 if points > 20 else points / 2 - 1


FORMULAS: dict[str, Callable[[Counts], float]] = {
    f.__name__: f
    for f in (
        flesch_kincaid,
        flesch_reading_ease,
        gunning_fog,
        coleman_liau,
        automated_readability,
        smog,
        linsear_write,
    )
}


@register_reward("readability")
@dataclass
class Readability(Reward):
    """1 for a text of the asked-for reading grade, half of that at `tolerance` from it; 0 to 1.

        1 / (1 + |grade - target| / tolerance)        0 for a text without a word

    It never goes flat, so a policy far from the grade still learns which way to go. `target` and `tolerance` are
    on the metric's own scale: school grades, but for flesch_reading_ease, where 100 is very easy and 0 very hard.
    The formulas are made for English; a sentence ends at . ! ? … or a blank line, and syllables are counted by rule.
    """

    reads = ("response",)

    metric: Literal[
        "flesch_kincaid",
        "flesch_reading_ease",
        "gunning_fog",
        "coleman_liau",
        "automated_readability",
        "smog",
        "linsear_write",
    ] = "flesch_kincaid"
    target: float | None = None  # None: plain English, grade 8, or 65 of reading ease
    tolerance: float | None = None  # None: 3 grades, or 20 of reading ease

    def __post_init__(self) -> None:
        # Flesch calls 60 to 70 plain English, of the 8th and 9th grade; a grade is some 7 points there.
        target, tolerance = (65.0, 20.0) if self.metric == "flesch_reading_ease" else (8.0, 3.0)
        self.target = target if self.target is None else self.target
        self.tolerance = tolerance if self.tolerance is None else self.tolerance
        if not math.isfinite(self.target):
            raise InputError(f"target must be finite, got {self.target}")
        if not (math.isfinite(self.tolerance) and self.tolerance > 0):
            raise InputError(f"tolerance must be finite and above 0, got {self.tolerance}")

    def _score_one(self, response: str, target: str, prompt: str, item: Any) -> float:
        assert self.target is not None and self.tolerance is not None
        counts = _counts(response)
        if counts is None:
            return 0.0
        return 1 / (1 + abs(FORMULAS[self.metric](counts) - self.target) / self.tolerance)


def _counts(text: str) -> Counts | None:
    sentences = [found for part in _sentence_end().split(text) if (found := words(part))]
    found = [word for sentence in sentences for word in sentence]
    if not found:
        return None
    syllables = [_syllables(word) for word in found]
    long = [word for word, count in zip(found, syllables, strict=True) if count >= 3]
    return Counts(
        sentences=len(sentences),
        words=len(found),
        characters=sum(character.isalnum() for word in found for character in word),
        syllables=sum(syllables),
        polysyllables=len(long),
        complex_words=sum(_syllables(re.sub("(?:es|ed|ing)$", "", word)) >= 3 for word in long),
    )


@cache
def _sentence_end() -> Any:
    import regex  # comes with transformers; `re` takes no alternatives in a lookbehind

    # Ideographic and full-width marks need no space after them. A run of marks is tried from its first only: else
    # 100,000 of them take a run of tries from each.
    return regex.compile(
        r"(?<![.!?…])(?<!\b(?:Mr|Mrs|Ms|Dr|Prof|St|vs|e\.g|i\.e|[A-Z]))[.!?…]++[\"')\]\u201d\u2019»]*+(?=\s|$)"
        r"|[\u3002\uff01\uff1f]|\n\s*\n"
    )


# Of the vowels in a row that `VOWELS` takes for one syllable, these are two; so are these endings without a vowel.
TWO = re.compile(
    r"(?<![ctgs])ia(?!ge)|(?<![cglnstx])io|^[lz]io|iu|(?<![gq])u(?:a|el|en|et)|[lr]uid|oe[mt]|creat(?!ur)|^react"
    r"|(?<=[dkv])eo|^(?:geo|neo|theo)|(?<![gt])eou|(?<![aeiouct])ien[ct]|(?<![aeo])iety?$|scie"
    r"|(?<=[a-z][^aeiou])ie(?:r|rs|st)$|(?<=[aeiou][^aeiou])ea$|[^aeiou]ying|[aeou]ing|sm$|thm$|[dsz]n't$"
)
VOWELS = re.compile("[aeiouy]+")
# This y is a consonant ("yes", "player"); between a consonant and a vowel it is none ("flying").
GLIDE = re.compile("(?:^|(?<=[aeiou]))y(?=[aeiou])")
SILENT = re.compile(
    # at the end: "make", "makes", "walked"; not "table", "boxes", "wanted", "hundred"
    r"(?<=[^aeiouy])e$(?<![^aeiouy]le)|(?<=[^aeiouycgsxz])es$(?<![cs]hes)(?<![^aeiouy]les)"
    r"|(?<=[^aeiouydt])ed$(?<![^aeiouyl]led)(?<![^aeiouyr]red)"
    # before a suffix: "lovely", "statement", "something"
    r"|(?<=[aeiouy][^aeiouy])e(?=(?:ly|ful|less|ments?|ness|ty|thing|times?|where|body|one|work)$)"
)


@lru_cache(maxsize=16384)
def _syllables(word: str) -> int:
    """The syllables of a lower-case English word, by rule; at least 1, of a number too."""
    plain = "".join(c for c in unicodedata.normalize("NFD", word) if not unicodedata.combining(c))
    plain = GLIDE.sub("j", plain)
    # An accented e is no silent one ("café").
    silent = SILENT.findall(plain) if word[-2:].isascii() else []
    return max(1, len(VOWELS.findall(plain)) + len(TWO.findall(plain)) - len(silent))
