import subprocess
import sys

import pytest

from hybrid.core import InputError
from hybrid.rewards import make_reward

SPELLCHECKER = "spellchecker"


def spelling(**settings):
    pytest.importorskip(SPELLCHECKER)
    return make_reward({"type": "spelling", **settings})


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("The cat sat on the mat.", 1.0),
        ("THE CAT; (sat)", 1.0),
        ("Teh cat sat", 2 / 3),
        ("teh teh cat sat", 0.5),  # a word counts each time
        ("They've gone, don't you think? It isn't John\u2019s.", 1.0),
        ("a well-known wrod", 0.75),
        ("see https://xyzzy.qq/abcd www.xyzzy.qq me@xyzzy.qq @qwzx now", 1.0),
        ("In the 1990s, 21st of 3.14 or 1,000", 1.0),
        ("w0rd word", 0.5),
    ],
)
def test_score_is_the_share_of_known_words(text, score):
    assert spelling()(text) == pytest.approx(score)


@pytest.mark.parametrize("text", ["", None, "  \n", "42 3.14", "🙂 ❤️", "?!", "\0"])
def test_a_text_without_a_word_scores_zero(text):
    assert spelling()(text) == 0.0


def test_words_of_another_script_are_unknown():
    assert spelling().score(["東京は日本です", "שלום עולם", "the 東京"]) == pytest.approx([0, 0, 1 / 3])


def test_plain_words_are_judged_as_pyspellchecker_judges_them():
    text = "the quick brwon fox jumpd over a lazzy dog whenever photosynthesis occured in grreen leaves"
    from spellchecker import SpellChecker

    words = text.split()
    assert spelling()(text) == len(SpellChecker().known(words)) / len(words)


def test_accents_count_however_they_are_encoded():
    assert spelling().score(["café", "cafe\u0301"]) == [1.0, 1.0]


def test_other_languages_have_their_own_words():
    text = "L'homme qu'il aime est une bonne idée"
    assert spelling(language="fr")(text) == 1.0
    assert spelling(language="fr")("the wrod") < 1


def test_extra_words_are_known_too_in_any_case_and_with_apostrophes():
    text = "PyTorch's GPU, gpu"
    assert spelling()(text) == 0
    assert spelling(extra_words=["pytorch", "GPU"])(text) == 1


@pytest.mark.parametrize("text", ["word " * 20_000, "x" * 100_000, "x'" * 50_000, "@" * 100_000, "e\u0301" * 50_000])
def test_long_texts_have_a_score(text):
    assert 0 <= spelling()(text) <= 1


@pytest.mark.slow
def test_the_dictionary_is_read_when_first_needed():
    pytest.importorskip(SPELLCHECKER)
    code = "import sys; from hybrid.rewards import make_reward; make_reward({'type': 'spelling'}); "
    code += "assert 'spellchecker' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_unknown_language_is_refused():
    with pytest.raises(InputError, match=r"REWARD.language must be one of 'en', 'es'"):
        spelling(language="xx")


def test_without_pyspellchecker_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, SPELLCHECKER, None)
    with pytest.raises(InputError, match="'spelling' needs spellchecker: pip install 'pyspellchecker'"):
        make_reward({"type": "spelling"})
