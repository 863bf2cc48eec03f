import math
import threading

import numpy as np
import pytest
import torch

from hybrid.core import InputError
from hybrid.rewards import Handling, Reward, RewardError, RewardTimeout, Samples, make_reward, register_reward
from hybrid.rewards.postprocess import Clip, EMANormalize, Scale


class Returns(Reward):
    """Returns what it is given, whatever the responses."""

    def __init__(self, values):
        self.values = values

    def _score(self, responses, targets, prompts, items):
        return self.values


class Echo(Reward):
    """Keeps what the hook was given."""

    def _score(self, *samples):
        self.samples = samples
        return [0.0 for _ in samples[0]]


class Characters(Reward):
    def _score_one(self, response, target, prompt, item):
        return len(response)


def raise_on_bad(response):
    if response == "bad":
        raise KeyError("missing")
    return 1.0


def test_batch_form_equals_the_single_form():
    responses = ["a", "", "abc"]
    assert Characters().score(responses) == [Characters()(response) for response in responses] == [1, 0, 3]


def test_the_scores_are_a_list_that_knows_its_tensors():
    output = Characters().score(["a", "abc"])
    assert isinstance(output, list)
    assert output.values.dtype == torch.float32 and output.values.tolist() == [1.0, 3.0]
    assert output.valid.tolist() == [True, True]


def test_a_batch_may_be_given_as_samples():
    assert Characters().score(Samples(["a", None], targets=["t", "u"])) == [1, 0]


def test_none_is_the_empty_text():
    echo = Echo()
    echo.score([None, "a"], [None, "t"], None, None)
    assert echo.samples == (["", "a"], ["", "t"], ["", ""], [None, None])


def test_single_form_passes_target_prompt_and_item():
    echo = Echo()
    echo("r", "t", prompt="p", item={"id": 1})
    assert echo.samples == (["r"], ["t"], ["p"], [{"id": 1}])


def test_a_lone_surrogate_is_replaced():
    echo = Echo()
    echo("a\ud83d", ["b", "\udc00"])
    assert echo.samples[:2] == (["a\ufffd"] * 2, ["b", "\ufffd"])


@pytest.mark.parametrize("column", ["responses", "targets", "prompts"])
def test_what_is_no_text_is_refused_with_its_place(column):
    batch = {"responses": ["a", "b"], column: ["a", 3]}
    with pytest.raises(ValueError, match=rf"^{column}\[1\] must be a text or None, got 3$"):
        Characters().score(**batch)


def test_an_empty_batch_has_no_scores_and_calls_no_hook():
    assert Returns([1.0]).score([]) == []


@pytest.mark.parametrize("column", ["targets", "prompts", "items"])
def test_inputs_of_different_lengths_are_refused(column):
    with pytest.raises(ValueError, match=f"{column} must be as many as responses: got 1 for 2"):
        Characters().score(["a", "b"], **{column: ["x"]})


def test_one_text_in_place_of_a_list_is_refused():
    with pytest.raises(ValueError, match="responses must be a list, got one text"):
        Characters().score("abc")


@pytest.mark.parametrize("value", [0.5, np.float64(0.5), torch.tensor(0.5), "ab", None, {0: 1.0, 1: 1.0}])
def test_one_value_for_a_batch_is_refused(value):
    with pytest.raises(RewardError, match=r"'Returns' must return a list .* got the one value .* for 2"):
        Returns(value).score(["a", "b"])


def test_one_value_for_a_batch_of_one_is_refused():
    with pytest.raises(RewardError, match=r"got the one value 0\.5 for 1 responses"):
        Returns(0.5).score(["a"])


def test_a_wrong_number_of_values_is_refused():
    with pytest.raises(RewardError, match="got 1 values for 2 responses"):
        Returns([1.0]).score(["a", "b"])


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e39, "0.5", None, [1.0, 2.0], torch.ones(2), 10**400])
def test_what_is_not_a_finite_number_is_refused_with_its_sample(value):
    with pytest.raises(RewardError, match=r"'Returns' returned .* for response 'b'; a score must be") as caught:
        Returns([1.0, value]).score(["a", "b"])
    assert caught.value.__notes__ == ["It is sample 1 of the batch."]


@pytest.mark.parametrize("values", [[True, False], np.array([1, 0]), torch.tensor([1.0, 0.0]), (1, 0)])
def test_scores_of_any_number_type_become_floats(values):
    scores = Returns(values).score(["a", "b"])
    assert scores == [1.0, 0.0]
    assert all(type(score) is float for score in scores)


def test_a_reward_that_raises_fails_with_the_sample_shown():
    with pytest.raises(RewardError, match=r"'raise_on_bad' failed on response 'bad': KeyError") as caught:
        make_reward(raise_on_bad).score(["good", "bad"])
    assert isinstance(caught.value.__cause__, KeyError)


def test_a_batch_that_raises_fails_with_its_first_response_shown():
    def broken(responses):
        raise KeyError("missing")

    with pytest.raises(RewardError, match="'broken' failed on a batch of 2, the first response 'a': KeyError"):
        make_reward(broken).score(["a", "b"])


def test_a_long_response_is_shortened_in_errors():
    with pytest.raises(RewardError) as caught:
        Returns([math.nan]).score(["word " * 1000])
    assert len(str(caught.value)) < 200


def test_a_reward_without_a_hook_says_which_to_write():
    class Empty(Reward):
        pass

    with pytest.raises(RewardError, match="Empty must implement _score_one or _score"):
        Empty()("a")


def test_a_batch_that_raises_is_asked_one_by_one_to_find_the_sample():
    class Fragile(Reward):
        def _score(self, responses, *_):
            if "bad" in responses:
                raise KeyError("missing")
            return [1.0 for _ in responses]

    with pytest.raises(RewardError, match="'Fragile' failed on response 'bad': KeyError"):
        Fragile().score(["good", "bad"])
    fallback = make_reward(Fragile())
    fallback.handling = Handling(on_error="value", error_value=-1)
    assert fallback.score(["good", "bad", "fine"]) == [1, -1, 1]


def test_a_leaf_reports_its_own_score_by_name():
    output = Characters().score(["ab"])
    assert (output, output.raw, output.components) == ([2.0], [2.0], {"Characters": [2.0]})


def test_equal_samples_are_asked_about_once():
    echo = Echo()
    output = echo.score(["a", "b", "a", "a"], ["t", "t", "t", "u"])
    assert echo.samples[:2] == (["a", "b", "a"], ["t", "t", "u"])
    assert output.parts["Echo"].counts["cache_hits"] == 1


def test_samples_with_different_items_are_different():
    echo = Echo()
    echo.score(["a", "a"], items=[{"id": 1}, {"id": 2}])
    assert echo.samples[0] == ["a", "a"]


def test_what_a_reward_does_not_read_makes_no_difference():
    echo = Echo()
    echo.reads = ("response",)
    echo.score(["a", "a", "b"], ["t", "u", "v"], ["p", "q", "r"], [{}, {}, {}])
    assert echo.samples[0] == ["a", "b"]
    echo.reads, echo.takes_references = ("response", "target"), True
    echo.score(["a", "a"], [["x", "y"], "('x', 'y')"])
    assert echo.samples[0] == ["a", "a"]


def test_columns_may_be_arrays():
    assert Characters().score(np.array(["a", "bc"]), np.array(["t", "u"]), np.array(["p", "q"])) == [1, 2]


def test_a_reward_that_needs_the_batch_gets_all_of_it():
    echo = Echo()
    echo.needs_batch = True
    echo.score(["a", "a"])
    assert echo.samples[0] == ["a", "a"]


def test_of_several_references_the_best_counts():
    class Common(Reward):
        def _score_one(self, response, target, prompt, item):
            return len(set(response) & set(target))

    assert Common().score(["abc", "abc", "abc"], [["x", "ab", "a"], "c", []]) == [2, 1, 0]
    assert Common()("abc", ["a", None]) == 1


def test_an_error_that_stands_in_the_place_of_a_number_is_that_samples_failure():
    reward = Returns([1.0, RewardTimeout("too slow"), KeyError("x")])
    reward.handling = Handling(on_error="skip")
    output = reward.score(["a", "b", "c"])
    assert output.valid.tolist() == [True, False, False]
    assert math.isnan(output[1])
    counts = output.parts["Returns"].counts
    assert (counts["invalid"], counts["timeouts"]) == (2, 1)
    reward.handling = Handling()
    with pytest.raises(RewardTimeout, match="'Returns' failed on response 'b': too slow"):
        reward.score(["a", "b", "c"])


def test_what_cannot_be_loaded_is_no_samples_fault():
    class Unloadable(Reward):
        def _score_one(self, response, target, prompt, item):
            raise InputError("model 'x' cannot be loaded")

    reward = Unloadable()
    reward.handling = Handling(on_error="skip")
    with pytest.raises(InputError, match="model 'x' cannot be loaded"):
        reward.score(["a", "b"])


def test_interrupts_are_never_caught():
    def interrupted(response):
        raise KeyboardInterrupt

    reward = make_reward({"type": "python", "function": interrupted, "on_error": "value", "error_value": 0})
    with pytest.raises(KeyboardInterrupt):
        reward("a")


@pytest.mark.parametrize("response", ["", " \n", None])
def test_empty_value_is_the_score_of_an_empty_response(response):
    reward = make_reward(
        {"type": "python", "function": lambda r: 5, "empty_value": -1, "postprocess": {"type": "clip"}}
    )
    output = reward.score([response, "a"])
    assert output == [-1, 1]
    assert output.raw == [None, 5]


def test_max_chars_cuts_every_text():
    echo = make_reward(Echo())
    echo.handling = Handling(max_chars=2)
    output = echo.score(["abc", "ab"], [["abc", "b"], "x"], ["abc", ""])
    assert echo.samples[:3] == (["ab", "ab", "ab"], ["ab", "b", "x"], ["ab", "ab", ""])
    assert output.parts["Echo"].counts["truncated"] == 1


def test_metrics_are_over_the_rows_that_have_a_score():
    reward = Returns([1.0, 3.0, math.nan])
    reward.handling = Handling(on_error="skip", postprocess=(Scale(mul=2),))
    metrics = reward.score(["a", "b", "c"]).metrics()
    assert metrics.pop("seconds_reward/Returns") >= 0
    assert metrics == {
        "reward/Returns/raw_mean": 2, "reward/Returns/raw_std": 1,
        "reward/Returns/score_mean": 4, "reward/Returns/score_std": 2,
        "reward/Returns/weighted_mean": 4, "reward/Returns/weighted_std": 2,
        "reward/Returns/invalid": 1, "reward/Returns/timeouts": 0, "reward/Returns/cache_hits": 0,
    }  # fmt: skip


def test_state_of_another_reward_is_refused():
    with pytest.raises(ValueError, match=r"'Characters' has the state \[\[\]\], got \[\['mean'\]\]"):
        Characters().load_state_dict({"mean": 0.0})


def test_register_reward_refuses_a_class_that_is_no_reward():
    with pytest.raises(TypeError, match="takes a Reward class or a function"):
        register_reward("not_a_reward")(dict)


def spoils(response, target, item):
    target.append("spoilt")
    item["choices"].clear()
    item["seen"]["by"] = response
    return 1.0


def spoils_all(responses, targets, prompts, items):
    for sample in zip(responses, targets, items, strict=True):
        spoils(*sample)
    for column in (responses, targets, prompts, items):
        column.reverse()
    return [1.0] * len(responses)


class Spoils(Reward):
    takes_references = True

    def _score_one(self, response, target, prompt, item):
        return spoils(response, target, item)


@pytest.mark.parametrize("reward", [spoils, spoils_all, Spoils()])
def test_a_reward_that_changes_what_it_is_given_changes_a_copy(reward):
    batch = Samples(
        ["a", "b"], [["t", "u"], ["v", "w"]], ["p", "q"], [{"choices": [1], "seen": {}}, {"choices": [2], "seen": {}}]
    )
    before = repr(batch)
    echo = Echo()
    echo.takes_references = True
    both = make_reward({"type": "weighted_sum", "components": [reward, echo]})
    assert both.score(batch) == [0.5, 0.5]
    assert repr(batch) == before
    assert repr(Samples(*echo.samples)) == before


def test_each_sample_of_one_item_gets_its_own_copy():
    items = [{"seen": []}] * 2

    def counts(response, item):
        item["seen"].append(response)
        return len(item["seen"])

    assert make_reward(counts).score(["a", "b"], items=items) == [1, 1]
    assert make_reward(counts).score(["a", "a"], items=items).parts["counts"].counts["cache_hits"] == 1


def test_an_item_that_cannot_be_copied_is_named():
    with pytest.raises(RewardError, match=r"items\[0\] cannot be copied .*: TypeError"):
        make_reward(lambda response, item: 1.0).score(["a"], items=[{"lock": threading.Lock()}])


@pytest.mark.parametrize("value", [1e30, -1e30, 1.1e16])
def test_a_score_so_large_that_it_would_drown_its_batch_is_named(value):
    with pytest.raises(
        RewardError, match=r"'Returns' returned .*e\+.. for response 'b'; a score must be at most 1e\+16"
    ):
        Returns([1.0, value]).score(["a", "b"])
    assert Returns([1e16]).score(["a"]) == [1e16]


def test_the_largest_scores_can_be_whitened():
    scores = Returns([1e16] * 500 + [-1e16] * 500).score([str(i) for i in range(1000)]).values
    assert scores.square().sum().isfinite()


@pytest.mark.parametrize("step", [Scale(mul=1e30), EMANormalize()])
def test_a_large_score_fails_after_the_postprocessing_and_before_a_step_that_remembers(step):
    reward = Returns([1.0 if isinstance(step, Scale) else 1e30])
    reward.handling = Handling(postprocess=(step,), on_error="value", error_value=-1)
    output = reward.score(["a"])
    assert output == [-1] and output.parts["Returns"].counts["invalid"] == 1


def test_a_large_score_that_is_clipped_is_one_like_any_other():
    reward = Returns([1e30])
    reward.handling = Handling(postprocess=(Clip(),))
    assert reward.score(["a"]) == [1]


@pytest.mark.parametrize("value", [10**5000, torch.zeros(3, 3), "x\ny" * 1000], ids=["int", "tensor", "text"])
def test_whatever_a_reward_returned_is_told_in_one_short_line(value):
    with pytest.raises(RewardError, match="a score must be a finite number") as info:
        make_reward(lambda response: value)("a")
    assert "\n" not in str(info.value) and len(str(info.value)) < 400
