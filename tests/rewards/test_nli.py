import math

import pytest
from rewards.checkpoints import NASTY, NLI, bert, plain_logits

from hybrid.core import InputError
from hybrid.rewards import make_reward

# Softmax of these is contradiction 1/8, neutral 2/8, entailment 5/8.
LOGITS = [0.0, math.log(2), math.log(5)]
# float32 sums in another order where rows are padded.
ROUNDING = 1e-5


def truth(**settings):
    return make_reward({"type": "truth_nli", **settings})


@pytest.mark.parametrize(
    ("settings", "score"),
    [
        ({}, 4 / 8),
        ({"aggregation": "p_e_minus_p_c"}, 4 / 8),
        ({"aggregation": "p_e"}, 5 / 8),
        ({"aggregation": "p_e_plus_half_neutral"}, 6 / 8),
    ],
)
def test_the_aggregations_of_five_two_and_one_eighths(tmp_path, settings, score):
    folder = bert(tmp_path, NLI, logits=LOGITS)
    assert truth(model=folder, **settings)("the cat is good", "the cat") == pytest.approx(score)


def test_p_e_minus_p_c_is_negative_for_a_contradiction(tmp_path):
    folder = bert(tmp_path, [*reversed(NLI)], logits=LOGITS)
    assert truth(model=folder)("the cat is good", "the cat") == pytest.approx(-4 / 8)


@pytest.mark.parametrize(
    "texts", [("", "good"), ("good", ""), ("", ""), (" \n\t", "good"), (None, "good"), ("good", None)]
)
@pytest.mark.parametrize("aggregation", ["p_e_minus_p_c", "p_e", "p_e_plus_half_neutral"])
def test_one_half_where_either_text_is_empty(tmp_path, texts, aggregation):
    assert truth(model=bert(tmp_path, NLI, logits=LOGITS), aggregation=aggregation)(*texts) == 0.5


def test_the_target_is_the_premise_and_the_response_the_hypothesis(tmp_path):
    folder = bert(tmp_path, NLI)
    responses = [text for text in NASTY if text.strip()]
    target = "the cat is a happy cat"
    expected = []
    for response in responses:
        contradiction, _, entailment = plain_logits(folder, target, response).softmax(-1).tolist()
        expected.append(entailment - contradiction)
    reward = truth(model=folder)
    assert reward.score(responses, [target] * len(responses)) == pytest.approx(expected, abs=ROUNDING)
    assert [reward(response, target) for response in responses] == pytest.approx(expected, abs=ROUNDING)
    assert reward(responses[0], target) != pytest.approx(reward(target, responses[0]), abs=1e-3)


def test_nasty_targets_have_scores_within_bounds(tmp_path):
    scores = truth(model=bert(tmp_path, NLI)).score(["the cat is good"] * len(NASTY), NASTY)
    assert all(-1 <= score <= 1 for score in scores)


def test_of_several_references_the_best_counts(tmp_path):
    reward = truth(model=bert(tmp_path, NLI))
    targets = ["the cat is good", "the dog is bad", "sad"]
    assert reward("good", targets) == pytest.approx(max(reward("good", target) for target in targets), abs=ROUNDING)


def test_labels_name_the_outputs_of_a_model_that_does_not(tmp_path):
    folder = bert(tmp_path, ["LABEL_0", "LABEL_1", "LABEL_2"], logits=LOGITS)
    with pytest.raises(InputError, match="labels must name the model's 3 outputs, which are called LABEL_0"):
        truth(model=folder).setup()
    assert truth(model=folder, labels=NLI)("good", "good") == pytest.approx(4 / 8)


def test_a_model_of_two_labels_answers_to_p_e_alone(tmp_path):
    folder = bert(tmp_path, ["entailment", "not_entailment"], logits=[math.log(3), 0.0])
    assert truth(model=folder, aggregation="p_e")("good", "good") == pytest.approx(3 / 4)
    with pytest.raises(InputError, match="aggregation 'p_e_minus_p_c' needs a model"):
        truth(model=folder).setup()


def test_defaults_are_those_of_the_spec_and_load_nothing():
    reward = make_reward({"type": "truthfulness"})
    assert (reward.model, reward.aggregation) == ("roberta-large-mnli", "p_e_minus_p_c")


def test_an_unknown_aggregation_is_refused():
    with pytest.raises(InputError, match=r"REWARD.aggregation must be one of 'p_e_minus_p_c'"):
        truth(aggregation="mean")
