"""Rewards for saying something new: to the training set, to the batch, to what was said before."""

import hashlib
import math
import os
from collections import Counter, deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal

from hybrid.core import InputError
from hybrid.rewards.base import Reward, register_reward
from hybrid.rewards.extras import require
from hybrid.rewards.words import ngrams, words_and_symbols

__all__ = ["Diversity", "Exploration", "Novelty"]

MAX_N = 16  # longer n-grams are as good as the whole text, and their number times n is what they cost


@register_reward("novelty")
@dataclass
class Novelty(Reward):
    """The share of the response's distinct n-grams that the reference does not have; 0 to 1.

    reference: "history" - the responses of earlier batches; "batch" - the other responses of this batch; a list
        of texts; or a file of them, such as the training set (txt, jsonl, json or csv: every text in a row counts).
    Words are compared without case and punctuation. A response of fewer than n words is one n-gram; one without
    a word or symbol scores 0. A batch is scored before it becomes history; checkpoints keep the history.
    """

    needs_batch = True
    char_limit = 20_000  # the history is kept as text

    n: int = 3
    reference: str | list[str] = "history"
    window: int = 1000  # of history: so many responses are remembered, the last ones

    def __post_init__(self) -> None:
        _check_n(self.n)
        if self.window < 1:
            raise InputError(f"window must be at least 1, got {self.window}")
        texts = [] if self.reference in ("history", "batch") else _texts(self.reference)
        if self.reference not in ("history", "batch") and not any(text.strip() for text in texts):
            raise InputError(f"reference must hold at least one text, got {self.reference!r}: all would be new to it")
        self._corpus = frozenset(chain.from_iterable(map(self._ngrams, texts)))
        self._history: deque[str] = deque()
        self._counts: Counter[str] = Counter()  # in how many texts of the history each n-gram is

    def _score(self, responses: list[str], targets: list[str], prompts: list[str], items: list[Any]) -> list[float]:
        rows = [self._ngrams(response) for response in responses]
        seen: Collection[str] = self._corpus
        if self.reference == "batch":
            seen = {ngram for ngram, count in Counter(chain.from_iterable(rows)).items() if count > 1}
        elif self.reference == "history":
            seen = self._counts
        scores = [sum(ngram not in seen for ngram in row) / len(row) if row else 0.0 for row in rows]
        if self.reference == "history":
            self._remember(responses)
        return scores

    def _state(self) -> dict[str, Any]:
        return {"history": list(self._history)}

    def _load_state(self, state: dict[str, Any]) -> None:
        self._history.clear()
        self._counts.clear()
        self._remember(state["history"])

    def _ngrams(self, text: str) -> set[str]:
        return set(ngrams(words_and_symbols(text), self.n))

    def _remember(self, texts: Sequence[str]) -> None:
        self._history.extend(texts)
        for text in texts:
            self._counts.update(self._ngrams(text))
        while len(self._history) > self.window:
            self._counts.subtract(forgotten := self._ngrams(self._history.popleft()))
            for ngram in forgotten:
                if not self._counts[ngram]:
                    del self._counts[ngram]


@register_reward("diversity")
@dataclass
class Diversity(Reward):
    """How different the responses of a batch are, as each one's share in it; 0 to 1.

    distinct: the mean, over the response's n-grams, of 1 / (how often the whole batch has that n-gram). Over all
        n-grams of the batch that mean is distinct-n, their distinct number / their number (Li et al. 2016,
        arXiv:1510.03055); so each response has its own share of it, and one that repeats itself or others pays.
    self_bleu: 1 - sacrebleu's BLEU of up to n-grams, exponentially smoothed, with all the others as references
        (Zhu et al. 2018, arXiv:1802.01886). Linear in the batch.
    Words are compared without case and punctuation. A response of fewer than n words is one n-gram; one without
    a word or symbol scores 0, and is no reference; a single response has nothing to be alike.
    """

    needs_batch = True

    n: int = 2
    metric: Literal["distinct", "self_bleu"] = "distinct"

    def __post_init__(self) -> None:
        _check_n(self.n)
        if self.metric == "self_bleu":
            require("sacrebleu", reward="diversity")

    def _score(self, responses: list[str], targets: list[str], prompts: list[str], items: list[Any]) -> list[float]:
        rows = [words_and_symbols(response) for response in responses]
        worded = [row for row in rows if row]
        scores = iter(_shares_of_distinct(worded, self.n) if self.metric == "distinct" else _unlike(worded, self.n))
        return [next(scores) if row else 0.0 for row in rows]


@register_reward("exploration")
@dataclass
class Exploration(Reward):
    """A bonus for outputs that were rarely seen: 1 / √N, N being how often so far, this time included; 0 to 1.

    key: "text" - the same words in the same order, whatever their case and punctuation; "simhash" - the same
        `bits` bits of a SimHash of the n-grams, which similar texts tend to share; fewer bits, coarser.
    A batch is counted row by row, so its second copy scores less than its first. A response without a word or
    symbol scores 0 and is not counted. Checkpoints keep the counts: with key "text" one of each different text.
    Source: Bellemare et al. 2016 (arXiv:1606.01868); Tang et al. 2017 (arXiv:1611.04717), sec. 2.3 for SimHash.
    """

    needs_batch = True

    key: Literal["text", "simhash"] = "text"
    n: int = 2  # of simhash
    bits: int = 16  # of simhash, 1 to 64

    def __post_init__(self) -> None:
        _check_n(self.n)
        if not 1 <= self.bits <= 64:
            raise InputError(f"bits must lie in 1 to 64, got {self.bits}")
        self._visits: Counter[str] = Counter()

    def _score(self, responses: list[str], targets: list[str], prompts: list[str], items: list[Any]) -> list[float]:
        return [self._bonus(words_and_symbols(response)) for response in responses]

    def _bonus(self, words: list[str]) -> float:
        if not words:
            return 0.0
        key = _hash(" ".join(words)) if self.key == "text" else _simhash(ngrams(words, self.n), self.bits)
        self._visits[f"{key:x}"] += 1
        return 1 / math.sqrt(self._visits[f"{key:x}"])

    def _state(self) -> dict[str, Any]:
        return {"visits": dict(self._visits)}

    def _load_state(self, state: dict[str, Any]) -> None:
        self._visits = Counter(state["visits"])


def _check_n(n: int) -> None:
    if not 1 <= n <= MAX_N:
        raise InputError(f"n must lie in 1 to {MAX_N}, got {n}")


def _texts(reference: str | list[str]) -> list[str]:
    """The texts given, or those of the file named."""
    if isinstance(reference, list):
        for index, text in enumerate(reference):
            if not isinstance(text, str):
                raise InputError(f"reference must be a list of texts; number {index} is {text!r}")
        return reference
    path = Path(os.path.expanduser(reference))
    if not path.is_file():
        raise InputError(f"reference must be 'history', 'batch', a list of texts or a file; no file {reference!r}")
    from hybrid.data.read import read_rows

    try:
        rows = read_rows(path)
    except InputError as error:
        raise InputError(f"reference {reference!r} cannot be read: {error}") from error
    return [value for row in rows for value in row.values() if isinstance(value, str)]


def _shares_of_distinct(rows: list[list[str]], n: int) -> list[float]:
    found = [ngrams(row, n) for row in rows]
    counts = Counter(chain.from_iterable(found))
    return [math.fsum(1 / counts[ngram] for ngram in row) / len(row) for row in found]


def _unlike(rows: list[list[str]], n: int) -> list[float]:
    """1 - the BLEU of each row against all the others.

    BLEU credits an n-gram as often as the one reference has it that has it most often. Of each n-gram the two
    highest counts in the batch are kept, so that what the others have is known without looking at them again.
    """
    from sacrebleu.metrics.bleu import BLEU

    if len(rows) < 2:
        return [1.0] * len(rows)
    found = [[Counter(ngrams(row, order)) for order in range(1, min(n, len(row)) + 1)] for row in rows]
    highest: dict[str, tuple[int, int]] = {}
    for ngram, count in chain.from_iterable(counts.items() for row in found for counts in row):
        first, second = highest.get(ngram, (0, 0))
        highest[ngram] = (max(first, count), max(second, min(first, count)))

    lengths = Counter(len(row) for row in rows)
    scores = []
    for row, orders in zip(rows, found, strict=True):
        hits, totals = [0] * n, [0] * n
        for order, counts in enumerate(orders):
            totals[order] = counts.total()
            for ngram, count in counts.items():
                first, second = highest[ngram]
                hits[order] += min(count, second if count == first else first)
        # BLEU holds a response against the reference nearest to it in length; of two, the shorter.
        _, nearest = min((abs(length - len(row)), length) for length in lengths - Counter([len(row)]))
        bleu = BLEU.compute_bleu(
            hits, totals, len(row), nearest, smooth_method="exp", effective_order=True, max_ngram_order=n
        )
        scores.append(1 - min(1.0, bleu.score / 100))
    return scores


def _hash(text: str) -> int:
    """64 bits of the text, the same in every process."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def _simhash(features: list[str], bits: int) -> int:
    """In each bit the majority of the features' hashes. Source: Charikar 2002."""
    hashes = [_hash(feature) for feature in features]
    return sum((2 * sum(h >> bit & 1 for h in hashes) > len(hashes)) << bit for bit in range(bits))
