"""A reward that compares with a target says so where there is none, best before a model loads."""

import pytest

from hybrid import HybridConfig, HybridTrainer
from hybrid.cli import main
from hybrid.core import InputError
from hybrid.rewards import RewardError, make_reward

COMPARING = ["bleu", "rouge_l", "chrf", "ter", "token_f1", "exact_match", "jaccard", "levenshtein", "coverage"]
NONE = r"reward '.*' compares with a target, and no sample of the batch has one"


@pytest.mark.parametrize("kind", COMPARING)
@pytest.mark.parametrize("targets", [None, [None, None], [[], None]])
def test_a_batch_without_any_target_fails_by_name(kind, targets):
    with pytest.raises(RewardError, match=NONE.replace(".*", kind)):
        make_reward({"type": kind}).score(["a b", "c"], targets)


def test_on_error_says_what_a_sample_without_target_gets():
    reward = make_reward({"type": "bleu", "on_error": "value", "error_value": -1})
    output = reward.score(["a", "b"])
    assert output == [-1, -1]
    assert output.parts["bleu"].counts["invalid"] == 2


@pytest.mark.parametrize("kind", COMPARING)
def test_none_and_the_empty_text_are_legal_targets_of_one_sample(kind):
    reward = make_reward({"type": kind})
    assert reward("a b", None) == reward("a b", "") == reward("a b")


def test_none_among_targets_is_the_empty_text():
    reward = make_reward({"type": "exact_match"})
    assert reward.score(["a", ""], ["a", None]) == [1, 1]


def test_a_component_that_needs_a_target_is_named():
    reward = make_reward({"type": "weighted_sum", "components": [{"type": "vader"}, {"type": "bleu"}]})
    with pytest.raises(RewardError, match=NONE.replace(".*", "bleu")):
        reward.score(["a", "b"])


def test_a_gate_that_lets_few_samples_pass_does_not_make_their_targets_missing():
    gate = {"type": "regex_presence", "pattern": " "}
    reward = make_reward({"type": "gated", "components": [gate, {"type": "exact_match"}]})
    assert reward.score(["a", "a b"], ["a", None]) == [0, 0]


@pytest.mark.parametrize(
    ("spec", "needs"),
    [
        ({"type": "gptscore"}, False),
        ({"type": "gptscore", "rubric": "Say {target} again:"}, True),
        ({"type": "judge", "base_url": "http://localhost/v1", "model": "m", "rubric": "correctness"}, False),
        ({"type": "judge", "base_url": "http://localhost/v1", "model": "m", "rubric": "{response} = {target}?"}, True),
        ({"type": "vader"}, False),
        ({"type": "max", "components": [{"type": "vader"}, {"type": "chrf"}]}, True),
    ],
)
def test_what_needs_a_target_depends_on_what_it_asks(spec, needs):
    assert make_reward(spec).needs_target is needs


BLEU = HybridConfig(reward={"type": "bleu"})
PROMPTS = [{"prompt": "a"}, {"prompt": "b"}]
PAIRS = [{"prompt": "a", "target": "b"}]


@pytest.mark.parametrize(
    ("train", "held_out", "which"),
    [
        (PROMPTS, None, "2 training"),
        (PAIRS, PROMPTS, "2 held-out"),
        ([{"prompt": "a", "target": " "}], None, "1 train"),
    ],
)
def test_data_without_any_target_are_refused_before_a_model_is_looked_for(train, held_out, which):
    message = rf"reward 'bleu' compares with a target, and none of the {which}.* name its column with data.target"
    with pytest.raises(InputError, match=message):
        HybridTrainer("/no/such/model", train_data=train, eval_data=held_out, config=BLEU)


def test_a_bare_prompt_has_no_target(stories):
    trainer = HybridTrainer(stories, reward={"type": "bleu"})
    with pytest.raises(RewardError, match=NONE.replace(".*", "bleu")):
        trainer.rollout(["Once upon a time"])


@pytest.mark.parametrize(
    ("rows", "arguments", "message"),
    [
        ('{"response": "a"}\n{"response": "b"}\n', [], "none of the 2 rows has one: name its column with --target"),
        ('{"response": "a", "target": null}\n', [], "none of the 1 rows has one: name its column with --target"),
        ('{"response": "a", "gold": "a"}\n{"response": "b"}\n', ["--target", "gold"], "row 2 has no 'gold' (1 of 2"),
    ],
)
def test_a_file_without_targets_is_refused_in_one_line(tmp_path, capsys, rows, arguments, message):
    (tmp_path / "rows.jsonl").write_text(rows)
    assert main(["reward", '{"type": "bleu"}', str(tmp_path / "rows.jsonl"), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
