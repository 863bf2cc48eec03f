"""Tests of hybrid.data.layouts, messages and cells: which columns are what, and which rows are refused."""

from decimal import Decimal

import numpy
import pytest
from data.refusals import rows_refusal

from hybrid.core import IGNORE, InputError
from hybrid.data import DataConfig, read_example_set, read_examples

IN_ORDER = DataConfig(shuffle=False)
USER, ANSWER = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
NAN = float("nan")


def one(row, **settings):
    (example,) = read_examples([row], DataConfig(shuffle=False, **settings))
    return example


@pytest.mark.parametrize(
    ("row", "prompt", "target"),
    [
        ({"prompt": "a", "target": "b", "text": "c"}, "a", "b"),
        ({"prompt": "a", "completion": "b"}, "a", "b"),
        ({"prompt": "a", "response": "b", "messages": [USER, ANSWER]}, "a", "b"),
        ({"instruction": "a", "input": "c", "output": "b"}, "a\n\nc", "b"),
        ({"instruction": "a", "input": "", "output": "b"}, "a", "b"),
        ({"instruction": "a", "input": None, "output": "b"}, "a", "b"),
        ({"instruction": "a", "input": NAN, "output": "b"}, "a", "b"),
        ({"instruction": "a", "output": "b"}, "a", "b"),
        ({"instruction": "a", "context": "c", "response": "b", "category": "d"}, "a\n\nc", "b"),
        ({"question": "a", "answer": 18}, "a", "18"),
        ({"query": "a", "response": "b"}, "a", "b"),
        ({"prompt": numpy.int64(3), "target": numpy.float32(0.5)}, "3", "0.5"),
        ({"prompt": Decimal("1.50"), "target": 2**70}, "1.50", "1180591620717411303424"),
        ({"prompt": "a"}, "a", ""),
        ({"prompt": "a", "target": ""}, "a", ""),
        ({"text": "b", "label": True}, "", "b"),
    ],
)
def test_a_text_layout_is_found_by_its_columns(row, prompt, target):
    example = one(row)
    assert (example.prompt, example.target, example.item) == (prompt, target, row)
    assert not example.messages


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [USER, ANSWER], "prompt": "x", "text": "y"},
        {"messages": '[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]'},
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
        {"messages": [{"from": "user", "value": "a"}, {"from": "assistant", "value": "b", "weight": None}]},
        {"conversations": [USER, ANSWER]},
        {"messages": numpy.array([USER, ANSWER], dtype=object)},
    ],
)
def test_a_dialogue_is_messages_however_its_turns_are_written(row):
    example = one(row)
    assert example.messages == (USER, ANSWER)
    assert (example.prompt, example.target, example.num_prompt_messages) == ("a", "b", 0)


@pytest.mark.parametrize("answer", [[ANSWER], "b"])
@pytest.mark.parametrize("columns", [("prompt", "completion"), ("prompt", "target")])
def test_a_prompt_of_messages_is_not_trained(answer, columns):
    before = [USER, {"role": "assistant", "content": "x"}, USER]
    example = one(dict(zip(columns, (before, answer), strict=True)))
    assert example.messages == (*before, ANSWER)
    assert (example.num_prompt_messages, example.prompt, example.target) == (3, "a", "b")


def test_an_answer_of_weight_0_is_not_trained():
    turns = [USER, {**ANSWER, "weight": 0}, USER, {**ANSWER, "weight": 1}]
    assert one({"messages": turns}).num_prompt_messages == 2
    assert "ends with an answer of weight 0" in rows_refusal([{"messages": turns[:2]}])
    assert "message 4 has weight 0 behind message 2" in rows_refusal(
        [{"messages": [USER, ANSWER, *turns[:2], *turns[2:]]}]
    )
    assert "0 or 1, got 0.5" in rows_refusal([{"messages": [USER, {**ANSWER, "weight": 0.5}]}])


def test_a_system_column_stands_before_the_dialogue():
    first = {"role": "system", "content": "s"}
    assert one({"messages": [USER, ANSWER], "system": "s"}).messages == (first, USER, ANSWER)
    for nothing in (None, "", NAN):
        assert one({"messages": [first, USER, ANSWER], "system": nothing}).messages == (first, USER, ANSWER)
    assert "has one too" in rows_refusal([{"messages": [first, USER, ANSWER], "system": "t"}])


def test_a_prompt_of_messages_alone_serves_rollouts():
    example = one({"prompt": [USER], "answer_key": "b"})
    assert (example.messages, example.num_prompt_messages, example.target) == ((USER,), 1, "")


def test_a_text_prompt_may_have_messages_as_its_answer():
    assert one({"prompt": "a", "completion": [ANSWER]}).messages == (USER, ANSWER)


TOOL = {"type": "function", "function": {"name": "add"}}
CALL = {"role": "assistant", "tool_calls": [{"function": {"name": "add", "arguments": {}}}]}


@pytest.mark.parametrize(
    "tools",
    [
        [TOOL],
        '[{"type": "function", "function": {"name": "add"}}]',
        ['{"type": "function", "function": {"name": "add"}}'],
    ],
)
def test_tools_are_schemas_or_their_json(tools):
    example = one(
        {"messages": [USER, {**CALL, "content": None}, {"role": "tool", "content": "3"}, ANSWER], "tools": tools}
    )
    assert example.tools == (TOOL,)
    assert example.messages[1] == CALL


@pytest.mark.parametrize("tools", [None, [], "", "[]", NAN])
def test_a_row_may_have_no_tools(tools):
    assert one({"messages": [USER, ANSWER], "tools": tools}).tools == ()


@pytest.mark.parametrize(
    ("row", "ids", "labels"),
    [
        ({"input_ids": [5, 6, 7]}, (5, 6, 7), (5, 6, 7)),
        ({"input_ids": [5, 6, 7], "labels": [IGNORE, 6, 7], "text": "x"}, (5, 6, 7), (IGNORE, 6, 7)),
        ({"input_ids": [5, 0, 0], "attention_mask": [1, 1, 0]}, (5, 0), (5, 0)),
        ({"input_ids": [0, 0, 5], "attention_mask": [0, 1, 1]}, (0, 5), (0, 5)),
        ({"input_ids": [5, 6, 7], "completion_mask": [0, 1, 1]}, (5, 6, 7), (IGNORE, 6, 7)),
        ({"input_ids": [5, 6], "assistant_masks": [0, 1], "labels": [5, 6]}, (5, 6), (IGNORE, 6)),
        ({"input_ids": numpy.array([5, 6]), "completion_mask": numpy.array([False, True])}, (5, 6), (IGNORE, 6)),
    ],
)
def test_a_tokenised_row_is_taken_as_it_is_without_its_padding(row, ids, labels):
    example = one(row)
    assert (example.input_ids, example.labels, example.prompt, example.target) == (ids, labels, "", "")


def test_columns_are_those_of_all_rows():
    rows = [{"prompt": "a"}] + [{"prompt": "a", "target": "b"}] * 3
    message = rows_refusal(rows)
    assert "row 1 has no 'target'" in message
    assert "data.filter" in message
    assert 'write ""' in message


@pytest.mark.parametrize("value", [None, True, False, numpy.True_, NAN, float("inf"), ["a"], {"a": 1}, b"a"])
@pytest.mark.parametrize("columns", [("prompt", "target"), ("question", "answer")])
def test_a_target_that_is_no_text_is_refused_with_row_and_column(value, columns):
    message = rows_refusal([dict.fromkeys(columns, "a"), dict(zip(columns, ("a", value), strict=True))])
    assert "row 2" in message
    assert columns[1] in message


def test_pandas_marks_of_a_missing_value_are_no_text():
    import pandas

    for missing in (pandas.NA, pandas.NaT):
        assert "a missing value; leave" in rows_refusal([{"prompt": "a", "target": missing}])
    assert "column 'target' is null" in rows_refusal(pandas.DataFrame({"prompt": ["a", "b"], "target": ["c", None]}))


@pytest.mark.parametrize("columns", [("prompt", "target"), ("text", "x")])
def test_half_a_character_is_refused_with_its_row(columns):
    message = rows_refusal([dict.fromkeys(columns, "a\ud83d")])
    assert "row 1" in message
    assert r"'\ud83d'" in message


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": []}], "must hold a list of messages"),
        ([{"prompt": [USER, ANSWER]}], "is to answer"),
        ([{"prompt": [USER], "completion": [USER]}], "begin and end with the assistant"),
        ([{"prompt": [USER], "completion": None}], "'completion' is null"),
        ([{"prompt": [{"role": "system", "content": "a"}]}], "system"),
        ([{"prompt": ["a", "b"]}], "message 1 must hold a role"),
        ([{"messages": [USER, {"role": "assistant", "content": None}]}], "message 2"),
        ([{"messages": [USER, {"role": "assistant", "content": "\udc00"}]}], "half a character"),
        ([{"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}]}], "a text as its content"),
        ([{"messages": [{"role": ["user"], "content": "a"}]}], "unknown role"),
        ([{"messages": [{"from": "humans", "value": "a"}]}], "did you mean 'human'"),
        ([{"messages": [{"from": {}, "value": "a"}]}], "unknown role"),
        ([{"messages": [USER], "tools": "add"}], "column 'tools' must hold a list of JSON schemas"),
        ([{"messages": [USER], "tools": [3]}], "column 'tools'"),
        ([{"messages": None}], "'messages' is null"),
        ([{"input_ids": "1 2"}], "list of integers"),
        ([{"input_ids": [1.0]}], "list of integers"),
        ([{"input_ids": [[1]]}], "list of integers"),
        ([{"input_ids": []}], "empty"),
        ([{"input_ids": [1], "attention_mask": [0]}], "empty"),
        ([{"input_ids": [1, 2], "labels": [2, -100]}], "nothing is shifted"),
        ([{"input_ids": [1, 2], "labels": [1]}], "1 entries"),
        ([{"input_ids": [1, 2], "completion_mask": [0, 2]}], "0 and 1, got 2"),
        ([{"input_ids": [1, 2], "labels": [1, 2]}, {"input_ids": [1]}], "row 2 has no 'labels'"),
        ([{"input_ids": [1, 2], "seq_lengths": [1, 1]}], "several examples"),
        ([{}], "have no columns"),
        ([{"ask": "a"}], "found no columns that belong together"),
    ],
)
def test_what_cannot_be_trained_is_refused(rows, message):
    assert message in rows_refusal(rows)


def test_named_columns_are_taken_before_all_layouts():
    row = {"question": "a", "answer": "b", "input_ids": [1], "chosen": "x", "rejected": "y"}
    example = one(row, prompt="question", target="chosen")
    assert (example.prompt, example.target) == ("a", "x")


@pytest.mark.parametrize(
    ("rows", "settings", "said"),
    [
        (
            [{"instruction": "a", "input": "", "output": "b", "id": 1, "source": "x"}],
            {},
            ": prompt = 'instruction' + 'input', target = 'output'; unused columns: id, source",
        ),
        ([{"instruction": "a", "output": "b"}], {}, ": prompt = 'instruction', target = 'output'"),
        ([{"prompt": "a"}], {}, ": prompt = 'prompt'; 1 without a target, for rollouts only"),
        (
            [{"prompt": [USER], "tools": []}],
            {},
            ": messages = 'prompt', tools = 'tools'; 1 without a target, for rollouts only",
        ),
        ([{"messages": [USER, ANSWER, USER], "text": ""}], {}, ": dialogues = 'messages'; unused columns: text"),
        ([{"text": "a"}, {"text": " "}], {}, ": text = 'text'; left out 1 blank row"),
        ([{"input_ids": [1, 2]}], {}, ": token ids = 'input_ids', all trained"),
        ([{"input_ids": [1, 2], "labels": [1, 2]}], {}, ": token ids = 'input_ids', trained by 'labels'"),
        # Nothing predicts the first token.
        ([{"input_ids": [1]}], {}, ": token ids = 'input_ids', all trained; 1 without a target, for rollouts only"),
        (
            [{"prompt": "a", "target": ""}, {"prompt": "a", "target": "b"}],
            {},
            ": prompt = 'prompt', target = 'target'; 1 without a target, for rollouts only",
        ),
        ([{"text": "a", "b\n\ud800": 1}], {}, r": text = 'text'; unused columns: 'b\n\ud800'"),
        ([{"text": "a"}] * 3, {"limit": 2}, ": text = 'text'; the first 2 of 3 (data.limit)"),
    ],
)
def test_what_was_taken_is_said(rows, settings, said):
    assert read_example_set(rows, DataConfig(**settings)).said == said


def test_many_unused_columns_are_counted():
    row = {"text": "a"} | {f"c{i}": i for i in range(15)}
    assert read_example_set([row], DataConfig()).said.endswith("c11 and 3 more")


def test_the_file_is_named_and_the_examples_counted(tmp_path, caplog):
    (tmp_path / "a.txt").write_text("a\n" * 1482)
    with caplog.at_level("INFO"):
        read_examples(str(tmp_path / "a.txt"), DataConfig())
    assert caplog.messages == [f"data: 1,482 examples of {tmp_path}/a.txt: text = 'text'"]


@pytest.fixture
def filters(monkeypatch):
    """Functions under names that `DataConfig.filter` can give."""
    import sys
    from types import ModuleType

    module = ModuleType("odd_filters")
    vars(module).update(
        fails=lambda row: row["missing"],
        says_nothing=lambda row: None,
        says_text=lambda row: "no",
        numpy=lambda row: numpy.bool_(True),
        number=3,
    )
    monkeypatch.setitem(sys.modules, "odd_filters", module)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("fails", "row 1: DataConfig.filter = 'odd_filters:fails' raised KeyError"),
        ("says_nothing", "must return true or false, got None"),
        ("says_text", "got 'no'"),
        ("number", "must be a function, got int"),
    ],
)
def test_a_filter_that_does_not_answer_is_refused(filters, name, message):
    assert message in rows_refusal([{"text": "a"}], filter=f"odd_filters:{name}")


def test_the_error_of_a_filter_is_kept_and_numpys_truth_is_one(filters):
    with pytest.raises(InputError) as info:
        read_examples([{"text": "a"}], DataConfig(filter="odd_filters:fails"))
    assert isinstance(info.value.__cause__, KeyError)
    read = read_example_set([{"text": "a"}], DataConfig(filter="odd_filters:numpy"))
    assert read.said == ": text = 'text'; data.filter kept 1 of 1 rows"


def test_calls_that_are_no_list_of_objects_are_refused():
    messages = [USER, {"role": "assistant", "tool_calls": "add(1)"}]
    assert "its tool_calls must be a list of calls (objects), got 'add(1)'" in rows_refusal([{"messages": messages}])


def test_calls_may_be_the_json_text_of_a_list():
    example = one({"messages": [USER, {"role": "assistant", "tool_calls": '[{"name": "add"}]'}]})
    assert example.messages[1]["tool_calls"] == [{"name": "add"}]


@pytest.mark.parametrize("flag", ["weight", "train", "training", "loss"])
def test_an_answer_that_any_flag_takes_out_is_not_trained(flag):
    assert one({"messages": [USER, {**ANSWER, flag: False}, USER, ANSWER]}).num_prompt_messages == 2


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "a", "completion": "b", "label": numpy.bool_(False)},
        {"prompt": "a", "completion": "b", "label": "False"},
        {"messages": [USER, ANSWER], "label": True},
    ],
)
def test_a_verdict_in_any_form_calls_the_answer_good_or_bad(row):
    example = one(row)
    is_good = str(row["label"]).lower() == "true"
    assert bool(example.target) == is_good
    assert (example.rejected is None) == is_good


@pytest.mark.parametrize("column", ["loss_mask", "assistant_mask", "loss_weights", "prompt_mask"])
def test_a_mask_by_a_name_that_is_not_read_is_refused(column):
    assert f"the column {column!r} beside 'input_ids'" in rows_refusal([{"input_ids": [5, 6], column: [0, 1]}])


def test_other_columns_beside_token_ids_are_not_used():
    assert one({"input_ids": [5, 6], "special_tokens_mask": [1, 0], "token_type_ids": [0, 0]}).labels == (5, 6)


def test_a_decimal_that_cannot_be_compared_is_missing():
    assert "a missing value" in rows_refusal([{"prompt": "a", "target": Decimal("sNaN")}])


def test_what_pandas_calls_missing_is_no_key_of_a_message():
    assert "name" not in one({"messages": [{**USER, "name": NAN}, ANSWER]}).messages[0]
