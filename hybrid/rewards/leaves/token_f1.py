"""A reward that compares the words of a short answer with those wanted, as question answering is scored."""

import re
import string
from collections import Counter
from dataclasses import dataclass
from typing import Any

from hybrid.rewards.base import Reward, register_reward

__all__ = ["TokenF1"]

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")


@register_reward("token_f1")
@dataclass
class TokenF1(Reward):
    """F1 of the words that response and target share, in any order, 0 to 1; as SQuAD scores answers.

        P = shared / words of the response,  R = shared / words of the target,  F1 = 2 P R / (P + R)

    A word counts as often as both texts have it. Words are what white space separates, in lower case, without ASCII
    punctuation and without "a", "an" and "the". Texts that hold no word score 1 if they are equal and not blank,
    else 0.
    Source: Rajpurkar et al. 2016, "SQuAD: 100,000+ questions for machine comprehension of text" (arXiv:1606.05250).
    """

    reads = ("response", "target")
    needs_target = True

    def _score_one(self, response: str, target: str, prompt: str, item: Any) -> float:
        ours, theirs = _words(response), _words(target)
        if not ours and not theirs:
            return float(response == target and response.strip() != "")
        shared = (ours & theirs).total()
        # 2 P R / (P + R), with the shared words cancelled out.
        return 2 * shared / (ours.total() + theirs.total())


def _words(text: str) -> Counter[str]:
    return Counter(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())
