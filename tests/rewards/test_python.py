import functools
import sys

import pytest

from hybrid.core import InputError
from hybrid.rewards import make_reward
from hybrid.rewards.base import RewardError, RewardTimeout


class Prefix:
    """A callable object."""

    def __call__(self, response, prompt):
        return response.startswith(prompt)


def python(function, batch=None):
    return make_reward({"type": "python", "function": function, "batch": batch})


def of_one(response, target, *, prompt, item):
    return len(response + target + prompt) + item["bonus"]


def of_many(responses, targets, prompts, items):
    return [of_one(r, t, prompt=p, item=i) for r, t, p, i in zip(responses, targets, prompts, items, strict=True)]


def of_any(response, **rest):
    return of_one(response, **rest)


def of_any_many(responses, **rest):
    return of_many(responses, **rest)


BATCH = (["a", "bb"], ["c", ""], ["dd", "d"], [{"bonus": 10}, {"bonus": 20}])


@pytest.mark.parametrize("function", [of_one, of_many, of_any, of_any_many, functools.partial(of_one)])
def test_both_forms_get_everything_they_name(function):
    assert python(function).score(*BATCH) == [14, 23]


@pytest.mark.parametrize(
    ("function", "score"),
    [
        (lambda target, response: len(target) - len(response), [0, -2]),
        (lambda prompts, responses: [len(p) for p in prompts], [2, 1]),
        (lambda item: item["bonus"], [10, 20]),
        (lambda text: len(text), [1, 2]),
        (lambda text, scale=3: scale * len(text), [3, 6]),
        (lambda text, **rest: len(text + rest["target"]), [2, 2]),
        (len, [1, 2]),
        (Prefix(), [0, 0]),
    ],
)
def test_a_function_gets_what_it_names(function, score):
    assert python(function).score(*BATCH) == score


@pytest.mark.parametrize(
    "function", [lambda texts: [len(t) for t in texts], lambda *_, **columns: map_lengths(**columns)]
)
def test_batch_true_overrides_the_names(function):
    assert python(function, batch=True).score(*BATCH) == [1, 2]


def map_lengths(responses, targets, prompts, items):
    return [len(response) for response in responses]


def test_batch_false_gives_one_sample_to_anything():
    assert python(lambda **sample: len(sample["response"]), batch=False).score(*BATCH) == [1, 2]


@pytest.mark.parametrize(
    ("function", "problem"),
    [
        (lambda: 1.0, "takes no response"),
        (lambda *args: 1.0, "takes no response"),
        (lambda a, b: 1.0, "needs b, which a reward is not given"),
        (lambda response, reference: 1.0, "needs reference, which a reward is not given"),
        (lambda response, targets: 1.0, "may be of either form"),
        (lambda **rest: 1.0, "may be of either form"),
    ],
)
def test_a_signature_that_does_not_say_what_it_wants_is_refused_with_the_two_forms(function, problem):
    with pytest.raises(InputError, match=rf"^REWARD.function <lambda>\(.*\) {problem}") as caught:
        python(function)
    assert "f(response, target, *, prompt, item)" in str(caught.value)
    assert "f(responses, targets, prompts, items)" in str(caught.value)


def test_a_callable_without_a_signature_is_refused():
    with pytest.raises(InputError, match="has no signature to read; wrap it in f"):
        python(max)


def test_a_function_is_found_in_the_working_directory(tmp_path, monkeypatch):
    (tmp_path / "reward_of_the_user.py").write_text("def score(response):\n    return len(response)\n")
    monkeypatch.chdir(tmp_path)
    # As a console script starts: without the working directory.
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    assert python("reward_of_the_user:score")("abc") == 3


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("json", r"^REWARD.function must look like 'package.module:name', got 'json'$"),
        ("no_such_module:f", r"^REWARD.function 'no_such_module:f': no module named 'no_such_module'"),
        ("json:lods", r"^REWARD.function 'json:lods': module 'json' has no 'lods'$"),
        ("math:pi", r"^REWARD.function must be a function or another callable object, got 3.14"),
        ("json:JSONDecoder", r"^REWARD.function must be a function or another callable object, got <class"),
    ],
)
def test_a_path_that_names_no_function_is_refused(path, message):
    with pytest.raises(InputError, match=message):
        python(path)


ISOLATED = """
import os, time

def length(response, item):
    if response == "hangs":
        time.sleep(1e9)
    if response == "dies":
        os._exit(7)
    return len(response) + (item or {"bonus": 0})["bonus"]

def lengths(responses):
    return [length(response, None) for response in responses]

def shorter(responses):
    return [1.0]
"""


@pytest.fixture
def isolated(tmp_path, monkeypatch):
    """isolated(name, ...): the reward of one of the functions above, in a process of its own."""
    (tmp_path / "isolated_rewards.py").write_text(ISOLATED)
    monkeypatch.chdir(tmp_path)

    def make(name, **settings):
        function = f"isolated_rewards:{name}"
        return make_reward({"type": "python", "function": function, "isolate": True, "timeout": 1, **settings})

    return make


def test_an_isolated_function_scores_alike_in_either_form(isolated):
    assert isolated("length").score(["a", "bb"]) == [1, 2]
    assert isolated("lengths").score(["a", "bb"]) == [1, 2]
    assert isolated("length")("abc", item={"bonus": 4}) == 7


def test_a_hanging_call_is_a_timeout_that_shows_the_sample(isolated):
    with pytest.raises(RewardTimeout, match=r"on response 'hangs': it took longer than timeout \(0.2 s\)"):
        isolated("length", timeout=0.2)("hangs")


def test_the_samples_around_a_hanging_one_are_scored(isolated):
    reward = isolated("length", timeout=0.7, on_error="value", error_value=-1)
    assert reward.score(["a", "hangs", "ccc"]) == [1, -1, 3]


def test_a_crash_is_the_error_of_its_sample_and_in_the_batch_form_of_the_batch(isolated):
    with pytest.raises(RewardError, match="on response 'dies': its process ended with exit code 7"):
        isolated("length")("dies")
    scores = {"length": [1, -1, 3], "lengths": [-1, -1, -1]}
    for name, expected in scores.items():
        assert isolated(name, on_error="value", error_value=-1).score(["a", "dies", "ccc"]) == expected


def test_a_hanging_batch_is_waited_for_once(isolated):
    output = isolated("lengths", timeout=0.7, on_error="value", error_value=-1).score(["a", "hangs", "ccc"])
    assert output == [-1, -1, -1]
    assert output.parts["python"].counts["timeouts"] == 3


def test_an_isolated_function_must_return_one_number_per_response(isolated):
    with pytest.raises(RewardError, match="must return a list of one number per response"):
        isolated("shorter").score(["a", "bb"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"function": len, "isolate": True}, r"^REWARD.function must be given by name, as 'package.module:name'"),
        ({"function": "math:sqrt", "timeout": 5.0}, r"^REWARD.timeout can be had only with isolate true, got 5.0"),
        ({"function": "math:sqrt", "interpreter": "python"}, r"^REWARD.interpreter can be had only with isolate true"),
        ({"function": "math:sqrt", "isolate": True, "timeout": 0}, r"^REWARD.timeout must be a positive number"),
        ({"function": "math:pi", "isolate": True}, r"^REWARD.function must be a function or another callable object"),
        ({"function": "json", "isolate": True}, r"^REWARD.function must look like 'package.module:name', got 'json'"),
    ],
)
def test_what_cannot_be_isolated_is_refused(settings, message):
    with pytest.raises(InputError, match=message):
        make_reward({"type": "python", **settings})


def test_a_batch_function_gets_the_whole_batch_and_a_one_sample_function_each_different_sample():
    seen = []

    def many(responses):
        seen.append(list(responses))
        return [1.0 for _ in responses]

    def one(response):
        seen.append(response)
        return 1.0

    make_reward(many).score(["a", "a", "b"])
    make_reward(one).score(["a", "a", "b"])
    assert seen == [["a", "a", "b"], "a", "b"]


def test_several_references_reach_the_function_as_a_list():
    reward = make_reward(lambda response, target: float(response in target))
    assert reward.score(["a", "b"], [["a", "x"], "c"]) == [1, 0]


@pytest.mark.parametrize("stop", [SystemExit(0), SystemExit("enough")])
def test_a_function_that_exits_ends_no_run(stop):
    def exits(response):
        raise stop

    async def exits_later(response):
        raise stop

    for function in (exits, exits_later):
        with pytest.raises(RewardError, match=r"failed on response 'a': it raised SystemExit"):
            make_reward(function)("a")


def test_bytes_are_no_scores():
    with pytest.raises(RewardError, match="got the one value b'ab'"):
        python(lambda responses: b"ab").score(["a", "b"])


def test_a_relative_module_names_no_function():
    with pytest.raises(InputError, match=r"function must look like 'package.module:name', got '.x:f'"):
        python(".x:f")
