import io
import json
import random
import sys

import pytest
import torch

from hybrid.core import InputError
from hybrid.rewards import make_reward

NASTY = [
    "",
    None,
    "...",
    "🙂",
    "e\u0301" * 9,
    "東京は日本の首都です",
    "שלום עולם",
    "\0",
    "a",
    "word " * 20_000,
    "x" * 100_000,
]
SPECS = [
    {"type": "novelty"},
    {"type": "novelty", "reference": "batch"},
    {"type": "novelty", "reference": ["the cat sat"]},
    {"type": "diversity"},
    {"type": "diversity", "metric": "self_bleu", "n": 4},
    {"type": "exploration"},
    {"type": "exploration", "key": "simhash"},
]
REMEMBERING = [{"type": "novelty", "n": 2, "window": 5}, *SPECS[-2:]]


def novelty(**settings):
    return make_reward({"type": "novelty", "n": 2, **settings})


def diversity(**settings):
    return make_reward({"type": "diversity", **settings})


def random_texts(count, seed):
    draw = random.Random(seed)
    return [" ".join(draw.choices("abcdefg", k=draw.randint(1, 12))) for _ in range(count)]


def through_json(state):
    return json.loads(json.dumps(state))


def through_torch(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_novelty_is_the_share_of_bigrams_that_no_earlier_batch_had():
    reward = novelty()
    assert reward.score(["The cat sat.", "the cat sat"]) == [1.0, 1.0]
    # "cat sat" is known, "sat down" is not; "the dog", "dog sat" are not.
    assert reward.score(["cat sat down", "the cat", "the dog sat", "the cat sat"]) == [0.5, 0.0, 1.0, 0.0]


def test_novelty_forgets_what_is_outside_its_window():
    reward = novelty(window=2)
    reward.score(["a b", "c d", "a b e"])
    assert reward.score(["a b", "c d", "b e"]) == [0.0, 0.0, 0.0]
    reward.score(["x y", "z z"])
    assert reward.score(["a b", "x y"]) == [1.0, 0.0]


def test_novelty_in_the_batch_is_what_no_other_response_says():
    reward = novelty(reference="batch")
    assert reward.score(["a b c", "a b d", "x y", "p q p q"]) == [0.5, 0.5, 1.0, 1.0]
    assert reward.score(["a b c"]) == [1.0]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("train.txt", "a b c\n\nd e\n"),
        ("train.jsonl", '{"prompt": "a b c", "response": "d e"}\n'),
        ("train.csv", "text\na b c\nd e\n"),
    ],
)
def test_novelty_to_a_training_set_reads_a_file_or_a_list(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    for reference in (str(tmp_path / name), ["a b c", "d e"]):
        reward = novelty(reference=reference)
        for _ in range(2):  # the training set does not grow
            assert reward.score(["A b c!", "d e f", "c d"]) == [0.0, 0.5, 1.0]


def test_a_response_shorter_than_n_is_one_ngram():
    assert make_reward({"type": "novelty", "n": 3, "reference": ["yes", "oh no"]}).score(["Yes.", "no", "oh no"]) == [
        0.0,
        1.0,
        0.0,
    ]


def test_responses_shares_average_to_distinct_n_of_the_batch():
    texts = random_texts(40, seed=0)
    bigrams = [list(zip(text.split(), text.split()[1:], strict=False)) or [(text,)] for text in texts]
    every = [bigram for row in bigrams for bigram in row]
    scores = diversity().score(texts)
    weighted = sum(score * len(row) for score, row in zip(scores, bigrams, strict=True)) / len(every)
    assert weighted == pytest.approx(len(set(every)) / len(every))


def test_distinct_makes_repetition_pay():
    # a b: three times in the batch; b c: once.   a a: three times in one response.
    assert diversity().score(["a b c", "a b", "a b", "x y"]) == pytest.approx([2 / 3, 1 / 3, 1 / 3, 1])
    assert diversity().score(["a a a a"]) == pytest.approx([1 / 3])


@pytest.mark.parametrize("n", [1, 2, 4])
def test_self_bleu_is_sacrebleus_against_all_other_responses(n):
    bleu = pytest.importorskip("sacrebleu").BLEU(tokenize="none", effective_order=True, max_ngram_order=n)
    texts = random_texts(20, seed=1) + ["a b c d e f"] * 2 + ["unlike anything else here"]
    expected = [1 - bleu.sentence_score(text, texts[:i] + texts[i + 1 :]).score / 100 for i, text in enumerate(texts)]
    assert diversity(metric="self_bleu", n=n).score(texts) == pytest.approx(expected, abs=1e-9)


def test_self_bleu_of_equal_responses_is_zero_and_of_one_response_one():
    reward = diversity(metric="self_bleu")
    assert reward.score(["the cat sat"] * 3) == pytest.approx([0, 0, 0])
    assert reward.score(["the cat sat", ""]) == [1.0, 0.0]


def test_exploration_falls_with_the_root_of_the_visits():
    reward = make_reward({"type": "exploration"})
    assert reward.score(["Yes.", "yes", "no", "YES!"]) == pytest.approx([1, 2**-0.5, 1, 3**-0.5])
    assert reward("yes") == 0.5


def test_similar_texts_tend_to_share_a_simhash():
    text = "the quick brown fox jumps over the lazy dog and runs into the deep green wood to sleep"
    similar, other = text + " well", "completely different words about quantum chromodynamics lectures in Vienna"
    reward = make_reward({"type": "exploration", "key": "simhash", "n": 1, "bits": 4})
    assert reward.score([text, similar]) == pytest.approx([1, 2**-0.5])
    assert make_reward({"type": "exploration", "key": "simhash", "bits": 64}).score([text, other]) == [1, 1]


@pytest.mark.parametrize("spec", SPECS)
def test_any_texts_have_scores_between_zero_and_one_and_empty_ones_none(spec):
    reward = make_reward(spec)
    for _ in range(2):
        scores = reward.score(NASTY)
        assert all(0 <= score <= 1 for score in scores)
        assert scores[:3] == [0, 0, 0] and scores[7] == 0


@pytest.mark.parametrize("spec", REMEMBERING)
@pytest.mark.parametrize("through", [through_json, through_torch])
def test_a_resumed_reward_scores_like_an_uninterrupted_one(spec, through):
    batches = [[*random_texts(4, seed), "a b", "東京\0", ""] for seed in range(4)]
    whole, first, second = make_reward(spec), make_reward(spec), make_reward(spec)
    expected = [list(whole.score(batch)) for batch in batches]
    resumed = [list(first.score(batch)) for batch in batches[:2]]
    second.score(["what the new process said before it loaded"])
    second.load_state_dict(through(first.state_dict()))
    assert resumed + [list(second.score(batch)) for batch in batches[2:]] == expected
    assert second.state_dict() == whole.state_dict()


def test_a_state_is_the_same_in_every_process():
    reward = make_reward({"type": "exploration"})
    reward.score(["yes"])
    # `printf yes | b2sum -l 64`: Python's own hash differs from process to process.
    assert reward.state_dict()["reward"] == {"visits": {"d1b1805c6d187a92": 1}}


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"type": "novelty", "n": 0}, "REWARD.n must lie in 1 to 16, got 0"),
        ({"type": "diversity", "n": 17}, "REWARD.n must lie in 1 to 16, got 17"),
        ({"type": "novelty", "window": 0}, "REWARD.window must be at least 1, got 0"),
        ({"type": "novelty", "reference": "histroy"}, "REWARD.reference must be 'history', 'batch', .*'histroy'"),
        ({"type": "novelty", "reference": ["a", 1]}, "REWARD.reference must be "),
        ({"type": "diversity", "metric": "bleu"}, "REWARD.metric must be one of 'distinct', 'self_bleu'"),
        ({"type": "exploration", "bits": 65}, "REWARD.bits must lie in 1 to 64, got 65"),
        ({"type": "exploration", "key": "hash"}, "REWARD.key must be one of 'text', 'simhash'"),
    ],
)
def test_bad_settings_are_refused(spec, message):
    with pytest.raises(InputError, match=message):
        make_reward(spec)


def test_a_file_that_cannot_be_read_is_refused(tmp_path):
    (tmp_path / "train.jsonl").write_text("{")
    with pytest.raises(InputError, match=r"REWARD.reference .*train.jsonl' cannot be read: .*:1: not valid JSON"):
        novelty(reference=str(tmp_path / "train.jsonl"))


def test_without_sacrebleu_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    with pytest.raises(InputError, match="'diversity' needs sacrebleu: pip install"):
        diversity(metric="self_bleu")
    assert diversity()("a b") == 1.0


@pytest.mark.parametrize("reference", [[], [" "]])
def test_a_reference_without_a_text_is_refused(reference):
    with pytest.raises(InputError, match="reference must hold at least one text"):
        make_reward({"type": "novelty", "reference": reference})
