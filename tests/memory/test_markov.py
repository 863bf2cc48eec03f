"""The chain over prompts: against an independent loop, and as a run's memory."""

import json
import math
import random
from collections import Counter

import pytest
import torch
from memory_case import examples, texts, told, visit

from hybrid.core import InputError
from hybrid.memory import MarkovMemory, make_memory
from hybrid.memory.clusters import k_means

WALK = [("a", 1.0), ("b", 0.0), ("a", 0.5), ("c", 0.25), ("b", 1.0), ("a", 0.0), ("b", 0.75)]


def walked(walk=WALK, **settings):
    memory = MarkovMemory(**settings)
    for number, (state, reward) in enumerate(walk):
        memory.add(state, f"answer {number}", reward)
        # Updates may come as they like: here after every third visit, and at the end.
        if number % 3 == 2:
            memory.update()
    memory.update()
    return memory


def worth_by_a_loop(walk, *, alpha, gamma, decay, progress):
    """M, by a loop that knows nothing of the class: a dense matrix of dicts, the whole walk at once."""
    levels, gains = {}, []
    for state, reward in walk:
        if state in levels:
            gains.append(reward - levels[state])
            levels[state] += alpha * gains[-1]
        else:
            levels[state] = reward
            gains.append(0.0)
    rewards = gains if progress else [reward for _, reward in walk]
    matrix = {}
    for i in range(1, len(walk)):
        s, then = walk[i - 1][0], walk[i][0]
        matrix[s, then] = (1 - decay) * matrix.get((s, then), 0.0) + alpha * (rewards[i - 1] + gamma * rewards[i])
    return matrix


@pytest.mark.parametrize("prefer", ["reward", "progress"])
@pytest.mark.parametrize(("alpha", "gamma", "decay"), [(0.1, 0.9, 0.1), (0.5, 0.0, 0.0), (1.0, 1.0, 0.3)])
def test_the_worths_are_those_of_an_independent_loop(prefer, alpha, gamma, decay):
    memory = walked(alpha=alpha, gamma=gamma, decay=decay, prefer=prefer)
    expected = worth_by_a_loop(WALK, alpha=alpha, gamma=gamma, decay=decay, progress=prefer == "progress")
    assert dict(memory.chain.worth) == pytest.approx(expected)
    # The other reading of the reward gives another chain.
    other = worth_by_a_loop(WALK, alpha=alpha, gamma=gamma, decay=decay, progress=prefer == "reward")
    assert dict(memory.chain.worth) != pytest.approx(other)


def test_the_first_worth_by_hand():
    memory = walked(WALK[:2])
    assert memory.chain.worth == {("a", "b"): pytest.approx(0.1 * (1.0 + 0.9 * 0.0))}


def test_the_missions_defaults():
    memory = MarkovMemory()
    assert (memory.capacity, memory.alpha, memory.gamma) == (20000, 0.1, 0.9)


def test_rows_are_the_smoothed_softmax_and_sum_to_1():
    memory = walked(temperature=0.2, smoothing=0.3)
    found, names = memory.transition_probabilities(), ["a", "b", "c"]
    for i, s in enumerate(names):
        exps = [math.exp(memory.chain.worth.get((s, then), 0.0) / 0.2) for then in names]
        row = [0.3 / 3 + 0.7 * x / sum(exps) for x in exps]
        assert found[i].tolist() == pytest.approx(row)
    assert torch.allclose(found.sum(1), torch.ones(3, dtype=torch.float64))
    assert (found > 0).all()  # the unseen pairs too
    assert torch.equal(memory.transition_probabilities(["b"]), found[1:2])


def test_a_state_that_nothing_followed_has_an_even_row():
    memory = walked([("a", 1.0), ("b", 1.0)])
    assert memory.transition_probabilities(["b"]).tolist() == [[0.5, 0.5]]


def test_the_next_state_is_the_likeliest():
    memory = MarkovMemory(alpha=1.0)
    for state, reward in [("a", 0.0), ("b", 0.1), ("a", 0.0), ("c", 0.9), ("a", 0.0)]:
        memory.add(state, "", reward)
    memory.update()
    assert memory.next_state("a") == "c" and memory.next_state("b") == "a"


def test_a_walk_follows_the_transition_probabilities():
    memory = walked(temperature=0.1, smoothing=0.2)
    probabilities = memory.transition_probabilities(["b"])[0].tolist()
    memory.last = "b"
    draws = 4000
    counts = Counter(memory.sample(1)[0] for _ in range(draws))
    for name, p in zip("abc", probabilities, strict=True):
        assert counts[name] / draws == pytest.approx(p, abs=4 * (p * (1 - p) / draws) ** 0.5)
    # No uniform draw would pass.
    assert max(abs(p - 1 / 3) for p in probabilities) > 0.1


def test_walks_are_the_same_for_the_same_seed_and_go_on():
    one, same = walked(), walked()
    assert [one.sample(5) for _ in range(3)] == [same.sample(5) for _ in range(3)]
    other = walked()
    other.seed = 1
    assert [walked().sample(20)] != [other.sample(20)]
    assert one.sample(20) != one.sample(20)


def test_beyond_the_capacity_the_pair_followed_longest_ago_is_forgotten():
    memory = walked([("a", 1.0), ("b", 1.0), ("a", 1.0), ("b", 1.0), ("c", 1.0)], capacity=2)
    assert set(memory.chain.worth) == {("a", "b"), ("b", "c")}
    assert dict(memory.chain._rows) == {"a": {"b": None}, "b": {"c": None}}
    assert len(memory.states) == 2


def test_the_best_response_of_a_state_is_kept():
    memory = walked()
    assert (memory.states["b"].best, memory.states["b"].response) == (1.0, "answer 4")


def test_an_empty_or_unknown_state_is_told_by_name():
    for ask in (lambda m: m.sample(1), lambda m: m.next_state("a"), lambda m: m.transition_probabilities()):
        with pytest.raises(InputError, match="this memory is empty: add"):
            ask(MarkovMemory())
    memory = MarkovMemory()
    memory.add("alpha", "", 1.0)
    with pytest.raises(InputError, match="unknown state of the chain 'alpho'; did you mean 'alpha'"):
        memory.next_state("alpho")
    with pytest.raises(InputError, match="unknown state of the chain 'alpho'; did you mean 'alpha'"):
        memory.transition_probabilities(["alpha", "alpho"])
    assert memory.transition_probabilities([]).shape == (0, 1)


@pytest.mark.parametrize("reward", [math.nan, math.inf])
def test_a_reward_that_is_not_finite_is_refused_and_leaves_no_trace(reward):
    memory = MarkovMemory()
    with pytest.raises(InputError, match=f"the reward of a visit must be finite, got {reward}"):
        memory.add("alpha", "", reward)
    assert memory.states == {}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"capacity": 0}, r"memory\.capacity must be at least 1, got 0"),
        ({"alpha": 0}, r"memory\.alpha must lie in \(0, 1\]"),
        ({"gamma": 1.5}, r"memory\.gamma must lie in \[0, 1\]"),
        ({"temperature": 0}, r"memory\.temperature must be > 0"),
        ({"prefer": "gain"}, r"memory\.prefer must be one of 'reward', 'progress', got 'gain'"),
        ({"clusters": 3}, r"memory\.clusters and embedder go together"),
        ({"capacty": 3}, r"did you mean 'capacity'"),
    ],
    ids=str,
)
def test_bad_settings_are_told_by_name(settings, said):
    with pytest.raises(InputError, match=said):
        make_memory({"type": "markov", **settings})


# In a run


def attached(number=12, **settings):
    memory = MarkovMemory(**{"uniform": 0.0, "alpha": 1.0, **settings})
    memory.attach(examples(number), seed=3)
    return memory


def test_a_rollout_follows_the_chain_from_where_the_last_one_ended():
    # 3 led to 7 with reward, and then 7 to 5.
    memory = told(attached(smoothing=0.0), {3: [1.0], 7: [1.0], 5: [1.0]})
    memory.last = next(iter(memory.states))
    assert texts(memory.pick(examples(12)[:2], 2)) == ["p7", "p5"]


def test_a_walk_never_leaves_the_runs_own_prompts():
    memory = attached(smoothing=0.0, temperature=0.01)
    # In another run 3 led to what this one does not have, and that to 9.
    own = next(key for key, e in memory.pool.items() if e[0].prompt == "p3")
    other = next(key for key, e in memory.pool.items() if e[0].prompt == "p9")
    for state in (own, "elsewhere", other):
        memory.add(state, "", 1.0)
    memory.update()
    memory.last = own
    firsts = Counter(texts(memory.pick(examples(12)[:1], step))[0] for step in range(300))
    # Of the others none is worth more than another to 3.
    assert len(firsts) == 12 and firsts["p9"] < 75


def test_it_goes_anywhere_with_the_probability_of_smoothing_and_never_twice_to_a_prompt():
    memory = told(attached(smoothing=1.0), {3: [1.0], 7: [1.0]})
    found = {text for step in range(40) for text in texts(memory.pick(examples(12)[:6], step))}
    assert found == {f"p{i}" for i in range(12)}
    assert all(len(set(texts(memory.pick(examples(12), step)))) == 12 for step in range(5))


def test_the_uniform_share_is_the_loaders():
    memory = attached(uniform=0.5)
    assert texts(memory.pick(examples(4), 1))[:2] == ["p0", "p1"]


def test_progress_prefers_what_led_to_a_gain():
    memory = attached(prefer="progress", smoothing=0.0, alpha=0.5, decay=0.5)
    found = examples(12)
    # 1 always fails, 2 always succeeds, 3 gets better: after 0 each of them in turn.
    for step in range(1, 7):
        for number, score in ((0, 0.0), (1, 0.0), (0, 0.0), (2, 1.0), (0, 0.0), (3, step / 6)):
            told_one(memory, found[number], score, step)
    keys = {key: e[0].prompt for key, e in memory.pool.items()}
    start = next(key for key, text in keys.items() if text == "p0")
    assert keys[memory.next_state(start)] == "p3"
    other = attached(prefer="reward", smoothing=0.0, alpha=0.5, decay=0.5)
    for step in range(1, 7):
        for number, score in ((0, 0.0), (1, 0.0), (0, 0.0), (2, 1.0), (0, 0.0), (3, step / 6)):
            told_one(other, found[number], score, step)
    assert keys[other.next_state(start)] == "p2"


def told_one(memory, example, score, step):
    memory.visited([visit(example, score, step=step)], step)


@pytest.mark.parametrize("prefer", ["reward", "progress"])
def test_its_state_as_json_makes_it_again(prefer):
    memory = told(attached(prefer=prefer), {i: [i / 6] for i in range(6)})
    memory.add(next(iter(memory.states)), "x", 0.3)
    other = attached(prefer=prefer)
    other.load_state_dict(json.loads(json.dumps(memory.state_dict())))
    for each in (memory, other):
        each.update()
    assert other.chain.worth == memory.chain.worth and list(other.chain.worth) == list(memory.chain.worth)
    assert other.states == memory.states and other.last == memory.last
    assert texts(other.pick(examples(12), 9)) == texts(memory.pick(examples(12), 9))


def embed(texts):
    """The prompts' numbers, below 6 and from 6 on far apart."""
    return [[float(text[1:]) + 100 * (int(text[1:]) >= 6), 0.0] for text in texts]


def test_clusters_of_prompts_are_states():
    memory = attached(clusters=2, embedder=f"{__name__}:embed")
    groups = [{memory.pool[key][0].prompt for key in keys} for keys in memory._prompts.values()]
    assert sorted(map(sorted, groups)) == sorted(
        [sorted(f"p{i}" for i in range(6)), sorted(f"p{i}" for i in range(6, 12))]
    )
    told(memory, {0: [1.0], 8: [0.5]})
    assert len(memory.states) == 2
    assert len(set(texts(memory.pick(examples(12)[:8], 1)))) == 8


def test_k_means_finds_clusters_that_are_far_apart():
    chance = random.Random(0)
    points = torch.tensor([[10.0 * (i % 3) + chance.random(), chance.random()] for i in range(30)])
    found = k_means(points, 3, seed=1).tolist()
    assert len({tuple(found[i::3]) for i in range(3)}) == 3
    assert all(len(set(found[i::3])) == 1 for i in range(3))
    assert k_means(torch.ones(4, 2), 3, seed=0).tolist() == [0] * 4
