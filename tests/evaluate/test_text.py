"""Text metrics against hand-computed numbers and against the libraries they come from."""

import math
import sys
from statistics import fmean

import pytest

from hybrid.core import InputError
from hybrid.evaluate import TEXT_METRICS, EvalConfig, evaluate_texts

RESPONSES = ["The cats were sitting on a mat.", "It rained all day", "No!", "", "a good film, and a funny one"]
TARGETS = ["The cat sat on the mat.", "It rained the whole day.", "Yes.", "Something.", "A good, funny film."]


def test_corpus_bleu_by_hand():
    # 5 of 5 words, 3 of 4 pairs, 2 of 3 triples and 1 of 2 fours match; 5 words for 6 are too few.
    metrics = evaluate_texts(["bleu"], ["the cat sat on mat"], ["the cat sat on the mat"])
    assert metrics["bleu"] == pytest.approx(100 * math.exp(1 - 6 / 5) * (1 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25)


def test_bleu_and_chrf_are_sacrebleus_of_the_corpus():
    import sacrebleu

    metrics = evaluate_texts(["bleu", "chrf"], RESPONSES, TARGETS)
    assert metrics["bleu"] == pytest.approx(sacrebleu.corpus_bleu(RESPONSES, [TARGETS]).score)
    assert metrics["chrf"] == pytest.approx(sacrebleu.corpus_chrf(RESPONSES, [TARGETS]).score)
    assert 0 < metrics["bleu"] < metrics["chrf"] < 100


def test_rouge_l_is_the_mean_of_rouge_scores_f1():
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    pairs = zip(RESPONSES, TARGETS, strict=True)
    expected = fmean(scorer.score(target, response)["rougeL"].fmeasure for response, target in pairs)
    assert evaluate_texts(["rouge_l"], RESPONSES, TARGETS)["rouge_l"] == pytest.approx(expected)


def test_word_f1_and_exact_match_by_hand():
    responses, targets = ["the red house", "yes", "blue"], ["A red car!", "yes", "green"]
    # "red" of "red house" and "red car"; all; nothing.
    metrics = evaluate_texts(["token_f1", "exact_match"], responses, targets)
    assert metrics["token_f1"] == pytest.approx((1 / 2 + 1 + 0) / 3)
    assert metrics["exact_match"] == pytest.approx(1 / 3)


def test_equal_texts_have_the_best_score_of_every_metric():
    text = ["one two three four five"]
    metrics = evaluate_texts(TEXT_METRICS, text, text)
    del metrics["num_targets"]
    assert metrics == pytest.approx({"bleu": 100, "chrf": 100, "rouge_l": 1, "token_f1": 1, "exact_match": 1})


def test_white_space_at_the_ends_does_not_count():
    assert evaluate_texts(["exact_match"], [" yes\n"], ["yes"])["exact_match"] == 1


def test_examples_without_a_target_are_left_out_and_the_others_counted():
    with_empty = evaluate_texts(TEXT_METRICS, [*RESPONSES, "more", "text"], [*TARGETS, "", " "])
    assert with_empty == evaluate_texts(TEXT_METRICS, RESPONSES, TARGETS)
    assert with_empty["num_targets"] == 5


def test_without_any_target_there_is_no_text_metric():
    assert evaluate_texts(TEXT_METRICS, ["a"], [""]) == {"num_targets": 0}


def test_an_unknown_text_metric_is_refused_with_the_nearest():
    with pytest.raises(InputError, match=r"unknown eval\.text_metrics 'rouge'; did you mean 'rouge_l'"):
        EvalConfig(text_metrics=("rouge",))


def test_a_missing_library_is_named_before_anything_is_loaded(monkeypatch):
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    with pytest.raises(InputError, match=r"eval\.text_metrics.*'bleu' needs sacrebleu: pip install"):
        EvalConfig(text_metrics=("bleu",))
