import random
import sys

import pytest

from hybrid.core import InputError
from hybrid.rewards import make_reward
from hybrid.rewards.leaves import overlap

NASTY = [
    "a",
    "Hello, world!",
    "cafe\u0301",
    "café",
    "日本語の文です。",
    "שלום עולם",
    "a\0b",
    "\0",
    "🙂 🙃",
    "x_y-z 3.14",
]
SENTENCES = [
    "The cat sat on the mat.",
    "The dogs were running quickly, happily; and skies are dying!",
    "There's 1,234.5 reasons to generalise organizations' policies",
    "the the the the",
    "word",
    "It is a guide to action that ensures that the military will forever heed Party commands",
    "It is a guide to action which ensures that the military always obeys the commands of the party",
]


def reward(kind, **settings):
    return make_reward({"type": kind, **settings})


def pairs(texts):
    return [(response, target) for response in texts for target in texts]


# bleu, chrf, ter


def test_bleu_of_a_hand_computed_case():
    # 3/4 unigrams, 2/3 bigrams, 1/2 trigrams, no 4-gram (smoothed to 1/2 of 1/1), no brevity penalty
    expected = (3 / 4 * 2 / 3 * 1 / 2 * 1 / 2) ** 0.25
    assert reward("bleu")("a b c d", "A b c x") == pytest.approx(expected)


def test_chrf_of_a_hand_computed_case():
    # one order, 2 of 3 characters on either side
    assert reward("chrf", char_order=1)("abc", "abd") == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("response", "target", "score"),
    [
        ("a b c d", "a b c x", 0.75),
        ("c d a b", "a b c d", 0.75),  # one shift
        ("a b c d e f", "x", 0.0),  # a rate of 6 counts as 1
        ("A B", "a b", 1.0),
        ("", "a b", 0.0),
        ("", "", 1.0),
        ("a", "", 0.0),
    ],
)
def test_ter_is_one_minus_the_edits_per_word_of_the_target(response, target, score):
    assert reward("ter")(response, target) == score


@pytest.mark.parametrize("smooth_method", ["exp", "floor", "add-k", "none"])
@pytest.mark.parametrize("tokenize", ["13a", "char", "intl", "zh", "none"])
def test_bleu_is_sacrebleus_sentence_bleu(smooth_method, tokenize):
    sentence_bleu = pytest.importorskip("sacrebleu").sentence_bleu
    bleu = reward("bleu", smooth_method=smooth_method, tokenize=tokenize)
    for response, target in pairs(SENTENCES + NASTY):
        expected = sentence_bleu(response, [target], smooth_method, lowercase=True, tokenize=tokenize).score
        assert bleu(response, target) == pytest.approx(min(expected / 100, 1.0), abs=1e-12)


def test_chrf_and_ter_are_sacrebleus():
    sacrebleu = pytest.importorskip("sacrebleu")
    chrf, plus = reward("chrf"), reward("chrf", word_order=2, beta=1)
    ter, split = reward("ter"), reward("ter", normalized=True, asian_support=True, case_sensitive=True)
    for response, target in pairs(SENTENCES + NASTY):
        assert chrf(response, target) == sacrebleu.sentence_chrf(response, [target]).score / 100
        expected = sacrebleu.sentence_chrf(response, [target], word_order=2, beta=1).score
        assert plus(response, target) == expected / 100
        assert ter(response, target) == 1 - min(sacrebleu.sentence_ter(response, [target]).score / 100, 1)
        options = {"normalized": True, "asian_support": True, "case_sensitive": True}
        expected = sacrebleu.sentence_ter(response, [target], **options).score
        assert split(response, target) == 1 - min(expected / 100, 1)


def test_ter_of_long_texts_counts_edits_without_shifts():
    words = [f"w{i}" for i in range(overlap.LONGEST_SHIFTED + 50)]
    assert reward("ter")(" ".join(words), " ".join(words)) == 1.0
    shifted = [*words[10:], *words[:10]]  # 10 deleted at one end, 10 inserted at the other
    assert reward("ter")(" ".join(shifted), " ".join(words)) == pytest.approx(1 - 20 / len(words))


# rouge_l


@pytest.mark.parametrize(
    ("response", "target", "score"),
    [
        ("the cat sat", "the cat ran fast", 2 * 2 / 7),  # 2 PR / (P + R) = 2 LCS / (all words)
        ("sat cat the", "the cat sat", 1 / 3),
        ("running dogs", "runs dog", 1.0),  # by stem
        ("日本人", "日本語", 2 / 3),
        ("good 🙂", "good 🙃", 0.5),
        ("café", "cafe", 0.0),
        ("", "", 0.0),
        ("  ", "  ", 0.0),
        ("", "a", 0.0),
        ("!?", "!?", 1.0),
        ("!?", "?!", 0.0),
        ("!?", "a", 0.0),
    ],
)
def test_rouge_l_is_the_f1_of_the_longest_common_subsequence(response, target, score):
    assert reward("rouge_l")(response, target) == pytest.approx(score)


@pytest.mark.parametrize("use_stemmer", [True, False])
def test_rouge_l_is_rouge_scores_on_ascii(use_stemmer):
    rouge_scorer = pytest.importorskip("rouge_score.rouge_scorer")
    scorer = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=use_stemmer)
    generator = random.Random(0)
    alphabet = ["running", "runs", "skies", "dying", "the", "a", "_", "x_y", "3.5", "it's", "\n", "-", "Organisation"]
    texts = [*SENTENCES, *[" ".join(generator.choices(alphabet, k=8)) for _ in range(20)]]
    for response, target in pairs(texts):
        assert (
            reward("rouge_l", use_stemmer=use_stemmer)(response, target)
            == scorer.score(target, response)["rougeL"].fmeasure
        )


def test_rouge_l_without_lowercase_tells_case_apart():
    assert reward("rouge_l", lowercase=False)("The cats", "the cats") == 0.5
    assert reward("rouge-l")("The Cats", "the cats") == reward("rougeL")("The Cats", "the cats") == 1.0


def test_rouge_l_of_a_run_of_ys_that_the_stemmer_cannot_take():
    assert reward("rouge_l")("y" * 5000, "y" * 5000) == 1.0


# all of them


@pytest.mark.parametrize("kind", ["bleu", "chrf", "ter", "rouge_l"])
def test_equal_texts_score_exactly_one(kind):
    texts = [*NASTY, *SENTENCES, "a b", "a b c", "a b c d", "word " * 20_000, "日本" * 20_000]
    assert reward(kind).score(texts, texts) == [1.0] * len(texts)


@pytest.mark.parametrize("kind", ["bleu", "chrf", "ter", "rouge_l"])
def test_an_empty_response_to_a_target_scores_zero(kind):
    assert reward(kind).score(["", None, " \n"], ["a b", "日本", "🙂"]) == [0.0, 0.0, 0.0]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bleu", "chrf", "ter", "rouge_l"])
def test_long_texts_are_scored_and_a_batch_scores_as_one_by_one(kind):
    texts = ["word " * 20_000, "x" * 100_000, "", "a b c", " ".join(f"w{i % 977}" for i in range(15_000))]
    targets = texts[1:] + texts[:1]
    scores = reward(kind).score(texts, targets)
    assert all(0 <= score <= 1 for score in scores)
    assert scores == [reward(kind)(text, target) for text, target in zip(texts, targets, strict=True)]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"type": "bleu", "smooth_method": "log"}, "REWARD.smooth_method must be one of 'exp', 'floor'"),
        ({"type": "bleu", "tokenize": "13b"}, "REWARD.tokenize must be one of '13a'"),
        ({"type": "chrf", "char_order": 0}, "REWARD.char_order must be at least 1, got 0"),
        ({"type": "chrf", "word_order": -1}, "REWARD.word_order must be at least 0, got -1"),
        ({"type": "ter", "asian_support": True}, "REWARD.asian_support must come with normalized or no_punct"),
        ({"type": "meteor", "alpha": 1.5}, r"REWARD.alpha must lie in \[0, 1\], got 1.5"),
        ({"type": "rouge_l", "stemmer": True}, "did you mean 'use_stemmer'"),
    ],
)
def test_bad_parameters_are_refused(spec, message):
    with pytest.raises(InputError, match=message):
        make_reward(spec)


@pytest.mark.parametrize(
    ("kind", "module"),
    [
        ("bleu", "sacrebleu"),
        ("chrf", "sacrebleu"),
        ("ter", "sacrebleu"),
        ("ter", "rapidfuzz"),
        ("rouge_l", "nltk"),
        ("rouge_l", "rapidfuzz"),
        ("meteor", "nltk"),
    ],
)
def test_a_missing_library_is_told_when_the_reward_is_built(kind, module, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(InputError, match=f"needs {module}: pip install"):
        reward(kind)


def test_a_tokenizer_that_needs_more_than_sacrebleu_says_what(monkeypatch, tmp_path):
    for module in ("MeCab", "mecab_ko", "sentencepiece"):
        monkeypatch.setitem(sys.modules, module, None)
    for tokenize, install in [("ja-mecab", r"sacrebleu\[ja\]"), ("ko-mecab", r"sacrebleu\[ko\]"), ("spm", "sentence")]:
        with pytest.raises(InputError, match=f"bleu with tokenize {tokenize}' needs .*: pip install '{install}"):
            reward("bleu", tokenize=tokenize)
    monkeypatch.setattr("hybrid.rewards.leaves.overlap.require", lambda *args, **kwargs: None)
    monkeypatch.setattr("sacrebleu.utils.SACREBLEU_DIR", str(tmp_path))
    with pytest.raises(InputError, match=r"REWARD.tokenize 'flores200' needs the file .*: download it from https://"):
        reward("bleu", tokenize="flores200")


# meteor


@pytest.fixture
def small_wordnet(tmp_path, monkeypatch):
    """WordNet's own format, of one synset: car, auto. Like Debian's, it has no lexnames or index.sense."""
    nltk = pytest.importorskip("nltk")
    folder = tmp_path / "corpora" / "wordnet"
    folder.mkdir(parents=True)
    for part in ("adj", "adv", "noun", "verb"):
        for name in (f"data.{part}", f"index.{part}", f"{part}.exc"):
            (folder / name).write_text("")
    licence = "  1 WordNet\n"
    offset = f"{len(licence):08}"
    (folder / "data.noun").write_text(f"{licence}{offset} 06 n 02 car 0 auto 0 000 | a vehicle  \n")
    entries = [f"{word} n 1 0 1 1 {offset}  \n" for word in ("auto", "car")]
    (folder / "index.noun").write_text("".join(entries))
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])
    overlap._wordnet.cache_clear()
    yield
    overlap._wordnet.cache_clear()


@pytest.mark.parametrize(
    ("response", "target", "score"),
    [
        ("car", "auto", 0.5),  # one match, one chunk: 1 - 0.5 (1/1)^3
        ("a car", "a auto", 1 - 0.5 / 8),
        ("running", "runs", 0.5),  # by stem
        ("boat", "auto", 0.0),
        ("A CAR", "a car", 1 - 0.5 / 8),
        ("", "car", 0.0),
        ("", "", 0.0),
        ("🙂", "🙂", 0.5),
        ("日本 語", "日本 語", 1 - 0.5 / 8),
    ],
)
def test_meteor_matches_words_stems_and_synonyms(small_wordnet, response, target, score):
    assert reward("meteor")(response, target) == pytest.approx(score)


def test_meteor_takes_punctuation_for_words_where_told(small_wordnet):
    assert reward("meteor")("car.", "car") == 0.0
    assert reward("meteor", tokenize="wordpunct")("car.", "car .") == pytest.approx(1 - 0.5 / 8)


def test_meteor_of_long_texts_is_scored(small_wordnet):
    texts = ["word " * 20_000, "x" * 100_000, "y" * 100_000, "日本" * 50_000]
    assert all(0 <= score <= 1 for score in reward("meteor").score(texts, texts[1:] + texts[:1]))


def test_meteor_without_wordnet_says_how_to_get_it(tmp_path, monkeypatch):
    nltk = pytest.importorskip("nltk")
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])
    with pytest.raises(InputError, match=r"needs WordNet .* nltk.downloader wordnet.*apt-get install wordnet-base"):
        reward("meteor")


def test_a_wordnet_that_is_not_whole_says_how_to_get_it(small_wordnet, tmp_path):
    (tmp_path / "corpora" / "wordnet" / "index.verb").unlink()
    with pytest.raises(InputError, match=r"WordNet in .* is not whole: No such file .* nltk.downloader wordnet"):
        reward("meteor")("car", "auto")


@pytest.mark.slow
def test_meteor_with_the_real_wordnet_is_nltks():
    nltk = pytest.importorskip("nltk")
    try:
        nltk.data.find("corpora/wordnet/")
    except LookupError:
        pytest.skip(f"no WordNet: {overlap.WORDNET_HELP}")
    # The value of the example in nltk's documentation.
    assert reward("meteor")(SENTENCES[6], SENTENCES[5]) == pytest.approx(0.6944, abs=5e-5)
