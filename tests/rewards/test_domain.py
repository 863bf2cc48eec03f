import math

import pytest
from rewards.checkpoints import NASTY, NLI, bert

from hybrid.core import InputError
from hybrid.rewards import make_reward
from hybrid.rewards.leaves.domain import LEXICONS

PASSAGES = {
    "medical": "The patient presented with fever and a persistent cough; blood tests suggested pneumonia, and the "
    "doctor prescribed an antibiotic for the infection.",
    "legal": "The defendant moved to dismiss the complaint, but the court held that the plaintiff had stated a claim "
    "for breach of contract and negligence under the statute.",
    "scientific": "We measured the velocity of the particles and fitted a linear model; the results confirm the "
    "hypothesis that diffusion depends on temperature.",
    "tale": "Once upon a time a little girl named Lily went to the park with her mom and played on the swing all day.",
}


def domain(name="medical", **settings):
    return make_reward({"type": "domain", "name": name, **settings})


@pytest.mark.parametrize("name", LEXICONS)
def test_a_passage_of_the_field_scores_one_and_those_of_others_little(name):
    scores = dict(zip(PASSAGES, domain(name).score(list(PASSAGES.values())), strict=True))
    assert scores.pop(name) == 1.0
    assert max(scores.values()) <= 0.25


@pytest.mark.parametrize(
    ("text", "score"),
    [
        # Shares of 1 in 10, 1 in 8, 1 in 5 and 1 in 2 content words; "the" and "and" are none.
        ("fever one two three four five six seven eight nine", 0.5),
        ("the Fevers and one two three four five six seven", 0.625),
        ("fever one two three four", 1.0),
        ("fever cat", 1.0),
        ("cat", 0.0),
        ("", 0.0),
        ("the", 0.0),
    ],
)
def test_the_lexicons_score_is_the_share_of_terms_over_a_fifth(text, score):
    assert domain()(text) == pytest.approx(score)


@pytest.mark.parametrize("name", LEXICONS)
def test_a_lexicon_is_of_at_least_a_hundred_different_words(name):
    terms = LEXICONS[name].split()
    assert len(terms) == len(set(terms)) >= 100


@pytest.mark.parametrize("text", NASTY)
def test_nasty_texts_have_scores_within_bounds(text):
    assert 0 <= domain()(text) <= 1


def test_a_classifier_with_the_fields_own_label_gives_its_probability(tmp_path):
    folder = bert(tmp_path, ["Legal", "Medical"], logits=[0.0, math.log(3)])
    assert domain(method="classifier", model=folder)("text") == pytest.approx(3 / 4)
    assert domain("legal", method="classifier", model=folder)("text") == pytest.approx(1 / 4)


def test_a_classifier_gives_the_probability_of_the_label_asked_for(tmp_path):
    folder = bert(tmp_path, ["health", "sports"], logits=[math.log(3), 0.0])
    assert domain(method="classifier", model=folder, label="HEALTH")("text") == pytest.approx(3 / 4)
    with pytest.raises(InputError, match="label must be one of the model's: health, sports"):
        domain(method="classifier", model=folder).setup()


def test_a_model_of_inference_weighs_entailment_against_contradiction(tmp_path):
    folder = bert(tmp_path, NLI, logits=[0.0, 5.0, math.log(3)])
    assert domain(method="classifier", model=folder)("text") == pytest.approx(3 / 4)


def test_the_lexicon_loads_no_model_at_setup():
    reward = domain()
    reward.setup("cpu")
    assert not hasattr(reward, "_loaded")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "sports"}, "REWARD.name must be one of 'medical', 'legal', 'scientific', got 'sports'"),
        ({"method": "rubric"}, "REWARD.method 'rubric' is the reward judge's"),
        ({"method": "words"}, "REWARD.method must be one of"),
    ],
)
def test_bad_parameters_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        domain(**settings)
