"""The JSON Schema and the listing: made of the registered types, and true."""

import json

import pytest

from hybrid.core import InputError
from hybrid.rewards import known_rewards, make_reward, reward_listing, reward_markdown, reward_schema

jsonschema = pytest.importorskip("jsonschema")

GOOD = [
    {"type": "length", "min": 3, "weight": 2, "name": "long"},
    {"REWARD": {"type": "vader", "postprocess": {"type": "clip"}}},
    {
        "type": "weighted_sum",
        "postprocess": [{"type": "scale", "mul": 2}, {"type": "ema_normalize", "decay": 0.9}],
        "components": [
            {"type": "gated", "threshold": 1, "components": [{"type": "length_window"}, {"type": "vader"}]},
            {"type": "vader", "on_error": "value", "error_value": 0.5, "empty_value": -1, "max_chars": 100},
        ],
    },
]
BAD = [
    {},
    {"type": "lenght"},
    {"type": "length", "mim": 3},
    {"type": "length", "min": "3"},
    {"type": "length", "unit": "lines"},
    {"type": "weighted_sum"},
    {"type": "weighted_sum", "components": []},
    {"type": "weighted_sum", "components": [{"type": "length", "postprocess": {"type": "clp"}}]},
    {"type": "vader", "on_error": "ignore"},
    {"type": "vader", "postprocess": "clip"},
]


@pytest.fixture(scope="module")
def validator():
    schema = reward_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


@pytest.mark.parametrize("spec", GOOD, ids=json.dumps)
def test_the_schema_takes_what_make_reward_takes(validator, spec):
    validator.validate(spec)
    make_reward(spec)


@pytest.mark.parametrize("spec", BAD, ids=json.dumps)
def test_the_schema_refuses_what_make_reward_refuses(validator, spec):
    assert not validator.is_valid(spec)
    with pytest.raises(InputError):
        make_reward(spec)


def test_the_schema_is_json():
    assert json.loads(json.dumps(reward_schema())) == reward_schema()


def test_every_type_is_listed_with_its_aliases_and_described():
    rows = {names: summary for names, _, summary in reward_listing()}
    assert rows["length_window, length"]
    for kind in known_rewards():
        assert kind.name.startswith("test_") or kind.summary, kind.name
    assert len(reward_markdown().splitlines()) == len(rows) + 2
