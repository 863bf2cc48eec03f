"""Tests of hybrid.data.preferences: pairs, rankings, verdicts; which rows are left out, and which are refused."""

import json

import pytest
from data.refusals import rows_refusal

from hybrid.core import IGNORE, InputError
from hybrid.data import DataConfig, encode, encode_all, read_example_set, read_examples, split_examples
from hybrid.data.examples import examples_from

USER = {"role": "user", "content": "two?"}
GOOD, BAD = ({"role": "assistant", "content": text} for text in ("four", "five"))
PAIR = {"prompt": "two?", "chosen": "four", "rejected": "five"}


def read(*rows, **settings):
    return read_examples(list(rows), DataConfig(shuffle=False, **settings))


def test_a_pair_has_its_prompt_on_both_sides():
    (example,) = read(PAIR)
    assert (example.prompt, example.target) == ("two?", "four")
    assert (example.rejected.prompt, example.rejected.target) == ("two?", "five")
    assert example.item is example.rejected.item


def test_margin_and_weight_are_read_where_they_are_there():
    first, second = read({**PAIR, "margin": 2, "weight": 0.5}, {**PAIR, "margin": None})
    assert (first.margin, first.weight) == (2.0, 0.5)
    assert (second.margin, second.weight) == (0.0, 1.0)


def test_columns_of_other_names_are_taken_by_the_config():
    (example,) = read({"q": "a", "better": "b", "worse": "c"}, prompt="q", chosen="better", rejected="worse")
    assert (example.prompt, example.target, example.rejected.target) == ("a", "b", "c")


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": [USER], "chosen": "four", "rejected": "five"},
        {"prompt": "two?", "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": "two?", "chosen": GOOD, "rejected": {"from": "gpt", "value": "five"}},
        {"prompt": "two?", "chosen": [USER, GOOD], "rejected": [USER, BAD]},  # the prompt is said twice
        {"prompt": [USER], "chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"chosen": json.dumps([USER, GOOD]), "rejected": json.dumps([USER, BAD])},
        {"prompt": json.dumps([USER]), "chosen": json.dumps([GOOD]), "rejected": json.dumps([BAD])},
    ],
)
def test_messages_in_any_form_become_the_same_pair(row):
    (example,) = read(row)
    assert example.messages == (USER, GOOD)
    assert example.rejected.messages == (USER, BAD)
    assert example.num_prompt_messages == example.rejected.num_prompt_messages == 1


def test_dialogues_may_put_a_system_turn_or_white_space_around_the_prompt_that_they_repeat():
    system = {"role": "system", "content": "be brief"}
    (example,) = read({"prompt": "two? ", "chosen": [system, USER, GOOD], "rejected": [system, USER, BAD]})
    assert example.messages == (system, USER, GOOD) and example.num_prompt_messages == 2
    assert example.rejected.messages == (system, USER, BAD)
    other = {"prompt": "three?", "chosen": [USER, GOOD], "rejected": [USER, BAD]}
    assert "column 'chosen' must begin and end with the assistant's turn" in rows_refusal([other])


def test_a_csv_file_has_margins_that_are_missing_and_labels_of_zero_and_one(tmp_path):
    (tmp_path / "pairs.csv").write_text("prompt,chosen,rejected,margin\na,b,c,\nd,e,f,1.5\n")
    pairs = read_examples(tmp_path / "pairs.csv", DataConfig(shuffle=False))
    assert [e.margin for e in pairs] == [0.0, 1.5]
    (tmp_path / "answers.csv").write_text("prompt,completion,good\na,b,1\nd,e,0\n")
    answers = read_examples(tmp_path / "answers.csv", DataConfig(shuffle=False, label="good"))
    assert [e.target for e in answers] == ["b", ""]


def test_an_answer_that_is_other_json_stays_a_text():
    (example,) = read({"prompt": "two?", "chosen": '[{"sum": 4}]', "rejected": '[{"sum": 5}'})
    assert (example.target, example.rejected.target) == ('[{"sum": 4}]', '[{"sum": 5}')


def test_a_transcript_is_parted_behind_the_last_turn_that_both_sides_share():
    start = "\n\nHuman: a\n\nAssistant: b\n\nHuman: two?\n\nAssistant:"
    (example,) = read({"chosen": start + " f four", "rejected": start + " five"})
    assert example.prompt == start
    assert (example.target, example.rejected.target) == (" f four", " five")


def test_a_prompt_that_both_texts_repeat_is_taken_once():
    (example,) = read({"prompt": "two?", "chosen": "two? four", "rejected": "two? five"})
    assert (example.target, example.rejected.target) == (" four", " five")
    (example,) = read({"prompt": "two", "chosen": "two four", "rejected": "five"})
    assert example.target == "two four"


def test_dialogues_are_parted_where_their_turns_differ_first():
    more = {"role": "user", "content": "sure?"}
    (example,) = read({"chosen": [USER, GOOD, more, GOOD], "rejected": [USER, GOOD, more, BAD]})
    assert example.num_prompt_messages == 3
    (example,) = read({"chosen": [USER, GOOD, more, GOOD], "rejected": [USER, BAD, more, BAD]})
    assert example.num_prompt_messages == 1


def test_a_ranking_becomes_pairs_that_count_as_one():
    examples = read({"prompt": "a", "responses": ["x", "y", "z"], "scores": [1, 3, 2]})
    assert [(e.target, e.rejected.target) for e in examples] == [("y", "z"), ("y", "x"), ("z", "x")]
    assert sum(e.weight for e in examples) == pytest.approx(1)
    by_rank = read({"prompt": "a", "responses": ["x", "y", "z"], "ranks": [3, 1, 2]})
    assert [(e.target, e.rejected.target) for e in by_rank] == [(e.target, e.rejected.target) for e in examples]


def test_a_limit_takes_whole_rankings():
    rows = [{"prompt": f"p{i}", "responses": ["x", "y", "z"], "scores": [1, 3, 2]} for i in range(4)]
    examples = read_examples(rows, DataConfig(limit=2))
    assert len(examples) == 6 and len({e.prompt for e in examples}) == 2
    assert sum(e.weight for e in examples) == pytest.approx(2)


def test_equal_scores_make_no_pair():
    examples = read({"prompt": "a", "responses": ["x", "y", "z"], "scores": [1, 1, 2]})
    assert [(e.target, e.rejected.target) for e in examples] == [("z", "x"), ("z", "y")]


def test_of_a_ranking_only_the_flawed_pairs_are_left_out():
    row = {"prompt": "a", "responses": ["x", "x ", "", "z"], "scores": [1, 4, 3, 2]}
    read = read_example_set([row], DataConfig(shuffle=False))
    assert [(e.target, e.rejected.target) for e in read.examples] == [("x ", "z"), ("z", "x")]
    assert [e.weight for e in read.examples] == [0.5, 0.5], "the ranking counts as one"
    assert "left out 3 pairs with an empty side; left out 1 pair of equal sides" in read.said
    with pytest.raises(InputError, match="row 1: a pair with an empty side"):
        examples_from([row], DataConfig())


def test_a_bad_answer_is_never_a_target():
    good, bad = read(
        {"prompt": "a", "completion": "b", "label": True}, {"prompt": "a", "completion": "c", "label": False}
    )
    assert (good.target, good.rejected) == ("b", None)
    assert (bad.target, bad.rejected.target) == ("", "c")
    (bad,) = read({"messages": [USER, BAD], "label": False})
    assert bad.messages == (USER,)
    assert bad.rejected.messages == (USER, BAD)


def test_a_label_of_zero_and_one_is_a_verdict_only_where_it_is_named():
    row = {"prompt": "a", "completion": "b", "label": 0}
    assert read(row)[0].target == "b"
    assert read(row, label="label")[0].target == ""


def test_flawed_pairs_are_left_out_and_counted():
    rows = [PAIR, {**PAIR, "rejected": "four "}, {**PAIR, "chosen": " "}, {**PAIR, "rejected": ""}]
    read = read_example_set(rows, DataConfig())
    assert len(read.examples) == 1
    assert "left out 1 pair of equal sides" in read.said
    assert "left out 2 pairs with an empty side" in read.said


def test_flawed_pairs_of_messages_are_left_out_and_counted():
    pair = {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}
    others = [[{**GOOD, "content": "four "}], [{**BAD, "content": ""}], [{**BAD, "content": " "}], []]
    read = read_example_set([pair, *({**pair, "rejected": other} for other in others)], DataConfig())
    assert len(read.examples) == 1
    assert "left out 1 pair of equal sides" in read.said
    assert "left out 3 pairs with an empty side" in read.said
    call = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {}}}]}
    assert len(read_examples([{**pair, "chosen": [call]}], DataConfig())) == 1, "a call of a tool is an answer"


def test_data_without_a_sound_pair_are_refused_with_the_reason():
    assert "no row is left of 1: left out 1 pair of equal sides" in rows_refusal([{**PAIR, "rejected": "four"}])


def test_a_flawed_pair_that_is_given_by_hand_is_refused():
    with pytest.raises(InputError, match="row 1: a pair of equal sides"):
        examples_from([{**PAIR, "rejected": "four"}], DataConfig())


@pytest.mark.parametrize(
    ("row", "settings", "message"),
    [
        ({"prompt": "a", "chosen": "b"}, {}, "the column 'chosen' of preferences has no other beside it"),
        (PAIR, {"chosen": "choosen", "rejected": "rejected"}, "did you mean 'chosen'"),
        (PAIR, {"label": "good"}, "exclude"),
        ({"chosen": "a", "rejected": "b"}, {}, "name the prompt's column with data.prompt"),
        ({"chosen": [USER, GOOD], "rejected": [{**USER, "content": "x"}, BAD]}, {}, "differ in their prompt"),
        ({**PAIR, "margin": "much"}, {}, "'margin' must hold a finite number"),
        ({**PAIR, "weight": 0}, {}, "'weight' must be above 0, got 0"),
        ({"prompt": "a", "responses": ["x"], "scores": [1, 2]}, {}, "has 2 entries"),
        ({"prompt": "a", "responses": "xy", "scores": [1, 2]}, {}, "must hold a list"),
        ({"prompt": "a", "completion": "b", "label": "maybe"}, {"label": "label"}, "must be true or false"),
        ({**PAIR, "chosen": None}, {}, "'chosen' is null"),
        ({"question": " ", "chosen": "a", "rejected": "b"}, {}, "column 'question' is empty"),
        ({"prompt": "a", "completion": "b", "label": [1]}, {"label": "label"}, "must be true or false, got [1]"),
        ({"chosen": "a", "rejected": "b"}, {}, "leave such rows out with data.filter"),
    ],
)
def test_what_cannot_be_a_preference_is_refused(row, settings, message):
    if message == "exclude":
        assert "calls single answers good or bad" in rows_refusal([{**row, "good": True}], **settings)
    else:
        assert message in rows_refusal([row], **settings)


def test_both_sides_are_encoded_behind_the_same_ids(characters):
    tokenizer = characters()
    (example,) = read({**PAIR, "margin": 2}, template="none")
    encoded = encode(example, tokenizer, DataConfig(template="none"))
    assert encoded.is_pair and encoded.margin == 2
    for side, answer in ((encoded, "four"), (encoded.rejected, "five")):
        assert side.prompt_ids == encoded.prompt_ids
        trained = [id for id in side.labels if id != IGNORE]
        assert tokenizer.decode(trained) == f"{answer}</s>"


def test_dialogues_that_part_early_are_trained_on_every_answer_behind_it(chatml):
    more = {"role": "user", "content": "sure?"}
    (example,) = read({"chosen": [USER, GOOD, more, GOOD], "rejected": [USER, BAD, more, BAD]})
    encoded = encode(example, chatml, DataConfig())
    assert encoded.prompt_ids == encoded.rejected.prompt_ids
    said = [chatml.decode([id for id in side.labels if id != IGNORE]) for side in (encoded, encoded.rejected)]
    assert said == ["four<|im_end|>" * 2, "five<|im_end|>" * 2]


def test_a_pair_whose_longer_side_does_not_fit_is_left_out(characters, caplog):
    rows = read(PAIR, {**PAIR, "rejected": "f" * 40}, template="none")
    kept = encode_all(rows, characters(), DataConfig(template="none", max_length=20))
    assert [e.rejected.target for e in kept] == ["five"]
    assert "left out 1 of 2 training examples" in caplog.text


RANKINGS = [{"prompt": f"q{i}", "responses": ["x", "y", "z"], "scores": [1, 3, 2]} for i in range(8)]
REPEATED = [{"prompt": f"q{i}", "chosen": f"x{j}", "rejected": "y"} for j in range(3) for i in range(8)]
JUDGED = [{"prompt": f"q{i}", "completion": f"x{j}", "label": j != 1} for j in range(3) for i in range(8)]
TALKS = [
    {"prompt": [{"role": "user", "content": f"q{i}"}], "chosen": f"x{j}", "rejected": "y"}
    for j in range(3)
    for i in range(8)
]


@pytest.mark.parametrize("rows", [RANKINGS, REPEATED, JUDGED, TALKS], ids=["rankings", "pairs", "labels", "messages"])
def test_no_prompt_of_preferences_is_both_trained_on_and_held_out(rows):
    train, held_out = split_examples(read(*rows), 0.25, seed=0)
    prompts = [{e.prompt for e in part} for part in (train, held_out)]
    assert [len(part) for part in (train, held_out)] == [18, 6]
    assert [len(part) for part in prompts] == [6, 2] and not prompts[0] & prompts[1]


def test_preferences_to_one_prompt_cannot_be_held_out():
    with pytest.raises(InputError, match=r"0\.5 of 3 examples \(the number of their prompts is 1\)"):
        split_examples(read(RANKINGS[0]), 0.5, seed=0)
