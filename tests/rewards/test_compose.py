import math

import pytest

from hybrid.core import InputError
from hybrid.rewards import Reward, RewardError, make_reward


class Counter(Reward):
    """Scores the number of batches it has seen."""

    def __init__(self):
        self.batches = 0

    def _score(self, responses, *_):
        self.batches += 1
        return [self.batches] * len(responses)

    def _state(self):
        return {"batches": self.batches}

    def _load_state(self, state):
        self.batches = state["batches"]


def constant(value, **settings):
    return {"type": "python", "function": lambda response: value, "name": "constant", **settings}


def weighted_sum(*components, **settings):
    return {"type": "weighted_sum", "components": list(components), **settings}


def test_what_the_run_tells_a_reward_reaches_every_component():
    heard = []

    class Listening(Reward):
        def _score_one(self, response, target, prompt, item):
            return 0.0

        def attach(self, host):
            heard.append(("attach", host))

        def before_score(self, examples, sampling):
            heard.append(("before_score", examples, sampling))

        def after_rollout(self, rollout):
            heard.append(("after_rollout", rollout))

        def before_evaluation(self, seed):
            heard.append(("before_evaluation", seed))

        def after_evaluation(self, rollouts):
            heard.append(("after_evaluation", rollouts))

        def evaluated(self):
            heard.append(("evaluated",))

    inner = {"type": "product", "components": [Listening(), {"type": "exact_match"}]}
    outer = make_reward({"type": "weighted_sum", "components": [inner, Listening()]})
    told = [
        ("attach", 1), ("before_score", [2], 3), ("after_rollout", 4), ("before_evaluation", 5),
        ("after_evaluation", [6]), ("evaluated",),
    ]  # fmt: skip
    for name, *arguments in told:
        getattr(outer, name)(*arguments)
    assert heard == [call for call in told for _ in range(2)]


def test_weighted_sum_divides_by_the_sum_of_weights():
    reward = make_reward(weighted_sum(constant(1.0, weight=3), constant(0.0, weight=1)))
    assert reward("a") == 0.75


@pytest.mark.parametrize("weights", [(1, -1), (0.1, 0.2, -0.3), (0, 0)])
def test_weighted_sum_with_weights_that_cancel_divides_by_one(weights):
    reward = make_reward(weighted_sum(*[constant(float(i), weight=w) for i, w in enumerate(weights)]))
    assert reward("a") == pytest.approx(sum(i * w for i, w in enumerate(weights)))


def test_nested_weighted_sums_match_the_hand_computed_score():
    inner = weighted_sum(constant(1.0, weight=1), constant(4.0, weight=2), weight=2, name="outer")
    output = make_reward(weighted_sum(constant(0.5), inner)).score(["a", "b"])
    # inner = (1·1 + 2·4) / 3 = 3, total = (1·0.5 + 2·3) / 3
    assert output == [6.5 / 3] * 2
    assert output.components == {
        "constant": [0.5] * 2,
        "outer": [3.0] * 2,
        "outer/constant": [1.0] * 2,
        "outer/constant#2": [4.0] * 2,
    }


def test_components_are_reported_before_their_postprocess_and_weight():
    clipped = constant(5.0, weight=2, postprocess={"type": "clip"})
    output = make_reward(weighted_sum(clipped, constant(0.0, name="none"))).score(["a"])
    assert output.components == {"constant": [5.0], "none": [0.0]}
    assert output == [2 / 3]


def test_a_second_component_of_a_name_is_numbered_past_names_that_are_taken():
    output = make_reward(weighted_sum(constant(0, name="a#2"), constant(1, name="a"), constant(2, name="a")))
    assert list(output.components) == ["a#2", "a", "a#3"]


def test_components_may_be_functions_and_rewards():
    def one(response):
        return 1.0

    output = make_reward(weighted_sum(one, Counter())).score(["a"])
    assert output.components == {"one": [1.0], "Counter": [1.0]}


def test_a_component_that_fails_is_named_with_its_place():
    def broken(response):
        raise KeyError("missing")

    reward = make_reward(weighted_sum(weighted_sum(constant(1), broken, name="outer")))
    with pytest.raises(RewardError, match="'broken' failed on response 'a'") as caught:
        reward("a")
    assert caught.value.__notes__ == [
        "It is the component 'broken' of the reward 'outer'.",
        "It is the component 'outer' of the reward 'weighted_sum'.",
        "It is sample 0 of the batch.",
    ]


def test_a_sum_that_overflows_is_refused():
    reward = make_reward(weighted_sum(constant(1e30, weight=1e300), constant(0, weight=-1e300)))
    with pytest.raises(RewardError, match="'weighted_sum' returned inf"):
        reward("a")


def test_state_is_gathered_from_components_and_restored():
    def spec():
        return weighted_sum(Counter(), weighted_sum(Counter(), name="inner", postprocess={"type": "clip", "max": 9}))

    seen, fresh = make_reward(spec()), make_reward(spec())
    seen("a")
    fresh.load_state_dict(seen.state_dict())
    assert seen.state_dict()["reward"]["Counter"]["reward"] == {"batches": 1}
    assert fresh("a") == seen("a") == 2.0


def composite(kind, *components, **settings):
    return make_reward({"type": kind, "components": list(components), **settings})


def length(response):
    return float(len(response))


@pytest.mark.parametrize(("kind", "score"), [("product", 3.0), ("min", -2.0), ("max", 3.0)])
def test_product_min_and_max_are_what_they_say(kind, score):
    components = [constant(-2.0), constant(3.0)] if kind != "product" else [constant(2.0), constant(1.5)]
    assert composite(kind, *components)("a") == score


@pytest.mark.parametrize("kind", ["product", "min", "max"])
def test_a_weight_where_it_means_nothing_is_refused(kind):
    with pytest.raises(InputError, match=r"^REWARD.components\[1\].weight means nothing here; .* got 2.0$"):
        composite(kind, constant(1.0), constant(1.0, weight=2))


def test_gated_asks_the_others_only_where_the_gate_passes():
    seen = []

    def costly(responses):
        seen.append(list(responses))
        return [float(len(r)) for r in responses]

    reward = composite("gated", length, costly, constant(1.0, weight=3), threshold=2, otherwise=-1)
    output = reward.score(["a", "bb", "", "dddd"])
    assert output == [-1, (2 + 3) / 4, -1, (4 + 3) / 4]
    assert seen == [["bb", "dddd"]]
    assert output.components == {
        "length": [1, 2, 0, 4], "costly": [None, 2, None, 4], "constant": [None, 1, None, 1],
    }  # fmt: skip


def test_gated_whose_gate_lets_nothing_pass_asks_nobody():
    assert composite("gated", length, constant(1.0), threshold=9).score(["a", "b"]) == [0, 0]


def test_gated_needs_something_behind_the_gate():
    with pytest.raises(InputError, match=r"^REWARD.components must be the gate and at least one more, got 1$"):
        composite("gated", length)


def test_the_weighted_scores_add_up_to_the_total():
    scaled = {"type": "scale", "mul": 2.0, "add": 1.0}
    output = composite("weighted_sum", {"type": "python", "function": length, "weight": 3, "postprocess": scaled},
                       constant(-1.0, weight=0.5)).score(["a", "bb"])  # fmt: skip
    parts = output.parts
    assert parts["python"].raw == [1, 2]
    assert parts["python"].score == [3, 5]
    assert parts["python"].weighted == [3 * 3 / 3.5, 3 * 5 / 3.5]
    sums = [a + b for a, b in zip(parts["python"].weighted, parts["constant"].weighted, strict=True)]
    assert sums == pytest.approx(output, rel=1e-15)


def fails_on_b(response):
    if response == "b":
        raise KeyError("missing")
    return 1.0


def failing(**settings):
    return {"type": "python", "function": fails_on_b, "name": "failing", **settings}


def test_a_component_that_is_skipped_leaves_its_weight_to_the_others():
    reward = composite("weighted_sum", failing(weight=9, on_error="skip"), constant(0.5, weight=1))
    output = reward.score(["a", "b"])
    assert output == pytest.approx([0.95, 0.5])
    assert output.parts["failing"].weighted == [0.9, None]
    assert output.parts["failing"].counts["invalid"] == 1


def test_on_error_value_puts_its_value_in_the_failures_place():
    reward = composite("weighted_sum", failing(on_error="value", error_value=-1), constant(0.0))
    output = reward.score(["a", "b"])
    assert output == [0.5, -0.5]
    assert output.components["failing"] == [1.0, None]


def test_a_failure_reaches_the_next_reward_above_that_handles_it():
    inner = {"type": "min", "components": [failing(), constant(2.0)], "on_error": "value", "error_value": 7}
    assert composite("weighted_sum", inner, constant(1.0)).score(["a", "b"]) == [1.0, 4.0]


def test_a_sample_that_every_component_skips_is_skipped():
    output = composite("weighted_sum", composite("max", failing(on_error="skip"))).score(["a", "b"])
    assert output.valid.tolist() == [True, False]
    assert output[0] == 1.0 and math.isnan(output[1])
    gated = composite("gated", failing(on_error="skip"), constant(0.25))
    assert gated.score(["a", "b"]).valid.tolist() == [True, False]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"threshold": float("nan")}, r"^REWARD.threshold must be finite, got nan$"),
        ({"otherwise": float("inf")}, r"^REWARD.otherwise must be finite, got inf$"),
    ],
)
def test_a_gate_that_is_no_number_is_refused(settings, message):
    with pytest.raises(InputError, match=message):
        composite("gated", constant(1.0), constant(1.0), **settings)


def test_the_gates_weight_is_refused():
    with pytest.raises(InputError, match=r"^REWARD.components\[0\].weight means nothing: it is the gate's, got 2.0$"):
        composite("gated", constant(1.0, weight=2), constant(1.0))


def test_a_state_of_another_composite_is_refused_before_any_of_it_is_loaded():
    def spec(second):
        ema = {"type": "ema_normalize"}
        return weighted_sum(constant(1.0, postprocess=ema), constant(2.0, name="second", postprocess={"type": second}))

    seen, other = make_reward(spec("clip")), make_reward(spec("ema_normalize"))
    seen("a")
    before = other.state_dict()
    with pytest.raises(ValueError, match=r"reward 'second' has the state \[\[\], \['mean', 'var'\]\], got"):
        other.load_state_dict(seen.state_dict())
    assert other.state_dict() == before


def test_a_failed_gate_fails_the_sample():
    with pytest.raises(RewardError, match="'failing' failed on response 'b'"):
        composite("gated", failing(), constant(1.0)).score(["a", "b"])


def test_setup_reaches_every_component():
    class Device(Reward):
        def setup(self, device=None):
            self.device = device

        def _score_one(self, response, target, prompt, item):
            return 1.0

    leaf = Device()
    composite("min", composite("product", leaf)).setup("cpu")
    assert leaf.device == "cpu"
