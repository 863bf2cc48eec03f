import sys

import pytest

from hybrid.core import InputError
from hybrid.rewards import make_reward


def test_score_is_vaders_compound():
    reward = make_reward({"type": "sentiment_lexicon"})
    texts = ["I love this!", "This is terrible.", "The film was not good.", "table", ""]
    assert reward.score(texts) == [0.6696, -0.4767, -0.3412, 0.0, 0.0]


def test_prompt_and_response_are_scored_as_one_text():
    reward = make_reward({"type": "sentiment_lexicon", "field": "prompt_and_response"})
    # "not" in the prompt turns "good" around.
    assert reward("good.", prompt="The film was not") == -0.3412


def test_an_unknown_field_is_refused():
    with pytest.raises(InputError, match=r"REWARD.field must be one of 'response', 'prompt_and_response'"):
        make_reward({"type": "sentiment_lexicon", "field": "target"})


@pytest.mark.parametrize("text", ["\U0001f642" * 100_000, "not good " * 20_000, "but good " * 20_000, "w" * 100_000])
def test_a_long_text_is_scored_by_its_beginning(text):
    reward = make_reward({"type": "vader"})
    assert -1 <= reward(text) <= 1
    assert reward("\U0001f642" * 100_000) > 0.9


def test_without_vader_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "vaderSentiment", None)
    with pytest.raises(InputError, match="'sentiment_lexicon' needs vaderSentiment: pip install 'vaderSentiment'"):
        make_reward({"type": "vader"})
