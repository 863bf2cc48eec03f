import json
from dataclasses import dataclass

import pytest

from hybrid.core import InputError
from hybrid.rewards import Reward, known_rewards, make_reward, register_reward


@register_reward("test_shout", "test_loud")
def shout(response):
    """Whether the response ends in an exclamation mark."""
    return response.endswith("!")


@register_reward("test_topic")
@dataclass(frozen=True)
class Topic(Reward):
    """A reward with a parameter called name."""

    name: str
    words: list[str] | None = None
    strict: bool = False
    scale: float = 1.0

    def _score_one(self, response, target, prompt, item):
        return self.scale * (self.name in response)


LENGTH = {"type": "length_window", "min": 2, "max": 4}


def sum_of(*components):
    return {"type": "weighted_sum", "components": list(components)}


def test_a_type_is_found_in_any_case_and_by_alias():
    assert make_reward({"type": "Length_Window"}) == make_reward({"type": "LENGTH"})


def test_a_reward_is_named_by_its_type_even_where_an_alias_was_given():
    assert make_reward({"type": "length"}).component_name == "length_window"


def test_a_reward_is_returned_as_it_is():
    reward = make_reward(LENGTH)
    assert make_reward(reward) is reward


def test_a_function_is_named_after_itself():
    assert make_reward(shout).score(["a!"]).components == {"shout": [1.0]}


def test_a_registered_function_is_a_type():
    assert make_reward({"type": "test_loud"}).score(["a!", "a"]).components == {"test_shout": [1.0, 0.0]}


def test_a_parameter_of_the_reward_wins_over_the_name_of_the_component():
    reward = make_reward({"type": "test_topic", "name": "law"})
    assert reward.score(["the law"]).components == {"test_topic": [1.0]}


def test_a_dict_may_stand_under_reward():
    assert make_reward({"REWARD": LENGTH, "TRAIN": {}}) == make_reward(LENGTH)


def test_a_spec_is_not_changed_by_building_it():
    spec = sum_of({**LENGTH, "weight": 2, "name": "n", "postprocess": {"type": "clip"}})
    before = json.dumps(spec)
    make_reward(spec)
    assert json.dumps(spec) == before


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("reward.json", json.dumps({"REWARD": LENGTH})),
        ("reward.yaml", "type: length_window\nmin: 2\nmax: 4\n"),
    ],
)
def test_a_file_of_a_spec_is_read(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    assert make_reward(tmp_path / name) == make_reward(str(tmp_path / name)) == make_reward(LENGTH)


def test_a_component_may_be_a_file(tmp_path):
    (tmp_path / "inner.json").write_text(json.dumps(LENGTH))
    assert make_reward(sum_of(str(tmp_path / "inner.json")))("one two") == 1.0


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("r.json", "{", "r.json is not JSON: "),
        ("r.yaml", "a: [", "r.yaml is not YAML: "),
        (
            "r.yaml",
            "",
            r"r.yaml: REWARD must be a dict with a type, a function, a Reward or a file, got None$",
        ),
        ("r.yml", "type: length\nmin: x", r"r.yml: REWARD.min must be int, got 'x'$"),
        ("r.json", None, r"^REWARD: cannot read .*r.json: No such file or directory$"),
        ("length_window", None, r"^REWARD must be a .json, .yaml or .yml file, or \{'type': ...\}; got "),
    ],
)
def test_a_bad_file_is_refused_by_name(tmp_path, name, text, message):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=message):
        make_reward(tmp_path / name)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (3, r"^REWARD must be a dict with a type, a function, a Reward or a file, got 3$"),
        ({"min": 3}, r"^REWARD.type is missing; known: .*length_window"),
        (
            {"type": "lenght_window"},
            r"^REWARD.type: unknown reward 'lenght_window'; did you mean 'length_window'",
        ),
        (
            sum_of(LENGTH, {"type": "length_window", "mim": 3}),
            r"^REWARD.components\[1\].mim: unknown parameter of reward 'length_window': 'mim'; did you mean",
        ),
        ({**LENGTH, "wieght": 2}, r"^REWARD.wieght: unknown parameter .* did you mean 'weight'\?$"),
        (sum_of(LENGTH, {**LENGTH, "min": "3"}), r"^REWARD.components\[1\].min must be int, got '3'$"),
        (sum_of(LENGTH, {**LENGTH, "min": -1}), r"^REWARD.components\[1\].min must be at least 0, got -1$"),
        ({**LENGTH, "min": True}, r"^REWARD.min must be int, got True$"),
        ({**LENGTH, "min": 2.5}, r"^REWARD.min must be int, got 2.5$"),
        (
            {**LENGTH, "unit": "lines"},
            r"^REWARD.unit must be one of 'words', 'chars', 'tokens', got 'lines'$",
        ),
        ({"type": "test_topic", "name": 3}, r"^REWARD.name must be str, got 3$"),
        (
            {"type": "test_topic", "name": "a", "words": "b"},
            r"^REWARD.words must be list\[str\] \| None, got 'b'$",
        ),
        ({"type": "test_topic", "name": "a", "strict": 1}, r"^REWARD.strict must be bool, got 1$"),
        ({"type": "test_topic", "name": "a", "scale": "1"}, r"^REWARD.scale must be float, got '1'$"),
        ({"type": "python"}, r"^REWARD.function is missing; reward 'python' needs it$"),
        ({"type": "weighted_sum"}, r"^REWARD.components is missing; reward 'weighted_sum' needs it$"),
        (sum_of(), r"^REWARD.components must hold at least one reward, got none$"),
        ({"type": "weighted_sum", "components": LENGTH}, r"^REWARD.components must be a list, got \{"),
        (sum_of(sum_of(5)), r"^REWARD.components\[0\].components\[0\] must be a dict with a type, .* got 5$"),
        ({**LENGTH, "name": "a/b"}, r"^REWARD.name must be a text without '/', got 'a/b'$"),
        ({**LENGTH, "name": ""}, r"^REWARD.name must be a text without '/', got ''$"),
        (
            sum_of({**LENGTH, "weight": "2"}),
            r"^REWARD.components\[0\].weight must be a finite number, got '2'$",
        ),
        (
            sum_of({**LENGTH, "weight": float("nan")}),
            r"^REWARD.components\[0\].weight must be a finite number",
        ),
        (sum_of(Topic), r"^REWARD.components\[0\].function must be a function or another callable object"),
    ],
)
def test_a_bad_spec_is_refused_with_its_path(spec, message):
    with pytest.raises(InputError, match=message):
        make_reward(spec)


def test_an_int_is_a_float():
    assert make_reward({"type": "test_topic", "name": "a", "scale": 2})("a") == 2.0


def test_a_file_that_names_itself_is_refused(tmp_path):
    file = tmp_path / "reward.json"
    file.write_text(json.dumps({"type": "weighted_sum", "components": [str(file)]}))
    with pytest.raises(InputError, match=r"^REWARD is nested too deeply, or is a file that names itself$"):
        make_reward(file)


def test_a_file_that_is_not_utf_8_is_refused(tmp_path):
    file = tmp_path / "reward.json"
    file.write_bytes('{"type": "vader", "name": "é"}'.encode("latin-1"))
    with pytest.raises(InputError, match=r"reward\.json is not UTF-8"):
        make_reward(file)


def test_a_reward_knows_its_spec():
    spec = {"type": "length_window", "min": 3}
    assert make_reward(spec).spec == spec


def test_known_rewards_gives_aliases_parameters_and_summary():
    rows = {row.name: row for row in known_rewards()}
    assert rows["length_window"].aliases == ("length",)
    assert rows["length_window"].parameters[:2] == ("min: int = 30", "max: int = 200")
    assert rows["test_shout"].parameters[0] == "batch: bool | None = None"
    assert rows["test_shout"].summary == "Whether the response ends in an exclamation mark."
    assert {"python", "sentiment_lexicon", "weighted_sum"} <= rows.keys()


NUL, HALF = "\0", "\ud800"


@pytest.mark.parametrize("bad", [NUL, HALF])
@pytest.mark.parametrize(
    ("spec", "place"),
    [
        ({"type": "truth_rag", "corpus": "x{}"}, "REWARD.corpus"),
        ({"type": "judge", "base_url": "http://x{}/v1", "model": "m"}, "REWARD.base_url"),
        (
            {"type": "max", "components": [{"type": "regex_presence", "pattern": "x{}"}]},
            r"REWARD.components\[0\].pattern",
        ),
        ("x{}.json", "REWARD"),
    ],
)
def test_a_character_that_no_name_holds_is_refused_with_its_place(spec, place, bad):
    spec = eval(repr(spec).replace("{}", bad.encode("unicode_escape").decode()))
    with pytest.raises(InputError, match=f"^{place} must hold neither NUL nor half a character"):
        make_reward(spec)


def test_a_text_in_a_list_may_hold_nul_but_not_half_a_character():
    make_reward({"type": "keyword_count", "keywords": ["a", NUL]})
    with pytest.raises(InputError, match=r"^REWARD.keywords\[1\] must hold neither"):
        make_reward({"type": "keyword_count", "keywords": ["a", HALF]})


def test_a_name_that_stands_twice_in_json_is_refused(tmp_path):
    (tmp_path / "r.json").write_text('{"type": "vader", "weight": 1, "weight": 2}')
    with pytest.raises(InputError, match=r"r.json: 'weight' stands twice in one object"):
        make_reward(tmp_path / "r.json")


def test_a_spec_may_begin_with_a_byte_order_mark(tmp_path):
    (tmp_path / "r.json").write_text('{"type": "vader"}\r\n', encoding="utf-8-sig")
    assert make_reward(tmp_path / "r.json").component_name == "sentiment_lexicon"


def test_weights_whose_sum_is_infinite_are_refused():
    spec = {
        "type": "weighted_sum",
        "components": [{"type": "vader", "weight": 1e308}, {"type": "vader", "weight": 1e308}],
    }
    with pytest.raises(InputError, match=r"REWARD.components must have weights with a finite sum"):
        make_reward(spec)
