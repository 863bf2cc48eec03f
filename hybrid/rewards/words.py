"""The words and n-grams of a text: one rule for every reward that counts them."""

import unicodedata
from collections.abc import Sequence
from functools import cache
from typing import Any

__all__ = ["UNSPACED", "ngrams", "plain", "words", "words_and_symbols"]

# Scripts that put no spaces between words: there each character is a word.
UNSPACED = r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Bopomofo}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]"
LETTER = rf"[[\p{{L}}\p{{N}}]--{UNSPACED}]\p{{M}}*+"
# Inside a word stand apostrophes ("don't"), and points and commas between digits ("3.14").
WORD = rf"(?:{LETTER})++(?:(?:'|(?<=\p{{N}})[.,](?=\p{{N}}))(?:{LETTER})++)*+|{UNSPACED}\p{{M}}*+"
SYMBOL = r"\p{S}\p{M}*+"  # emoji, currency, mathematics


def words(text: str) -> list[str]:
    """The words in lower case, accents composed: runs of letters, marks and digits, parted at hyphens.

    Linear in the text's length, whatever is in it.
    """
    return _found(WORD, plain(text))


def words_and_symbols(text: str) -> list[str]:
    """As `words`, with each emoji, currency or mathematical sign as a word of its own."""
    return _found(f"{WORD}|{SYMBOL}", plain(text))


def ngrams(words: Sequence[str], n: int) -> list[str]:
    """Every n words in a row, joined by spaces; of fewer than n words, all of them as one; of none, nothing."""
    n = min(n, len(words)) or 1
    return [" ".join(words[i : i + n]) for i in range(len(words) - n + 1)]


def plain(text: str) -> str:
    """The text in lower case, with accents composed and straight apostrophes."""
    text = text.lower().replace("\u2019", "'")
    if text.isascii():
        return text
    # Composing a run of marks is quadratic in its length (100,000 of them: 7 s). 30 is what Unicode's
    # stream-safe text format allows: https://www.unicode.org/reports/tr15/#Stream_Safe_Text_Format
    return unicodedata.normalize("NFC", _pattern(r"(\p{M}{30})\p{M}++").sub(r"\1", text))


def _found(pattern: str, text: str) -> list[str]:
    found: list[str] = _pattern(pattern).findall(text)
    return found


@cache
def _pattern(pattern: str) -> Any:
    # transformers brings `regex`, which knows Unicode's scripts and classes; `re` does not.
    import regex

    return regex.compile(f"(?V1){pattern}")
