import pytest

from hybrid.core import InputError
from hybrid.rewards import make_reward


class Halves:
    """A tokenizer of two characters a token."""

    def encode(self, text, add_special_tokens=True):
        return list(range(0, len(text), 2)) + [0] * add_special_tokens


def length_window(**settings):
    return make_reward({"type": "length_window", **settings})


@pytest.mark.parametrize(
    ("num_words", "score"),
    [(0, 0.0), (1, 0.25), (3, 0.75), (4, 1.0), (10, 1.0), (12, 0.8), (20, 0.0), (50, 0.0)],
)
def test_score_is_one_inside_and_falls_off_linearly_outside(num_words, score):
    assert length_window(min=4, max=10)("word " * num_words) == pytest.approx(score)


def test_defaults_are_thirty_to_two_hundred_words():
    reward = length_window()
    assert reward.score(["w " * n for n in (15, 30, 200, 300)]) == [0.5, 1.0, 1.0, 0.5]


def test_chars_count_every_character():
    assert length_window(min=4, max=4, unit="chars")("a b") == 0.75


def test_tokens_count_no_special_tokens():
    assert length_window(min=4, max=4, unit="tokens", tokenizer=Halves())("abcdef") == 0.75


def test_with_min_zero_an_empty_response_is_inside():
    assert length_window(min=0)("") == 1.0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"min": -1}, "REWARD.min must be at least 0, got -1"),
        ({"min": 0, "max": 0}, r"REWARD.max must be at least 1 and at least min \(0\), got 0"),
        ({"min": 5, "max": 4}, r"REWARD.max must be at least 1 and at least min \(5\), got 4"),
        (
            {"unit": "tokens"},
            "REWARD.tokenizer must be given with unit 'tokens' and only then; unit is 'tokens'",
        ),
        ({"tokenizer": Halves()}, "REWARD.tokenizer must be given .* unit is 'words'"),
    ],
)
def test_bad_bounds_and_units_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        length_window(**settings)


@pytest.mark.slow
def test_a_tokenizer_that_cannot_be_loaded_is_refused_when_it_is_needed(tmp_path):
    reward = length_window(unit="tokens", tokenizer=str(tmp_path))
    with pytest.raises(InputError, match=r"^tokenizer .* cannot be loaded"):
        reward.setup()
    with pytest.raises(InputError, match=r"^tokenizer .* cannot be loaded"):
        reward("a")


def test_a_real_tokenizer_is_loaded_by_its_folder(stories):
    reward = length_window(min=4, max=9, unit="tokens", tokenizer=stories)
    assert reward("Once upon a time") == 1.0
