import math

import pytest
import torch
from rewards.checkpoints import MAX_TOKENS, NASTY, NLI, SENTIMENT, SHORT, bert, decoder, plain_logits

from hybrid.core import InputError
from hybrid.rewards.classify import label_index, load_classifier, logits, max_tokens, nli_probabilities, nli_rows

CPU = torch.device("cpu")
# float32 sums in another order where rows are padded: some 1e-6 on logits of 3.
ROUNDING = 1e-5


@pytest.mark.parametrize("kind", ["Bert", "Roberta"])
def test_logits_of_a_batch_are_what_transformers_says_of_each_text_alone(tmp_path, kind):
    folder = bert(tmp_path, SENTIMENT, kind=kind)
    expected = torch.stack([plain_logits(folder, text) for text in NASTY])
    torch.testing.assert_close(logits(load_classifier(folder, CPU), NASTY), expected, rtol=0, atol=ROUNDING)


def test_logits_of_pairs_are_what_transformers_says_of_each_pair_alone(tmp_path):
    folder = bert(tmp_path, NLI)
    # Of a pair alone whose second text is "" transformers makes one text; in a batch it is a pair, as it is here.
    pairs = [(text, "the cat is not bad") for text in NASTY] + [("good " * 90, text) for text in SHORT if text]
    expected = torch.stack([plain_logits(folder, *pair) for pair in pairs])
    torch.testing.assert_close(logits(load_classifier(folder, CPU), pairs), expected, rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("kind", ["Llama", "GPT2"])
def test_a_model_without_pad_token_answers_a_batch_as_it_answers_each_text(tmp_path, kind):
    folder = decoder(tmp_path, SENTIMENT, kind=kind)
    # One ends with the end-of-sequence token: padding with that would have the model answer a token early.
    texts = [text for text in NASTY if text.strip()] + ["the cat </s>", "the dog is a </s> good </s>"]
    classifier = load_classifier(folder, CPU)
    expected = torch.stack([plain_logits(folder, text) for text in texts])
    torch.testing.assert_close(logits(classifier, texts), expected, rtol=0, atol=ROUNDING)
    assert classifier.model.config.pad_token_id is None


def test_a_batch_that_holds_every_token_is_answered_without_a_pad_token(tmp_path):
    classifier = load_classifier(decoder(tmp_path, SENTIMENT), CPU)
    classifier.model.config.vocab_size = 3
    texts = ["</s> <|user|> good", "<|user|> </s>", "zzz"]
    alone = torch.cat([logits(classifier, [text]) for text in texts])
    torch.testing.assert_close(logits(classifier, texts), alone, rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("build", [bert, decoder])
def test_empty_texts_and_no_texts_have_logits(tmp_path, build):
    classifier = load_classifier(build(tmp_path, SENTIMENT), CPU)
    assert logits(classifier, ["", "good", "   "]).isfinite().all()
    assert logits(classifier, []).shape == (0, 2)


def test_small_batches_give_the_same_logits(tmp_path):
    classifier = load_classifier(bert(tmp_path, SENTIMENT), CPU)
    torch.testing.assert_close(
        logits(classifier, NASTY, batch_size=3), logits(classifier, NASTY), rtol=0, atol=ROUNDING
    )


@pytest.mark.parametrize("kind", ["Bert", "Roberta"])
def test_max_tokens_are_the_positions_that_a_text_can_use(tmp_path, kind):
    classifier = load_classifier(bert(tmp_path, SENTIMENT, kind=kind), CPU)
    assert max_tokens(classifier.tokenizer, classifier.model) == MAX_TOKENS
    classifier.tokenizer.model_max_length = 10
    assert max_tokens(classifier.tokenizer, classifier.model) == 10


def test_labels_are_found_by_name_in_any_case():
    labels = ["NOT-HATE", "Hate", "LABEL_2"]
    assert [label_index(labels, name, "label") for name in ("not_hate", "HATE", "label_2")] == [0, 1, 2]


def test_an_unknown_label_is_refused_with_those_there_are_and_the_nearest():
    with pytest.raises(InputError, match=r"target must be .* \(NEGATIVE, POSITIVE\), got 'postive'; .* 'POSITIVE'\?"):
        label_index(SENTIMENT, "postive", "target")


@pytest.mark.parametrize(
    ("labels", "names", "rows"),
    [
        (["contradiction", "neutral", "entailment"], None, (2, 1, 0)),
        (["ENTAILMENT", "NEUTRAL", "CONTRADICTION"], None, (0, 1, 2)),
        (["LABEL_0", "LABEL_1", "LABEL_2"], ["entailment", "neutral", "contradiction"], (0, 1, 2)),
        (["entailment", "not_entailment"], None, (0, None, None)),
        (["not_entailment", "entailment"], None, (1, None, None)),
    ],
)
def test_nli_labels_are_found_by_name_whatever_their_order(labels, names, rows):
    assert nli_rows(labels, names) == rows


@pytest.mark.parametrize("names", [None, ["entailment"], ["a", "b", "c"]])
def test_nli_labels_that_say_nothing_are_refused(names):
    with pytest.raises(InputError, match="labels must name the model's 3 outputs"):
        nli_rows(["LABEL_0", "LABEL_1", "LABEL_2"], names)


def test_nli_probabilities_come_in_the_order_entailment_neutral_contradiction(tmp_path):
    # Softmax of log(1), log(2), log(5).
    folder = bert(tmp_path, NLI, logits=[0.0, math.log(2), math.log(5)])
    probabilities = nli_probabilities(load_classifier(folder, CPU), [("the cat is good", "the cat")])
    assert probabilities[0].tolist() == pytest.approx([5 / 8, 2 / 8, 1 / 8])
