import sys
import time

import pytest

from hybrid.core import InputError
from hybrid.rewards import make_reward
from hybrid.rewards.base import RewardTimeout

NASTY = [
    "",
    " ",
    "a",
    "🙂🙂",
    "👩‍👩‍👧",
    "cafe\u0301",
    "café",
    "日本語の文",
    "שלום עולם",
    "a\0b",
    "\0",
    "\ud800x",
    "Straße İ",
]
LONG = ["word " * 20_000, "x" * 100_000, "日本" * 50_000]


def reward(kind, **settings):
    return make_reward({"type": kind, **settings})


@pytest.mark.parametrize(
    ("settings", "response", "target", "score"),
    [
        ({}, "Paris", "Paris", 1.0),
        ({}, "Paris", "paris", 0.0),
        ({}, " Paris", "Paris", 0.0),
        ({}, None, "", 1.0),
        ({}, "café", "cafe\u0301", 0.0),
        ({}, "Paris", ["London", "Paris"], 1.0),
        ({"lowercase": True}, "PARIS", "paris", 1.0),
        ({"lowercase": True}, "PARIS ", "paris", 0.0),
        ({"strip": True}, "\n Paris\t", "Paris", 1.0),
        ({"strip": True, "lowercase": True}, " PARIS", "paris ", 1.0),
    ],
)
def test_exact_match_is_one_for_equal_texts_and_nothing_else(settings, response, target, score):
    assert reward("exact_match", **settings)(response, target) == score


def test_keyword_count_is_the_share_of_the_keywords_present():
    keywords = reward("keyword_count", keywords=["cat", "dog", "red fish", "owl"])
    assert keywords("A CAT, a cat and a red\n  fish.") == 0.5
    assert keywords("") == 0.0
    assert keywords(None) == 0.0


def test_keyword_count_unnormalized_is_how_many_are_present():
    assert reward("keyword_count", keywords=["cat", "dog", "owl"], normalize=False)("cat cat owl") == 2.0


@pytest.mark.parametrize(
    ("keyword", "text", "present"),
    [
        ("cat", "category", False),
        ("cat", "a cat's", True),
        ("cat", "cat_food", False),
        ("cat", "cat2", False),
        ("c++", "I like C++.", True),
        ("c++", "c++11", True),
        ("c++", "abc++", False),
        (".net", "asp.net", True),
        ("!", "great!", True),
        ("cafe", "cafe\u0301", False),
        ("straße", "STRASSE", True),
        ("東京", "いま東京へ", True),
        ("GPU", "このGPUは", True),
        ("แมว", "ฉันรักแมวมาก", True),
        ("שלום", "שלום עולם", True),
        ("🙂", "a🙂b", True),
    ],
)
def test_a_keyword_is_a_whole_word_unless_its_script_has_no_spaces(keyword, text, present):
    assert reward("keyword_count", keywords=[keyword])(text) == present


def test_without_whole_words_a_part_of_a_word_is_enough():
    assert reward("keyword_count", keywords=["cat"], whole_words=False)("Category") == 1.0


@pytest.mark.parametrize("text", LONG)
def test_many_keywords_are_sought_in_a_long_text(text):
    assert reward("keyword_count", keywords=["no such", "xx", "c++"])(text) == 0.0


@pytest.mark.parametrize(
    ("settings", "response", "score"),
    [
        ({"pattern": r"\d{4}"}, "in 1969", 1.0),
        ({"pattern": r"\d{4}"}, "in 69", 0.0),
        ({"pattern": "answer:"}, "ANSWER: 3", 1.0),
        ({"pattern": "answer:", "ignore_case": False}, "ANSWER: 3", 0.0),
        ({"pattern": r"^\p{Hiragana}+$"}, "ひらがな", 1.0),
        ({"pattern": r"\x00"}, "a\0", 1.0),
        ({"pattern": "a"}, None, 0.0),
    ],
)
def test_regex_presence_is_one_where_the_pattern_matches_somewhere(settings, response, score):
    assert reward("regex_presence", **settings)(response) == score


def test_a_search_that_would_never_end_is_stopped_and_is_no_zero():
    began = time.perf_counter()
    with pytest.raises(RewardTimeout, match=r"'\(a\|aa\)\+\$' took longer than 0.1 s"):
        reward("regex_presence", pattern="(a|aa)+$", timeout=0.1)("a" * 60 + "b")
    assert time.perf_counter() - began < 5  # without the time-out it takes years


def test_a_stopped_search_gets_what_on_error_says():
    spec = {"pattern": "(a|aa)+$", "timeout": 0.05, "on_error": "value", "error_value": -1}
    assert reward("regex_presence", **spec).score(["a" * 60 + "b", "a"]) == [-1.0, 1.0]


@pytest.mark.parametrize(
    ("settings", "response", "target", "score"),
    [
        ({}, "the cat sat", "The cat ran", 0.5),  # the, cat of the, cat, sat, ran
        ({"lowercase": False}, "the cat sat", "The cat ran", 0.2),
        ({}, "a a a", "a", 1.0),
        ({}, "", "", 1.0),
        ({}, " ", None, 1.0),
        ({}, "", "a", 0.0),
        ({}, "日本 語", "日本 人", 1 / 3),
    ],
)
def test_jaccard_is_shared_words_over_all_words(settings, response, target, score):
    assert reward("jaccard", **settings)(response, target) == pytest.approx(score)


@pytest.mark.parametrize(
    ("response", "target", "distance", "score"),
    [
        ("kitten", "sitting", 3, 1 - 3 / 7),
        ("", "abc", 3, 0.0),
        ("", "", 0, 1.0),
        (None, None, 0, 1.0),
        ("café", "cafe\u0301", 2, 0.6),
        ("🙂a", "🙃a", 1, 0.5),
    ],
)
def test_levenshtein_is_one_minus_the_distance_over_the_longer_length(response, target, distance, score):
    assert reward("levenshtein")(response, target) == pytest.approx(score)
    assert reward("levenshtein", normalize=False)(response, target) == -distance


def test_levenshtein_of_nasty_texts_is_the_table_of_the_textbook():
    for left in NASTY[:-2]:  # the base replaces a lone surrogate
        for right in NASTY[:-2]:
            assert reward("levenshtein", normalize=False)(left, right) == -distance_by_table(left, right)


def distance_by_table(left, right):
    row = list(range(len(right) + 1))
    for i, a in enumerate(left, 1):
        above, row[0] = row[0], i
        for j, b in enumerate(right, 1):
            above, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, above + (a != b))
    return row[-1]


@pytest.mark.slow
def test_levenshtein_of_two_long_texts_is_exact():
    assert reward("levenshtein", normalize=False)("ab" * 50_000, "ba" * 50_000) == -2.0
    assert reward("levenshtein")("x" * 100_000, "word " * 20_000) == 0.0


@pytest.mark.parametrize("kind", ["exact_match", "jaccard", "levenshtein"])
def test_equal_texts_score_one_and_one_sample_scores_as_in_a_batch(kind):
    texts = NASTY + LONG
    targets = texts[1:] + texts[:1]
    assert reward(kind).score(texts, texts) == [1.0] * len(texts)
    one_by_one = [reward(kind)(text, target) for text, target in zip(texts, targets, strict=True)]
    assert reward(kind).score(texts, targets) == one_by_one
    assert all(0 <= score <= 1 for score in one_by_one)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"type": "exact_match", "strip": 1}, "REWARD.strip must be bool, got 1"),
        ({"type": "keyword_count"}, "REWARD.keywords is missing"),
        ({"type": "keyword_count", "keywords": []}, "REWARD.keywords must hold at least one text"),
        (
            {"type": "keyword_count", "keywords": ["a", " "]},
            "REWARD.keywords must be texts that are not blank, got ' '",
        ),
        ({"type": "keyword_count", "keywords": "cat"}, "REWARD.keywords must be list"),
        ({"type": "regex_presence", "pattern": "a(b"}, r"REWARD.pattern 'a\(b' is no regular .* at position 3"),
        ({"type": "regex_presence", "pattern": "(" * 5000 + ")" * 5000}, "REWARD.pattern .* is nested too deeply"),
        ({"type": "regex_presence", "pattern": "a", "timeout": 0}, "REWARD.timeout must be above 0"),
        ({"type": "regex_presence", "pattern": "a", "timeout": float("nan")}, "REWARD.timeout must be above 0"),
        ({"type": "jaccard", "lowercas": True}, "did you mean 'lowercase'"),
    ],
)
def test_bad_parameters_are_refused(spec, message):
    with pytest.raises(InputError, match=message):
        make_reward(spec)


@pytest.mark.parametrize(
    ("spec", "module"),
    [
        ({"type": "levenshtein"}, "rapidfuzz"),
        ({"type": "keyword_count", "keywords": ["a"]}, "regex"),
        ({"type": "regex_presence", "pattern": "a"}, "regex"),
    ],
)
def test_a_missing_library_is_told_when_the_reward_is_built(spec, module, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(InputError, match=f"needs {module}: pip install"):
        make_reward(spec)


@pytest.mark.parametrize("spec", [{"type": "regex_presence"}, {"type": "format", "kind": "regex"}])
def test_an_empty_pattern_is_refused(spec):
    with pytest.raises(InputError, match=r"^REWARD.pattern must say what to look for, got the empty one"):
        make_reward({**spec, "pattern": ""})


@pytest.mark.parametrize("pattern", ["()", "a*", "|", "a|", "^", "$", "(?i)", "(foo)?"])
def test_a_pattern_that_any_text_matches_is_refused(pattern):
    with pytest.raises(InputError, match=r"^REWARD.pattern .* matches any text, at no character of it"):
        make_reward({"type": "regex_presence", "pattern": pattern})


@pytest.mark.parametrize(
    "pattern", ["^$", "^(?!.*bad)", r"(?<!\d)$", "(?=.*a)(?=.*b)", r"\b", " ", ".", r"^\s*$", "^[^x]*$"]
)
def test_a_pattern_that_says_something_is_taken(pattern):
    make_reward({"type": "regex_presence", "pattern": pattern})
