import json
from dataclasses import dataclass

import pytest

from hybrid.core import InputError
from hybrid.rewards import Handling, RewardError, make_reward
from hybrid.rewards.postprocess import Postprocess


@dataclass(frozen=True)
class Add(Postprocess):
    amount: float

    def __call__(self, scores):
        return [score + self.amount for score in scores]


def score_of(value, postprocess):
    return make_reward({"type": "python", "function": lambda r: value, "postprocess": postprocess})("a")


@pytest.mark.parametrize(("value", "clipped"), [(-2.0, 0.0), (0.4, 0.4), (3.0, 1.0)])
def test_clip_keeps_scores_between_zero_and_one(value, clipped):
    assert score_of(value, {"type": "clip"}) == clipped


def test_clip_takes_its_bounds():
    assert score_of(-3.0, {"type": "clip", "min": -2, "max": 5}) == -2


def test_steps_apply_in_the_listed_order():
    first = {"type": "clip", "min": 0, "max": 1}
    second = {"type": "clip", "min": 2, "max": 3}
    assert score_of(9.0, [first, second]) == 2
    assert score_of(9.0, [second, first]) == 1


def test_an_empty_list_of_steps_changes_nothing():
    assert score_of(9.0, []) == 9


def test_the_raw_score_is_kept_beside_the_total():
    spec = {"type": "python", "function": lambda r: 7, "name": "seven", "postprocess": {"type": "clip"}}
    output = make_reward(spec).score(["a"])
    assert (output, output.raw, output.components) == ([1.0], [7.0], {"seven": [7.0]})


def test_a_step_that_makes_a_score_infinite_is_refused():
    reward = make_reward(lambda response: 1.0)
    reward.handling = Handling(postprocess=(Add(float("inf")),))
    with pytest.raises(RewardError, match="returned inf for response 'a'"):
        reward("a")


def test_scale_multiplies_then_adds():
    assert score_of(3.0, {"type": "scale", "mul": 2, "add": -1}) == 5


def by_the_book(xs, d=0.99, eps=1e-8):
    m = v = None
    for x in xs:
        if m is None:
            m, v = x, 1.0
        m = d * m + (1 - d) * x
        v = d * v + (1 - d) * (x - m) ** 2
        yield (x - m) / (v + eps) ** 0.5


def ema(**settings):
    spec = {"type": "python", "function": float, "batch": False, "postprocess": {"type": "ema_normalize", **settings}}
    return make_reward(spec | {"function": lambda response: float(response)})


@pytest.mark.parametrize("settings", [{}, {"decay": 0.5, "eps": 0.1}])
def test_ema_normalize_follows_the_spec_in_the_order_of_the_batches(settings):
    xs = [3.0, -1.0, 0.5, 0.5, 100.0, 2.0]
    reward = ema(**settings)
    got = reward.score([str(x) for x in xs[:4]]) + [reward(str(x)) for x in xs[4:]]
    expected = by_the_book(xs, settings.get("decay", 0.99), settings.get("eps", 1e-8))
    assert got == pytest.approx(list(expected), rel=1e-12)
    assert got[0] == 0.0


def test_ema_normalize_goes_on_from_its_state():
    seen, fresh = ema(), ema()
    seen.score(["3", "-1"])
    fresh.load_state_dict(json.loads(json.dumps(seen.state_dict())))
    assert fresh("7") == seen("7")
    assert fresh("7") != ema()("7")


def test_a_failed_score_never_enters_the_running_mean():
    spec = {"type": "python", "function": lambda response: float(response), "on_error": "skip"}
    reward = make_reward(spec | {"postprocess": {"type": "ema_normalize"}})
    alone = ema()
    reward.score(["3", "nan", "no number", "-1", "inf"])
    alone.score(["3", "-1"])
    assert reward.state_dict() == alone.state_dict()


@pytest.mark.parametrize("state", [{"mean": "x", "var": 1.0}, {"mean": 0.0, "var": None}])
def test_a_state_of_other_types_is_refused(state):
    with pytest.raises(ValueError, match="mean and var must be numbers"):
        ema().load_state_dict({"reward": {}, "postprocess": [state]})


@pytest.mark.parametrize(
    ("step", "message"),
    [
        ({"type": "clip", "min": 2}, r"^REWARD.postprocess.min must be at most max \(1.0\), got 2$"),
        ([{"type": "clip", "max": float("nan")}], r"^REWARD.postprocess\[0\].max must be finite, got nan$"),
        (
            [{"type": "clp"}],
            r"^REWARD.postprocess\[0\].type: unknown postprocess 'clp'; did you mean 'clip'\?",
        ),
        ({"type": "scale", "mul": float("inf")}, r"^REWARD.postprocess.mul must be finite, got inf$"),
        ({"type": "ema_normalize", "decay": 1.5}, r"^REWARD.postprocess.decay must lie in \[0, 1\], got 1.5$"),
        ({"type": "ema_normalize", "eps": 0}, r"^REWARD.postprocess.eps must be > 0, got 0$"),
        ({"type": "clip", "mx": 1}, r"^REWARD.postprocess.mx: unknown parameter of postprocess 'clip': 'mx'"),
        ({"min": 1}, r"^REWARD.postprocess.type is missing; known: clip, ema_normalize, scale$"),
        ("clip", r"^REWARD.postprocess must be a list, got 'clip'$"),
        (["clip"], r"^REWARD.postprocess\[0\] must be a dict with a type, got 'clip'$"),
    ],
)
def test_a_bad_step_is_refused_with_its_path(step, message):
    with pytest.raises(InputError, match=message):
        score_of(1.0, step)
