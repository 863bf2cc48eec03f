import math

import pytest

from hybrid.core import InputError
from hybrid.rewards import make_reward
from hybrid.rewards.leaves.readability import FORMULAS, Counts, _counts, _syllables

METRICS = list(FORMULAS)
EASY = "The cat sat on the mat. It was a red mat."
HARD = (
    "Notwithstanding considerable methodological heterogeneity, contemporary epidemiological investigations "
    "demonstrate statistically significant associations between occupational exposure and respiratory morbidity."
)
# Counted by hand, from dictionaries' hyphenation.
SYLLABLES = {
    1: "the cat red me make makes walked called miles played queen eye you yes sea guard friend field don't can't one "
    "through strengths grade house times piece changed",
    2: "wanted needed boxes churches table tables little people hundred settled horses places changes beyond player "
    "playing flying going being nation special social language science client quiet patient happen poem rhythm didn't "
    "something sometimes careful lovely movement statement safety moment water because before café sentence "
    "creatures marriage fluid purple ninety lion cookie movie series fuel diet dying",
    3: "violet banana studying idea area radio period opinion various serious delicious religious medium video actual "
    "quality happier happiest easier creative tourism government important understand beautiful computer family "
    "example animal violin theory elephant syllable reaction",
    4: "material society experience education geography analysis hypothesis complexity economic intelligence",
    5: "university readability organization international photosynthesis approximately",
    6: "responsibility revolutionary",
}


def readability(**settings):
    return make_reward({"type": "readability", **settings})


@pytest.mark.parametrize("count", SYLLABLES)
def test_syllables_are_counted_as_a_dictionary_does(count):
    assert {word: _syllables(word) for word in SYLLABLES[count].split()} == dict.fromkeys(
        SYLLABLES[count].split(), count
    )


def test_a_text_is_counted_by_sentence_word_letter_and_syllable():
    # "Dr." and "3.5" end no sentence; ex-pect-ed and im-por-tant are long, the first only by its ending.
    assert _counts("Dr. Smith expected 3.5 cats!\n\nIt is an important well-known rule") == Counts(
        sentences=2, words=12, characters=49, syllables=16, polysyllables=2, complex_words=1
    )


def test_coleman_liau_gives_its_authors_abstract_grade_14_5():
    counts = Counts(sentences=5, words=119, characters=639, syllables=0, polysyllables=0, complex_words=0)
    assert FORMULAS["coleman_liau"](counts) == pytest.approx(14.5, abs=0.05)


@pytest.mark.parametrize(
    ("metric", "value"),
    [  # EASY: 2 sentences, 11 words, 11 syllables, 29 letters
        ("flesch_kincaid", 0.39 * 5.5 + 11.8 - 15.59),
        ("flesch_reading_ease", 206.835 - 1.015 * 5.5 - 84.6),
        ("gunning_fog", 0.4 * 5.5),
        ("coleman_liau", 5.88 * 29 / 11 - 29.6 * 2 / 11 - 15.8),
        ("automated_readability", 4.71 * 29 / 11 + 0.5 * 5.5 - 21.43),
        ("smog", 3.1291),
        ("linsear_write", 5.5 / 2 - 1),
    ],
)
def test_a_text_of_the_asked_for_grade_scores_one_and_half_at_the_tolerance(metric, value):
    scores = [readability(metric=metric, target=value + offset, tolerance=2)(EASY) for offset in (0, 2, -2, 6)]
    assert scores == pytest.approx([1, 0.5, 0.5, 0.25])


def test_linsear_write_halves_what_is_over_twenty():
    counts = Counts(sentences=1, words=24, characters=0, syllables=0, polysyllables=3, complex_words=0)
    assert FORMULAS["linsear_write"](counts) == 15


@pytest.mark.parametrize("metric", METRICS)
def test_of_two_texts_the_one_nearer_to_the_target_scores_higher(metric):
    easy, hard = (90, -150) if metric == "flesch_reading_ease" else (2, 25)
    assert readability(metric=metric, target=easy)(EASY) > readability(metric=metric, target=easy)(HARD)
    assert readability(metric=metric, target=hard)(EASY) < readability(metric=metric, target=hard)(HARD)


def test_defaults_are_plain_english():
    assert (readability().target, readability().tolerance) == (8, 3)
    ease = readability(metric="flesch_reading_ease")
    assert (ease.target, ease.tolerance) == (65, 20)


@pytest.mark.parametrize("text", ["", None, "...", "🙂 ❤️", "\0"])
def test_a_text_without_a_word_scores_zero(text):
    assert readability()(text) == 0.0


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(
    "text",
    ["東京は日本の首都です。", "שלום עולם.", "e\u0301" * 50, "word " * 20_000, "x" * 100_000, ". " * 50_000 + "a"],
)
def test_any_text_has_a_score_between_zero_and_one(metric, text):
    score = readability(metric=metric)(text)
    assert math.isfinite(score) and 0 <= score <= 1


def test_a_run_of_marks_is_read_once():
    assert _counts("." * 100_000 + "x" + "!?" * 50_000 + " Yes").sentences == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"metric": "flesch"}, "REWARD.metric must be one of 'flesch_kincaid', "),
        ({"target": "8"}, "REWARD.target must be "),
        ({"target": math.nan}, "REWARD.target must be finite, got nan"),
        ({"tolerance": 0}, "REWARD.tolerance must be finite and above 0, got 0"),
        ({"tolerance": math.inf}, "REWARD.tolerance must be finite and above 0, got inf"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        readability(**settings)
