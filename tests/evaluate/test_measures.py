"""Held-out measures, against hand-computed ones."""

import math
from dataclasses import replace

import pytest
import torch
from tiny import tiny_model

from hybrid.core import Encoded
from hybrid.evaluate import EvalConfig, distinct_n, evaluate_responses, evaluate_sft, evaluate_texts
from hybrid.models import Policy, Reference
from hybrid.rewards import make_reward
from hybrid.rollout import SamplingConfig


@pytest.fixture(scope="module")
def policy():
    return Policy(tiny_model("llama")).eval()


def examples(*lengths):
    rows = [tuple(range(5, 5 + n)) for n in lengths]
    return [Encoded(ids, (-100, *ids[1:]), ids[:2], f"prompt {i}", "", {}) for i, ids in enumerate(rows)]


@pytest.mark.parametrize("batch_size", [1, 2, 32])
def test_validation_loss_is_a_mean_over_tokens_whatever_the_batches(policy, batch_size):
    rows = examples(3, 20, 7)
    with torch.no_grad():
        total = sum(
            torch.nn.functional.cross_entropy(
                policy.backbone.model(torch.tensor([e.input_ids])).logits[0, :-1],
                torch.tensor(e.labels[1:]),
                reduction="sum",
            )
            for e in rows
        )
    expected = total.item() / (2 + 19 + 6)
    metrics = evaluate_sft(policy, rows, batch_size=batch_size)
    assert metrics["sft_loss"] == pytest.approx(expected, rel=1e-5)
    assert metrics["perplexity"] == pytest.approx(math.exp(expected), rel=1e-4)


def test_examples_without_a_target_have_no_validation_loss(policy):
    assert evaluate_sft(policy, [Encoded((5, 6), (-100, -100), (5, 6), "", "", {})]) == {}


def test_reward_measures_are_those_of_the_rows(policy, tokenizer):
    reference = Reference.from_policy(policy)
    metrics, rows = evaluate_responses(
        policy, [reference], make_reward(lambda response: len(response) % 3 - 1.0), examples(3, 4, 5, 6),
        tokenizer=tokenizer, sampling=SamplingConfig(max_new_tokens=5), batch_size=3,
    )  # fmt: skip
    scores = [row["reward"] for row in rows]
    assert [row["prompt"] for row in rows] == [f"prompt {i}" for i in range(4)]
    assert metrics["reward"] == pytest.approx(sum(scores) / 4)
    assert metrics["positive"] == sum(score > 0 for score in scores) / 4
    assert metrics["reward_sem"] == pytest.approx(torch.tensor(scores).std().item() / 2)
    assert metrics["kl"] == 0.0


@pytest.mark.parametrize(
    ("texts", "expected"),
    [(["a b a b"], 2 / 3), (["a b", "a b"], 1 / 2), (["a", ""], 0.0), (["a b c"], 1.0)],
)
def test_distinct_2_is_distinct_over_all_bigrams(texts, expected):
    assert distinct_n(texts, 2) == pytest.approx(expected)


def measured(policy, tokenizer, reward=None, **options):
    rows = [replace(e, target="the good w30") for e in examples(3, 4, 5)]
    defaults = {"sampling": SamplingConfig(max_new_tokens=5), "tokenizer": tokenizer}
    return evaluate_responses(policy, [Reference.from_policy(policy)], reward, rows, **defaults | options)


def test_text_metrics_are_of_the_responses_that_the_reward_scores(policy, tokenizer):
    names = ("rouge_l", "exact_match")
    metrics, rows = measured(policy, tokenizer, make_reward(len), text_metrics=names)
    assert [row["reward"] for row in rows] == [len(row["response"]) for row in rows]
    texts = [row["response"] for row in rows], [row["target"] for row in rows]
    assert evaluate_texts(names, *texts).items() <= metrics.items()


def test_without_a_reward_the_same_responses_are_measured_and_none_is_scored(policy, tokenizer):
    judged, plain = (
        measured(policy, tokenizer, reward, text_metrics=("rouge_l",)) for reward in (make_reward(len), None)
    )
    assert [row["response"] for row in plain[1]] == [row["response"] for row in judged[1]]
    assert {row["reward"] for row in plain[1]} == {None}
    assert judged[0].keys() - plain[0].keys() == {"reward", "reward_std", "reward_sem", "positive"}
    assert plain[0].items() <= judged[0].items()


def test_every_part_of_a_composite_reward_has_its_raw_mean(policy, tokenizer):
    spec = {
        "type": "weighted_sum",
        "components": [
            {"type": "length_window", "min": 1, "max": 3, "postprocess": {"type": "scale", "mul": 9.0}},
            {"type": "token_f1"},
        ],
    }
    metrics, rows = measured(policy, tokenizer, make_reward(spec))
    for part in ("length_window", "token_f1"):
        expected = sum(row["components"][part] for row in rows) / len(rows)
        assert metrics[f"reward/{part}/raw_mean"] == pytest.approx(expected)


def test_greedy_answers_do_not_depend_on_the_seed(policy, tokenizer):
    def responses(temperature):
        sampling = EvalConfig(temperature=temperature).sampling(SamplingConfig(max_new_tokens=5))
        runs = [measured(policy, tokenizer, make_reward(len), sampling=sampling, seed=seed)[1] for seed in (0, 1)]
        return [[row["response"] for row in rows] for rows in runs]

    first, second = responses(0.0)
    assert first == second
    first, second = responses(None)
    assert first != second
