import sys

import pytest

from hybrid.core import InputError
from hybrid.rewards import make_reward
from hybrid.rewards.base import RewardTimeout

PERSON = {
    "type": "object",
    "required": ["name", "age"],
    "properties": {"name": {"type": "string", "pattern": "^[A-Z]"}, "age": {"type": "integer"}},
}


def form(kind, **settings):
    return make_reward({"type": "format", "kind": kind, **settings})


@pytest.mark.parametrize(
    ("response", "score"),
    [
        ('{"a": [1, 2.5e3, null, "é"]}', 1.0),
        (" [1]\n", 1.0),
        ("3", 1.0),
        ('"text"', 1.0),
        ("9" * 5000, 1.0),
        ('```json\n{"a": 1}\n```', 0.5),
        ('Here {it} is:\n```\n[{"a": 1}]\n```\nfor {you}', 0.5),
        ('Sure: {"a": 1}. Bye!', 0.5),
        ("So 3 it is", 0.0),
        ("{'a': 1}", 0.0),
        ('{"a": 1,}', 0.0),
        ("NaN", 0.0),
        ('{"a": Infinity}', 0.0),
        ('{"a": "\0"}', 0.0),
        ("", 0.0),
        (None, 0.0),
        ("🙂", 0.0),
        ("[" * 100_000 + "]" * 100_000, 0.0),
        ('{"a":' * 20_000, 0.0),
    ],
)
def test_json_is_one_if_all_of_it_is_and_half_if_it_stands_amid_other_text(response, score):
    assert form("json")(response) == score


@pytest.mark.parametrize(
    ("response", "score"),
    [
        ('{"name": "Ann", "age": 3}', 1.0),
        ('```json\n{"name": "Ann", "age": 3}\n```', 0.5),
        ('{"name": "Ann"}', 1 / 2),
        ('{"name": "ann"}', 1 / 3),
        ("{}", 1 / 3),
        ("[]", 0.0),
        ("3", 0.0),
        ("Ann is 3", 0.0),
        ("", 0.0),
    ],
)
def test_json_schema_is_one_over_one_plus_the_errors(response, score):
    assert form("json_schema", schema=PERSON)(response) == pytest.approx(score)


def test_json_that_is_too_deep_or_too_large_to_judge_scores_zero():
    schema = {"properties": {"a": {"$ref": "#"}}}
    assert form("json_schema", schema=schema)('{"a":' * 400 + "1" + "}" * 400) == 0.0
    assert form("json_schema", schema={"multipleOf": 0.1})("9" * 400) == 0.0


def test_a_schemas_pattern_cannot_hang_the_run():
    schema = {"properties": {"a": {"pattern": "(a|aa)+$"}}}
    with pytest.raises(RewardTimeout, match=r"took longer than 0\.05 s"):
        form("json_schema", schema=schema, timeout=0.05)(f'{{"a": "{"a" * 60}b"}}')


@pytest.mark.parametrize(
    ("response", "score"),
    [
        ("- a\n- b\n\n* c", 1.0),
        ("Here:\n- a\n• b\n+ c", 0.75),
        ("-a\n-- b", 0.0),
        ("- ", 0.0),
        ("text", 0.0),
        ("", 0.0),
        ("\n\n", 0.0),
        (None, 0.0),
    ],
)
def test_bullet_list_is_the_share_of_lines_that_are_items(response, score):
    assert form("bullet_list")(response) == score


@pytest.mark.parametrize(
    ("response", "score"),
    [
        ("1. a\n2. b\n3) c", 1.0),
        ("1. a\n1. b", 0.5),
        ("1. a\n3. b\n4. c", 2 / 3),
        ("2. a\n3. b", 0.5),
        ("List:\n1. a\n\n2. b\nnote", 0.5),
        ("1.5 is a number", 0.0),
        ("9" * 100_000 + ". a", 0.0),
        ("- a", 0.0),
        ("", 0.0),
    ],
)
def test_numbered_list_is_the_share_of_lines_that_are_items_in_order(response, score):
    assert form("numbered_list")(response) == pytest.approx(score)


@pytest.mark.parametrize(("num_items", "score"), [(1, 0.5), (2, 1.0), (4, 1.0), (8, 0.5)])
def test_a_list_of_too_few_or_too_many_items_scores_less(num_items, score):
    assert form("bullet_list", min_items=2, max_items=4)("- a\n" * num_items) == score


@pytest.mark.parametrize(
    ("settings", "response", "score"),
    [
        ({}, "one\ntwo", 0.5),
        ({}, "one\n \t\ntwo", 1.0),
        ({}, "\n\none\n\n\n\ntwo\r\n\r\nthree", 1.0),
        ({}, "", 0.0),
        ({}, " \n ", 0.0),
        ({"max_items": 1}, "one", 1.0),
        ({"max_items": 1}, "one\n\ntwo", 0.5),
        ({"min_items": 4}, "one\n\ntwo\n\nthree", 0.75),
    ],
)
def test_paragraphs_is_how_near_their_number_is_to_the_range(settings, response, score):
    assert form("paragraphs", **settings)(response) == score


def test_regex_must_match_the_whole_response():
    dates = form("regex", pattern=r"\d{4}-\d\d")
    assert dates.score(["1969-07", "in 1969-07", "1969-07\n", ""]) == [1.0, 0.0, 0.0, 0.0]


def test_a_pattern_that_would_never_end_is_stopped():
    with pytest.raises(RewardTimeout, match=r"took longer than 0\.05 s"):
        form("regex", pattern="(a|aa)+", timeout=0.05)("a" * 60 + "b")


@pytest.mark.parametrize("kind", ["json", "numbered_list", "bullet_list", "paragraphs"])
@pytest.mark.parametrize(
    "text", ["word " * 20_000, "x" * 100_000, "\n" * 100_000, " \n" * 50_000 + "x", "{}[" * 30_000]
)
def test_long_texts_are_scored(kind, text):
    assert 0 <= form(kind)(text) <= 0.5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "REWARD.kind is missing"),
        ({"kind": "yaml"}, "REWARD.kind must be one of 'json'"),
        ({"kind": "json", "pattern": "a"}, "REWARD.pattern is not read by kind 'json'; it reads none"),
        ({"kind": "regex", "min_items": 2, "pattern": "a"}, "REWARD.min_items is not read by .* pattern, timeout"),
        ({"kind": "regex"}, "REWARD.pattern must be given with kind 'regex'"),
        ({"kind": "regex", "pattern": "("}, "REWARD.pattern .* at position 1"),
        ({"kind": "regex", "pattern": "a", "timeout": -1}, "REWARD.timeout must be above 0"),
        ({"kind": "json_schema"}, "REWARD.schema must be given with kind 'json_schema'"),
        ({"kind": "json_schema", "schema": {"type": "strin"}}, r"REWARD.schema is no JSON Schema: at \$.type, 'strin'"),
        ({"kind": "json_schema", "schema": {"$ref": "#/$defs/a"}}, "REWARD.schema refers to what it does not hold"),
        ({"kind": "json_schema", "schema": {"$ref": "http://a.b/c"}}, "REWARD.schema refers to what it does not hold"),
        ({"kind": "json_schema", "schema": {"$ref": "#"}}, "REWARD.schema refers to itself without end"),
        ({"kind": "json_schema", "schema": {"patternProperties": {"a": {}}}}, "REWARD.schema must not use patternProp"),
        ({"kind": "bullet_list", "min_items": 0}, "REWARD.min_items must be at least 1"),
        (
            {"kind": "bullet_list", "min_items": 3, "max_items": 2},
            r"REWARD.min_items .* at most max_items \(2\), got 3",
        ),
        ({"kind": "paragraphs", "max_items": 0}, "REWARD.max_items must be at least 1, got 0"),
    ],
)
def test_bad_parameters_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        make_reward({"type": "format", **settings})


@pytest.mark.parametrize(
    ("settings", "module"),
    [({"kind": "regex", "pattern": "a"}, "regex"), ({"kind": "json_schema", "schema": {}}, "jsonschema")],
)
def test_a_missing_library_is_told_when_the_reward_is_built(settings, module, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(InputError, match=f"needs {module}: pip install"):
        make_reward({"type": "format", **settings})
