import math

import pytest
import torch
from rewards.checkpoints import NASTY, SENTIMENT, bert, plain_logits

from hybrid.core import InputError
from hybrid.rewards import make_reward
from hybrid.rewards.leaves.bias import IDENTITIES, swapped

# float32 sums in another order where rows are padded.
ROUNDING = 1e-5


def bias(**settings):
    return make_reward({"type": "bias", **settings})


@pytest.mark.parametrize(
    ("text", "other"),
    [
        ("he is a doctor", "she is a doctor"),
        ("She told HIM: the man left.", "He told HER: the woman left."),
        ("The father's sons, his books.", "The mother's daughters, her books."),
        ("MEN and Boys", "WOMEN and Girls"),
        ("a\u0301 hero, the theme; shed", None),
        ("日本語 🙂", None),
        ("", None),
    ],
)
def test_gender_terms_are_swapped_whole_and_in_their_case(text, other):
    assert swapped(text) == ([other] if other else [])


def test_a_group_of_several_is_swapped_for_each_of_the_others():
    assert swapped("The Muslim neighbour") == [
        f"The {group} neighbour" for group in ("Jewish", "Hindu", "Buddhist", "Christian")
    ]


def test_every_line_of_a_kind_names_as_many_groups():
    assert all(len({len(line.split()) for line in lines}) == 1 for lines in IDENTITIES.values())


def test_counterfactual_is_the_distance_to_the_mean_of_the_other_groups(tmp_path):
    folder = bert(tmp_path, ["NEUTRAL", "BIASED"])

    def p(text):
        return float(plain_logits(folder, text).softmax(-1)[1])

    reward = bias(model=folder, method="counterfactual")
    gap = abs(p("the man is bad") - p("the woman is bad"))
    assert gap > 0.01
    assert reward("the man is bad") == pytest.approx(1 - gap, abs=ROUNDING)
    both = "he is homosexual"
    gap = abs(p(both) - sum(map(p, ["she is homosexual", "he is bisexual", "he is heterosexual"])) / 3)
    scores = reward.score(["the cat is bad", both, "the man is bad", ""])
    assert scores == pytest.approx([1.0, 1 - gap, reward("the man is bad"), 1.0], abs=ROUNDING)


def test_counterfactual_not_inverted_is_the_gap(tmp_path):
    folder = bert(tmp_path, SENTIMENT)
    settings = {"model": folder, "label": "positive", "method": "counterfactual"}
    text = "he is good"
    assert bias(**settings, invert=False)(text) == pytest.approx(1 - bias(**settings)(text), abs=ROUNDING)


def test_the_classifiers_word_is_inverted(tmp_path):
    folder = bert(tmp_path, ["BIASED", "NEUTRAL"], logits=[math.log(3), 0.0])
    assert bias(model=folder)("text") == pytest.approx(1 / 4)
    assert bias(model=folder, invert=False)("text") == pytest.approx(3 / 4)


@pytest.mark.parametrize("method", ["classifier", "counterfactual"])
def test_nasty_texts_have_scores_within_bounds(tmp_path, method):
    reward = bias(model=bert(tmp_path, SENTIMENT), label="negative", method=method)
    assert torch.tensor(reward.score([*NASTY, "he " * 30_000])).clamp(0, 1).sub(0.5).abs().le(0.5).all()


def test_an_unknown_method_is_refused():
    with pytest.raises(InputError, match=r"REWARD.method must be one of 'classifier', 'counterfactual', got 'swap'"):
        bias(method="swap")
