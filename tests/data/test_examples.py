"""Tests of hybrid.data.examples."""

import logging

import pytest
from data.refusals import rows_refusal

from hybrid.core import Example, InputError
from hybrid.data import DataConfig, examples_from, read_examples, split_examples

IN_ORDER = DataConfig(shuffle=False)


def dialogue(*roles):
    return [{"role": role, "content": f"{role} {i}"} for i, role in enumerate(roles)]


def even(row):
    return row["n"] % 2 == 0


def nothing(row):
    return False


@pytest.fixture
def filters(monkeypatch):
    """This module under a name that `DataConfig.filter` can give."""
    import sys
    from types import ModuleType

    module = ModuleType("row_filters")
    vars(module).update(even=even, nothing=nothing)
    monkeypatch.setitem(sys.modules, "row_filters", module)


def test_prompt_and_target_are_found_by_their_names():
    row = {"prompt": "a", "target": "b", "text": "c"}
    assert read_examples([row], IN_ORDER) == [Example("a", "b", item=row)]


def test_messages_are_found_before_text():
    turns = dialogue("user", "assistant", "user", "assistant")
    (example,) = read_examples([{"text": "t", "messages": turns}], IN_ORDER)
    assert (example.prompt, example.target) == ("user 2", "assistant 3")
    assert list(example.messages) == turns


def test_a_text_row_is_all_target():
    assert read_examples([{"text": "once"}], IN_ORDER) == [Example("", "once", item={"text": "once"})]


def test_a_prompt_column_alone_gives_examples_without_a_target():
    (example,) = read_examples([{"question": "a", "target": "b"}], DataConfig(prompt="question"))
    assert (example.prompt, example.target) == ("a", "")


def test_numbers_become_text():
    (example,) = read_examples([{"prompt": 12, "target": 0.5}], IN_ORDER)
    assert (example.prompt, example.target) == ("12", "0.5")


def test_columns_that_cannot_be_found_are_refused_with_those_there_are():
    message = rows_refusal([{"ask": "a", "answer": "b"}])
    assert "'ask', 'answer'" in message
    assert "data.prompt" in message


def test_a_missing_column_is_refused_with_the_nearest_name():
    assert "'answer'" in rows_refusal([{"question": "a", "answer": "b"}], prompt="question", target="anser")


@pytest.mark.parametrize("value", [None, ["a"], {"a": 1}])
def test_a_value_that_is_not_text_is_refused_with_its_row(value):
    message = rows_refusal([{"prompt": "a", "target": "b"}, {"prompt": value, "target": "b"}])
    assert "row 2" in message
    assert "'prompt'" in message


def test_an_empty_prompt_is_refused_with_its_row():
    assert "row 1" in rows_refusal([{"prompt": " ", "target": "b"}])


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ([], "list"),
        ("hello", "list"),
        ([{"role": "user"}], "content"),
        ([{"role": "human", "content": "a"}, {"role": "assistant", "content": "b"}], "human"),
        (dialogue("user", "system"), "end with the system"),
        (dialogue("assistant", "user", "assistant"), "begin with the assistant"),
        (dialogue("system", "assistant"), "no user turn"),
    ],
)
def test_a_dialogue_that_cannot_be_trained_is_refused_with_its_row(value, reason):
    message = rows_refusal([{"messages": value}])
    assert "row 1" in message
    assert reason in message


def test_the_filter_keeps_rows_and_their_numbers(filters):
    rows = [{"n": n, "text": None if n == 4 else str(n)} for n in range(6)]
    kept = read_examples(rows[:4], DataConfig(filter="row_filters:even", shuffle=False))
    assert [e.target for e in kept] == ["0", "2"]
    assert "row 5" in rows_refusal(rows, filter="row_filters:even")


def test_a_filter_that_keeps_nothing_is_refused_by_name(filters):
    assert "row_filters:nothing" in rows_refusal([{"n": 1, "text": "a"}], filter="row_filters:nothing")


def test_the_order_is_a_pure_function_of_the_seed():
    rows = [{"text": str(i)} for i in range(50)]
    first, again, other = (read_examples(rows, DataConfig(), seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert first != other
    assert sorted(first, key=lambda e: int(e.target)) == read_examples(rows, IN_ORDER)


def test_the_limit_is_the_beginning_of_the_shuffled_rows():
    rows = [{"text": str(i)} for i in range(50)]
    assert read_examples(rows, DataConfig(limit=5)) == read_examples(rows, DataConfig())[:5]


def test_blank_texts_are_left_out_and_counted(caplog):
    with caplog.at_level(logging.WARNING):
        kept = read_examples([{"text": ""}, {"text": "a"}, {"text": " \n"}], IN_ORDER)
    assert [e.target for e in kept] == ["a"]
    assert "left out 2 blank rows" in caplog.text


def test_examples_from_keeps_every_row_in_its_order():
    rows = [{"text": str(i)} for i in range(5)]
    assert [e.item for e in examples_from(rows, DataConfig(limit=1))] == rows


def test_a_split_parts_the_examples_by_the_seed():
    examples = [Example("", str(i)) for i in range(20)]
    train, held_out = split_examples(examples, 0.25, seed=3)
    assert (len(train), len(held_out)) == (15, 5)
    assert sorted(train + held_out, key=lambda e: int(e.target)) == examples
    assert split_examples(examples, 0.25, seed=3) == (train, held_out)
    assert split_examples(examples, 0.25, seed=4) != (train, held_out)


def test_a_split_of_nothing_holds_out_nothing():
    assert split_examples([Example("", "a")], 0.0, seed=0) == ([Example("", "a")], [])


def test_a_split_that_leaves_nothing_to_train_on_is_refused():
    with pytest.raises(InputError, match="leaves none"):
        split_examples([Example("", "a")], 0.5, seed=0)


def test_gsm8k_reads_by_its_own_column_names(shared):
    config = DataConfig(prompt="question", target="answer", shuffle=False, limit=10)
    examples = read_examples(str(shared / "gsm8k" / "test.jsonl"), config)
    assert len(examples) == 10
    assert examples[0].prompt.startswith("Janet")
    assert examples[0].target.endswith("#### 18")
