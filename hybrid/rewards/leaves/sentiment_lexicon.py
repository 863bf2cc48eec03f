"""Sentiment from a word list: real, small, and without a model."""

from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from hybrid.rewards.base import Reward, register_reward
from hybrid.rewards.extras import require

__all__ = ["SentimentLexicon"]

MAX_WORDS = 2000


@register_reward("sentiment_lexicon", "vader")
@dataclass
class SentimentLexicon(Reward):
    """VADER's compound sentiment: -1 (most negative) to 1 (most positive), 0 where no word is known.

    Source: Hutto & Gilbert 2014, "VADER: A parsimonious rule-based model for sentiment analysis".
    """

    reads = ("response", "prompt")

    field: Literal["response", "prompt_and_response"] = "response"  # the text that is scored

    def __post_init__(self) -> None:
        require("vaderSentiment", reward="sentiment_lexicon", install="vaderSentiment")

    def setup(self, device: Any = None) -> None:
        _analyzer()

    def _score_one(self, response: str, target: str, prompt: str, item: Any) -> float:
        text = response if self.field == "response" else f"{prompt} {response}"
        return float(_analyzer().polarity_scores(_shortened(text))["compound"])


def _shortened(text: str) -> str:
    """The text's first words, if it is so long that VADER, quadratic in the words, would take over a second or so."""
    if len(text) <= MAX_WORDS:
        return text
    # VADER reads an emoji as the words that describe it.
    emojis = _analyzer().emojis
    described = "".join(f" {emojis[c]} " if c in emojis else c for c in text[: 20 * MAX_WORDS])
    return " ".join(described.split()[:MAX_WORDS])


@cache
def _analyzer() -> Any:
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    return SentimentIntensityAnalyzer()
