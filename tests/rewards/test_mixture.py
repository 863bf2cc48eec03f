"""The mixture by itself: its scores, what it refuses, when its weights move, and what it keeps."""

import math
import sys
from types import SimpleNamespace

import pytest
import torch

from hybrid.core import InputError
from hybrid.rewards import make_reward

A = {"type": "python", "function": len, "name": "a"}
B = {"type": "python", "function": lambda response: 100.0 * response.count("x"), "name": "b"}
METRIC = {"type": "python", "function": lambda response: float(response.count("m")), "name": "m"}


def mixture(controller="hedge", components=(A, B), **settings):
    if controller in ("hedge", "exp3", "meta"):
        settings = {"metric": METRIC} | settings
    return make_reward({"type": "mixture", "controller": controller, "components": [*components], **settings})


def evaluated(reward, responses):
    """What a run does at an evaluation."""
    state = reward.state_dict()
    reward.before_evaluation(1234)
    reward.score(responses)
    reward.load_state_dict(state)
    reward.after_evaluation([])
    reward.evaluated()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"metric": None}, "mixture without a held-out metric: controller 'hedge' learns from one"),
        ({"controller": "exp3", "metric": None}, "mixture without a held-out metric"),
        ({"controller": "meta", "metric": None}, "mixture without a held-out metric.*metric: sft_loss"),
        ({"controller": "balance", "metric": METRIC}, "metric means nothing with controller 'balance'"),
        ({"metric": "sft_loss"}, "metric 'sft_loss' is for controller 'meta'"),
        ({"metric": "sftloss"}, r"REWARD\.metric must be a \.json"),
        ({"metric": {"type": "lengthwindow"}}, r"REWARD\.metric\.type.*length_window"),
        ({"components": [A]}, "components must be at least two"),
        ({"components": [{**A, "weight": -1}, B]}, "components must have weights of at least 0"),
        ({"components": [{**A, "weight": 0}, {**B, "weight": 0}]}, "and not all 0"),
        ({"components": [{**A, "name": "metric"}, B]}, "must not be called 'metric'"),
        ({"floor": 0.5}, "floor must be >= 0 and below 1 / 2, the components' share, got 0.5"),
        ({"floor": -0.1}, "floor must be >= 0"),
        ({"controller": "exp3", "floor": 0}, "floor must be > 0 with controller 'exp3'"),
        ({"eta": 0}, "eta must be > 0"),
        ({"rows": 1}, "rows must be at least 2"),
        ({"decay": 1}, r"decay must lie in \[0, 1\)"),
        ({"aggregator": "upgrad"}, "aggregator means nothing with controller 'hedge'"),
        ({"controller": "adam"}, "controller must be one of 'hedge', 'exp3', 'balance', 'gradient', 'meta'"),
    ],
)
def test_what_it_refuses(settings, said):
    with pytest.raises(InputError, match=said):
        mixture(**{"controller": "hedge", **settings})


def test_upgrad_without_torchjd_is_refused_when_it_is_built(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchjd", None)
    with pytest.raises(InputError, match=r"pip install 'hybrid-trainer\[gradients\]'"):
        mixture("gradient", aggregator="upgrad")


def test_scores_are_standardised_before_they_are_summed():
    """a is 1, 2, 3 and b is 0, 100, 0: both count by their deviations, with the weights that were given."""
    reward = mixture(components=({**A, "weight": 3}, B))
    output = reward.score(["a", "xx"[:1] + "b", "abc"])
    a = [-1 / math.sqrt(2 / 3), 0.0, 1 / math.sqrt(2 / 3)]
    b = [(x - 100 / 3) / math.sqrt(2 / 9 * 1e4) for x in (0, 100, 0)]
    assert output == pytest.approx([0.75 * x + 0.25 * y for x, y in zip(a, b, strict=True)])
    assert output.parts["a"].weighted == pytest.approx([0.75 * x for x in a])
    assert output.parts["a"].raw == [1, 2, 3]
    assert output.metrics()["reward/a/weight"] == 0.75
    assert "metric" not in output.parts, "it is asked at evaluations alone"


def test_under_balance_the_scores_themselves_are_summed_with_inverse_deviations():
    reward = mixture("balance", floor=0.0)
    output = reward.score(["a", "xb", "abc"])
    one, other = math.sqrt(2 / 3), math.sqrt(2 / 9 * 1e4)
    w = [1 / one, 1 / other]
    w = [x / sum(w) for x in w]
    assert reward.weights == pytest.approx(w)
    assert output == pytest.approx([w[0] * 1, w[0] * 2 + w[1] * 100, w[0] * 3])
    before = list(reward.weights)
    reward.before_evaluation(0)
    reward.score(["a" * 50, "x" * 9])
    reward.after_evaluation([])
    assert reward.weights == before


def test_hedge_moves_towards_what_goes_with_the_metric():
    """On the held-out responses a is the metric itself, and b its opposite."""
    good = {"type": "python", "function": lambda response: float(response.count("m")), "name": "a"}
    bad = {"type": "python", "function": lambda response: -7.0 * response.count("m"), "name": "b"}
    reward = mixture(components=(good, bad), eta=0.3)
    evaluated(reward, ["m", "", "mm", "mmm"])
    assert reward.weights == pytest.approx([1 / (1 + math.exp(-0.6)), 1 / (1 + math.exp(0.6))])
    assert reward.score(["m", ""]).metrics()["reward/a/gain"] == pytest.approx(1.0)
    for _ in range(20):
        evaluated(reward, ["m", "", "mm", "mmm"])
    assert reward.weights == pytest.approx([0.95, 0.05]), "the floor"
    # A control: a metric that says the same of all moves nothing.
    still = mixture(components=(good, bad))
    evaluated(still, ["m", "m", "m"])
    assert still.weights == [0.5, 0.5]


def test_a_sample_that_a_component_skips_is_left_out_of_its_gain():
    def sometimes(responses):
        return [None if "s" in r else float(len(r)) for r in responses]

    trl = {"type": "python", "function": lambda completions, **columns: sometimes(completions), "name": "a"}
    reward = mixture(components=(trl, B))
    evaluated(reward, ["m", "mm", "mmms", "ss"])
    assert reward._gains[0] == pytest.approx(1.0)
    assert reward.score(["s", "abc"]).valid.tolist() == [True, True], "b alone counts"


def test_exp3_tries_one_component_and_credits_it_alone_with_the_rise():
    reward = mixture("exp3", floor=0.1, eta=0.4, seed=3)
    evaluated(reward, ["m", "m"])
    arm = reward._arm
    output = reward.score(["ax", "b", "abc"])
    name = "ab"[arm]
    assert output == pytest.approx(output.parts[name].weighted)
    assert output.parts["ab"[1 - arm]].weighted == [None] * 3
    assert (output.metrics()[f"reward/{name}/chosen"], output.metrics()[f"reward/{'ab'[1 - arm]}/chosen"]) == (1, 0)
    evaluated(reward, ["mm", "mm"])
    moved = 0.5 * math.exp(0.4 * 1.0 / (2 * 0.5))
    expected = [moved / (moved + 0.5), 0.5 / (moved + 0.5)]
    assert reward.weights == pytest.approx(expected if arm == 0 else expected[::-1])
    weights, arm = list(reward.weights), reward._arm
    evaluated(reward, ["mm", "m"])  # half of the largest rise so far, downwards
    odds = [w * math.exp(0.4 * -0.5 / (2 * w)) if i == arm else w for i, w in enumerate(weights)]
    assert reward.weights == pytest.approx([x / sum(odds) for x in odds])


def test_exp3_draws_by_its_weights_and_its_seed():
    def draws(seed, weights):
        reward = mixture("exp3", components=({**A, "weight": weights[0]}, {**B, "weight": weights[1]}), seed=seed)
        return [reward._draw_arm() for _ in range(400)]

    assert draws(1, (1, 1)) == draws(1, (1, 1)) != draws(2, (1, 1))
    # 5 standard errors of a share of 400.
    assert sum(draws(1, (1, 3))) / 400 == pytest.approx(0.75, abs=5 * math.sqrt(0.75 * 0.25 / 400))


class Gradients:
    """A host that knows the gradients of a, b and the held-out objective."""

    num_held_out, eval_every = 3, 1

    def __init__(self, *gradients):
        self.jacobian, self.sides = torch.tensor(gradients, dtype=torch.float64), []

    def gram(self, sides):
        self.sides = sides
        rows = [self.jacobian[i] if advantage.any() else 0 * self.jacobian[i] for i, (_, advantage) in enumerate(sides)]
        jacobian = torch.stack(rows)
        return jacobian @ jacobian.T

    def held_out(self, num_rows):
        return ["row"] * min(num_rows, self.num_held_out)


class Answers(list):
    """As much of a rollout as the mixture looks at."""

    @property
    def responses(self):
        return tuple(self)

    @property
    def prompts(self):
        return ("p",) * len(self)

    def __getitem__(self, rows):
        return Answers(list(self)[rows])


def learn(reward, *responses):
    reward.score(list(responses), prompts=["p"] * len(responses))
    reward.after_rollout(Answers(responses))


def test_gradient_takes_the_weights_of_the_shortest_combination():
    reward = mixture("gradient", floor=0.0, rows=3)
    host = Gradients([2.0, 0.0], [0.0, 1.0])
    reward.attach(host)
    learn(reward, "a", "xb", "xxc", "never looked at")
    assert reward.weights == pytest.approx([0.2, 0.8])
    assert [len(rows) for rows, _ in host.sides] == [3, 3]
    # b is 0, 100, 200 on the first three.
    assert host.sides[1][1].tolist() == pytest.approx([-math.sqrt(1.5), 0, math.sqrt(1.5)])
    # Of the next rollout, on: this one was scored with the start.
    assert reward.score(["a", "b"]).metrics()["reward/b/weight"] == pytest.approx(0.8)


def test_a_component_without_a_gradient_stands_at_the_floor():
    reward = mixture("gradient", floor=0.1)
    reward.attach(Gradients([2.0, 0.0], [0.0, 1.0]))
    learn(reward, "a", "bb")
    assert reward.weights == pytest.approx([0.9, 0.1])
    learn(reward, "a", "b")
    assert reward.weights == pytest.approx([0.9, 0.1]), "none has one: they stay"


def test_meta_moves_by_the_cosine_to_the_held_out_gradient():
    reward = mixture("meta", metric="sft_loss", eta=0.5, floor=0.0)
    host = Gradients([1.0, 0.0], [0.0, -2.0], [3.0, 4.0])
    reward.attach(host)
    learn(reward, "a", "xb", "xxc")
    odds = [math.exp(0.5 * 0.6), math.exp(-0.5 * 0.8)]
    assert reward.weights == pytest.approx([x / sum(odds) for x in odds])
    assert host.sides[2][1].tolist() == [1.0] * 3
    assert reward.score(["a"]).metrics()["reward/b/gain"] == pytest.approx(-0.8)


def test_meta_learns_nothing_before_there_are_held_out_responses():
    reward = mixture("meta")
    reward.attach(Gradients([1.0, 0.0], [0.0, -2.0], [3.0, 4.0]))
    learn(reward, "a", "xb")
    assert reward.weights == [0.5, 0.5]


def test_a_greedy_evaluation_has_no_policy_gradient_for_meta():
    reward = mixture("meta")
    reward.before_evaluation(0)
    with pytest.raises(InputError, match=r"greedy.*eval\.temperature"):
        reward.before_score([], SimpleNamespace(temperature=0))
    reward.before_score([], SimpleNamespace(temperature=1.0))


@pytest.mark.parametrize("controller", ["hedge", "exp3", "meta"])
def test_without_held_out_data_it_is_refused_and_without_evaluations_it_warns(controller):
    host = Gradients([0.0], [0.0])
    host.num_held_out = 0
    with pytest.raises(InputError, match="learns its weights from held-out data, and there are none"):
        mixture(controller).attach(host)
    host.num_held_out, host.eval_every = 3, 0
    with pytest.warns(UserWarning, match=r"eval\.every is 0"):
        mixture(controller).attach(host)
    mixture("balance").attach(host)


@pytest.mark.parametrize("controller", ["hedge", "exp3", "balance", "gradient", "meta"])
def test_an_evaluation_by_itself_changes_nothing(controller):
    reward = mixture(controller)
    if controller in ("gradient", "meta"):
        reward.attach(Gradients([1.0, 0.0], [0.0, -2.0], [3.0, 4.0]))
    learn(reward, "axm", "b", "ccc") if controller in ("gradient", "meta") else reward.score(["axm", "b", "ccc"])
    before = reward.state_dict()
    random = before["reward"]["random"].clone()
    reward.before_evaluation(1)
    reward.score(["m" * 40, "x", ""])
    during = reward.state_dict()["reward"]
    for name in ("weights", "moments", "gains", "arm"):
        assert during[name] == before["reward"][name], name
    reward.load_state_dict(before)
    reward.after_evaluation([])
    after = reward.state_dict()["reward"]
    assert {k: v for k, v in after.items() if k != "random"} == {
        k: v for k, v in before["reward"].items() if k != "random"
    }
    assert torch.equal(after["random"], random)


def test_the_state_comes_back():
    reward = mixture("exp3", seed=5)
    for rest in ("", "m", "mm", "m"):
        reward.score(["ax", "b", rest])
        evaluated(reward, ["m", rest])
    other = mixture("exp3", seed=6)
    other.load_state_dict(reward.state_dict())
    assert other.score(["a", "xbb", "c"]) == reward.score(["a", "xbb", "c"])
    for _ in range(5):
        evaluated(reward, ["m", "mmm"])
        evaluated(other, ["m", "mmm"])
        assert (other.weights, other._arm) == (reward.weights, reward._arm)
    with pytest.raises(ValueError, match="another reward"):
        make_reward({"type": "weighted_sum", "components": [A, B]}).load_state_dict(reward.state_dict())


def test_it_works_without_a_run_on_the_weights_that_it_was_given():
    reward = mixture("meta", metric="sft_loss", components=({**A, "weight": 3}, B))
    assert reward.score(["a", "bb"]) == pytest.approx([-1.0 * 0.75, 0.75])
