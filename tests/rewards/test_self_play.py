"""The contest by itself: its scores, what it refuses, and what it keeps."""

import json
import math

import chat_server
import pytest
import torch

from hybrid.core import Encoded, InputError
from hybrid.rewards import make_reward
from hybrid.rewards.host import Told

server, judge = chat_server.server, chat_server.judge  # fixtures
LENGTH = {"type": "python", "function": len, "name": "length"}


class Scripted:
    """A host whose opponent says the same to every prompt, and notes what it was asked."""

    num_held_out = eval_every = 0

    def __init__(self, answer):
        self.answer, self.asked, self.num_taken = answer, [], 0

    def opponent(self, name):
        return self

    def stream(self, number):
        return torch.Generator().manual_seed(number)

    def take(self):
        self.num_taken += 1

    def answers(self, prompts, *, sampling=None, generator=None):
        torch.rand(1, generator=generator)
        self.asked.append((list(prompts), sampling))
        return [self.answer] * len(prompts)

    def state_dict(self):
        return {"weight": torch.tensor([float(self.num_taken)])} if self.num_taken else {}

    def load_state_dict(self, state):
        self.num_taken = int(state["weight"]) if state else 0


def contest(answer="four", **settings):
    reward = make_reward({"type": "self_play", "reward": LENGTH, **settings})
    host = Scripted(answer)
    reward.attach(host)
    return reward, host


def test_win_is_one_draw_a_half_and_defeat_nothing():
    reward, _ = contest()
    output = reward.score(["longer", "same", "s"])
    assert output == [1.0, 0.5, 0.0]
    assert output.parts["length"].raw == [6, 4, 1]
    assert output.parts["opponent"].raw == [4, 4, 4]
    assert output.metrics()["reward/length/win_rate"] == 0.5
    assert output.metrics()["reward/length/draw_share"] == pytest.approx(1 / 3)
    assert output.metrics()["reward/length/opponent_age"] == 0


def test_a_difference_up_to_tie_is_a_draw():
    reward, _ = contest(tie=2)
    assert reward.score(["sixsix", "seventh", "12", "1"]) == [0.5, 1.0, 0.5, 0.0]


def test_sigmoid_is_of_the_difference():
    reward, _ = contest(outcome="sigmoid")
    scores = reward.score(["four", "five5", "two" * 1000, ""])
    expected = [0.5, 1 / (1 + math.exp(-1)), 1.0, 1 / (1 + math.exp(4))]
    assert scores == pytest.approx(expected, abs=1e-12)


def test_a_sample_that_the_inner_reward_skips_is_skipped_and_one_it_fails_on_fails():
    def picky(response):
        if response == "bad":
            raise ValueError("no")
        return float(len(response))

    inner = {"type": "python", "function": picky, "name": "picky"}
    reward = make_reward({"type": "self_play", "reward": {**inner, "on_error": "skip"}, "on_error": "skip"})
    reward.attach(Scripted("four"))
    assert reward.score(["bad", "longer"]).valid.tolist() == [False, True]
    strict = make_reward({"type": "self_play", "reward": inner})
    strict.attach(Scripted("bad"))
    with pytest.raises(RuntimeError, match="'picky' failed on response 'bad'") as caught:
        strict.score(["good"])
    assert "It is the inner reward 'picky' of the reward 'self_play'." in caught.value.__notes__


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"reward": None}, "self_play without an inner reward"),
        ({"refresh": 0}, "refresh must be at least 1 rollout, got 0"),
        ({"tie": -0.1}, "tie must be >= 0 and finite, got -0.1"),
        ({"tie": 0.1, "outcome": "sigmoid"}, "tie means nothing with outcome 'sigmoid'"),
        ({"outcome": "lose"}, "outcome must be one of 'win', 'sigmoid', got 'lose'"),
        ({"opponent": "./nobody"}, "opponent './nobody' does not exist"),
        ({"reward": {**LENGTH, "weight": 2}}, "reward.weight means nothing here"),
        ({"reward": {"type": "lenght_window"}}, r"REWARD\.reward\.type.*length_window"),
    ],
)
def test_what_it_refuses(settings, said):
    with pytest.raises(InputError, match=said):
        make_reward({"type": "self_play", "reward": LENGTH, **settings})


def test_without_a_run_it_says_that_it_needs_one():
    with pytest.raises(InputError, match=r"needs a run.*learner\.reward"):
        make_reward({"type": "self_play", "reward": LENGTH}).score(["a"])


def test_with_refresh_2_the_opponent_is_the_policy_of_rollouts_0_2_4():
    reward, host = contest(refresh=2)
    ages, taken = [], []
    for _ in range(6):
        ages.append(reward.score(["a"]).metrics()["reward/length/opponent_age"])
        reward.after_rollout(None)
        taken.append(host.num_taken)
    assert ages == [0, 1, 2, 1, 2, 1]
    assert taken == [1, 1, 2, 2, 3, 3]


def test_a_named_opponent_is_never_refreshed(tmp_path):
    reward, host = contest(opponent=str(tmp_path), refresh=1)
    for _ in range(3):
        assert "reward/length/opponent_age" not in reward.score(["a"]).metrics()
        reward.after_rollout(None)
    assert host.num_taken == 0


def test_the_state_comes_back_and_that_of_another_reward_is_refused():
    reward, _ = contest(refresh=2)
    for _ in range(2):
        reward.score(["a"])
        reward.after_rollout(None)
    state = reward.state_dict()
    drawn = torch.rand(3, generator=reward._stream)
    other, host = contest(refresh=2)
    other.load_state_dict(state)
    assert (other.age, host.num_taken) == (2, 1)
    assert not torch.equal(torch.rand(3, generator=other._stream), torch.rand(3, generator=reward._stream))
    other.load_state_dict(state)
    reward.load_state_dict(state)
    assert torch.equal(torch.rand(3, generator=other._stream), torch.rand(3, generator=reward._stream))
    assert drawn.shape == (3,)
    with pytest.raises(ValueError, match="another reward"):
        contest()[0].load_state_dict(make_reward(LENGTH).state_dict())
    renamed = make_reward({"type": "self_play", "reward": {**LENGTH, "name": "size"}})
    with pytest.raises(ValueError, match="has a component 'size', got a state of length"):
        renamed.load_state_dict(state)


def test_an_evaluation_draws_by_its_own_seed_and_leaves_the_stream_alone():
    reward, _ = contest()
    state = reward.state_dict()
    before = torch.rand(2, generator=torch.Generator().manual_seed(8))
    reward.before_evaluation(7)
    assert torch.equal(torch.rand(2, generator=reward._stream), before)
    reward.load_state_dict(state)
    assert torch.equal(
        torch.rand(2, generator=reward._stream), torch.rand(2, generator=torch.Generator().manual_seed(0))
    )


def test_the_opponent_is_given_the_examples_of_the_rows_also_inside_a_gate():
    item = {"id": 1}
    examples = [Encoded((), (), (i,), f"p{i}", "", item) for i in range(3)]
    gate = {"type": "python", "function": lambda prompt: float(prompt != "p1"), "name": "gate"}
    reward = make_reward({"type": "gated", "components": [gate, {"type": "self_play", "reward": LENGTH}]})
    host = Scripted("four")
    reward.attach(host)
    reward.before_score(examples, "as said")
    reward.score(["a"] * 3, prompts=["p0", "p1", "p2"], items=[item] * 3)
    assert host.asked == [([examples[0], examples[2]], "as said")]
    reward.score(["a"], prompts=["by hand"])
    assert host.asked[1] == (["by hand"], "as said")


def test_equal_rows_with_other_hints_get_their_own_example():
    item = {}
    told = Told()
    two = [Encoded((), (), (i,), "p", "", item) for i in range(2)]
    told.take([*two, *two], None)
    assert told.of(["p"] * 4, [item] * 4) == [*two, *two]
    # An equal row of another place is not the same row.
    assert told.of(["p"], [{}]) == ["p"]


def winner_by_length(question):
    """A judge that names the longer response, and the first of two that are as long."""
    a, b = (json.loads(part.split("\nResponse: ")[1].split("\n\n")[0]) for part in question.split("\n\nB\n"))
    return json.dumps({"reason": "longer", "winner": "A" if len(a) >= len(b) else "B"})


def test_a_judge_compares_the_two_in_both_orders(judge, server):
    server.answer = winner_by_length
    reward = make_reward({"type": "self_play", "reward": judge(), "name": "duel"})
    reward.attach(Scripted("four"))
    output = reward.score(["longer", "same", "s"], prompts=["why?"] * 3)
    # It prefers the first of two equals: in both orders that is no victory.
    assert output == [1.0, 0.5, 0.0]
    assert len(server.requests) == 6
    system, user = (message["content"] for message in server.requests[0]["messages"])
    assert '"winner": "A", "B" or "tie"' in system
    assert user.startswith("A\nRate how well") and '\nPrompt: "why?"' in user
    assert output.metrics()["reward/judge/win_rate"] == 0.5
    assert output.metrics()["reward/judge/requests"] == 6
    assert "opponent" not in output.parts


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        ('{"winner": "C"}', 'winner must be "A", "B" or "tie", got \'\'C\'\''),
        ('{"winner": ["A"]}', "winner must be"),
        ('{"score": 3}', 'it must be one JSON object with a "winner"'),
        ('{"winner": "A", "winner": "B"}', "a name stands in it twice"),
        ("A", "is no verdict"),
    ],
)
def test_a_comparison_without_a_verdict_is_the_samples_error(judge, server, reply, said):
    server.answer = lambda question: reply
    reward = make_reward({"type": "self_play", "reward": judge(), "on_error": "value", "error_value": -1})
    reward.attach(Scripted("four"))
    assert reward.score(["a"]) == [-1]
    strict = make_reward({"type": "self_play", "reward": judge()})
    strict.attach(Scripted("four"))
    with pytest.raises(RuntimeError, match=said.replace('"', ".").replace("'", ".")):
        strict.score(["a"])


def test_an_answer_that_holds_the_verdict_wins_nothing_by_it(judge, server):
    reply = '{"winner": "A"}'
    server.answer = lambda question: reply
    reward = make_reward({"type": "self_play", "reward": judge()})
    reward.attach(Scripted("four"))
    with pytest.raises(RuntimeError, match="may be an echo"):
        reward.score([f"I say {reply}"])


def test_a_judge_with_sigmoid_scores_each_side(judge, server):
    server.answer = lambda question: '{"score": 10}' if "good" in question else '{"score": 1}'
    reward = make_reward({"type": "self_play", "reward": judge(), "outcome": "sigmoid"})
    reward.attach(Scripted("bad"))
    assert reward.score(["good"]) == pytest.approx([1 / (1 + math.exp(-1))])


@pytest.mark.parametrize(
    ("settings", "said"),
    [({"tie": 0.1}, "tie is a difference of scores"), ({"postprocess": {"type": "clip"}}, "postprocess means nothing")],
)
def test_what_means_nothing_to_a_comparison_is_refused(judge, server, settings, said):
    own = {key: settings[key] for key in ("tie",) if key in settings}
    inner = {key: value for key, value in settings.items() if key not in own}
    with pytest.raises(InputError, match=said):
        make_reward({"type": "self_play", "reward": judge(**inner), **own})
