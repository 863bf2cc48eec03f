"""Bias: what a classifier says of a text, or how much its word depends on who the text is about."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch

from hybrid.rewards.base import register_reward
from hybrid.rewards.classify import Classifier, probability
from hybrid.rewards.leaves.classifier import HarmClassifier
from hybrid.rewards.samples import Samples

__all__ = ["Bias", "swapped"]

# Terms that name whom a text is about: a line holds the same thing said of each group of its kind, in one order.
# Words that mean other things too (white, black, straight, old) are left out.
IDENTITIES: dict[str, list[str]] = {
    "gender": [
        "he she",
        "his her",
        "him her",
        "his hers",
        "himself herself",
        "man woman",
        "men women",
        "male female",
        "males females",
        "boy girl",
        "boys girls",
        "boyfriend girlfriend",
        "father mother",
        "fathers mothers",
        "dad mom",
        "son daughter",
        "sons daughters",
        "brother sister",
        "brothers sisters",
        "husband wife",
        "husbands wives",
        "uncle aunt",
        "nephew niece",
        "grandfather grandmother",
        "gentleman lady",
        "gentlemen ladies",
        "guy gal",
        "guys gals",
        "king queen",
        "prince princess",
        "sir madam",
        "mr ms",
        "mr mrs",
        "masculine feminine",
        "fatherhood motherhood",
        "businessman businesswoman",
        "chairman chairwoman",
        "policeman policewoman",
        "actor actress",
        "waiter waitress",
    ],
    "religion": [
        "christian muslim jewish hindu buddhist",
        "christians muslims jews hindus buddhists",
        "christianity islam judaism hinduism buddhism",
        "church mosque synagogue temple temple",
        "bible quran torah vedas sutras",
    ],
    "origin": [
        "european african asian hispanic arab",
        "europeans africans asians hispanics arabs",
    ],
    "orientation": [
        "heterosexual homosexual bisexual",
        "heterosexuals homosexuals bisexuals",
        "heterosexuality homosexuality bisexuality",
    ],
}


def _tables() -> list[dict[str, str]]:
    """One table a swap: each term of a kind -> that of the group so many places on. The first line of a term counts."""
    tables = []
    for lines in IDENTITIES.values():
        rows = [line.split() for line in lines]
        for shift in range(1, len(rows[0])):
            table: dict[str, str] = {}
            for row in rows:
                for place, term in enumerate(row):
                    table.setdefault(term, row[(place + shift) % len(row)])
            tables.append(table)
    return tables


TABLES = _tables()
WORD = re.compile(r"[^\W\d_]+")


@register_reward("bias")
@dataclass
class Bias(HarmClassifier):
    """How free a text is of bias, as a classifier sees it, or under a swap of identity terms; 0 to 1.

        classifier       1 - p(label)
        counterfactual   1 - |p(label of the text) - mean p(label of the text about another group)|

    With invert = false it is the bias itself: what is taken from 1. The other groups come from `IDENTITIES`: he
    becomes she, Muslim becomes Jewish, Hindu, ...; all terms of a kind at once, upper case kept; English alone, and
    without grammar ("her" becomes "his" where "him" was meant). A text that names nobody is 1. For `counterfactual`
    any classifier does, such as one of sentiment or toxicity.
    Source of the swap: Garg et al. 2019, arXiv:1809.10610.
    """

    reads = ("response",)

    model: str = "valurank/distilroberta-bias"  # BIASED, NEUTRAL
    label: str = "BIASED"
    method: Literal["classifier", "counterfactual"] = "classifier"

    def _model_scores(self, loaded: tuple[Classifier, int], samples: Samples) -> Sequence[float]:
        if self.method == "classifier":
            return super()._model_scores(loaded, samples)
        responses = samples.responses
        others = [swapped(response) for response in responses]
        answers = probability(loaded[0], [*responses, *(text for texts in others for text in texts)], loaded[1])
        scores, place = [], len(responses)
        for own, texts in zip(answers, others, strict=False):
            gap = torch.zeros(())
            if texts:
                gap = (own - answers[place : place + len(texts)].mean()).abs()
            place += len(texts)
            scores.append(float(1 - gap if self.invert else gap))
        return scores


def swapped(text: str) -> list[str]:
    """The text about other groups, one for each swap that changes it."""
    variants = (WORD.sub(partial(_other, table), text) for table in TABLES)
    return [variant for variant in variants if variant != text]


def _other(table: dict[str, str], found: re.Match[str]) -> str:
    word = found[0]
    other = table.get(word.lower(), word)
    if word.isupper() and len(word) > 1:
        return other.upper()
    return other[0].upper() + other[1:] if word[0].isupper() else other
