"""Strategies: which step comes when, how many there are, and what they refuse."""

from collections import defaultdict
from pathlib import Path

import pytest

from hybrid.core import Encoded, InputError
from hybrid.mixing import make_strategy, strategy_names


def kinds(strategy):
    plans, step = [], 0
    while (plan := strategy.plan(step, {})) is not None:
        plans.append(f"{plan.kind}{plan.cycle}")
        step += 1
    return plans


def test_alternate_cycles_through_both_kinds():
    strategy = make_strategy({"cycles": 2, "sft_steps_per_cycle": 2, "ppo_steps_per_cycle": 1})
    assert kinds(strategy) == ["sft0", "sft0", "ppo0", "sft1", "sft1", "ppo1"]
    assert strategy.num_steps == 6


def test_sequential_is_all_sft_then_all_ppo():
    strategy = make_strategy({"strategy": "sequential", "sft_steps": 2, "ppo_steps": 1})
    assert kinds(strategy) == ["sft0", "sft0", "ppo1"]


@pytest.mark.parametrize("spec", [{"sft_steps_per_cycle": 0}, {"ppo_steps_per_cycle": 0}])
def test_either_phase_may_be_left_out(spec):
    strategy = make_strategy({"cycles": 3, **spec})
    assert {kind[:3] for kind in kinds(strategy)} == strategy.objectives
    assert len(strategy.objectives) == 1


@pytest.mark.parametrize(
    ("spec", "steps"),
    [
        ({"sft_steps_per_cycle": 3}, 12),  # 2 epochs * 4 SFT steps in cycles of 3: 3 cycles of 3 + 1
        ({"sft_steps_per_cycle": 0}, 10),  # 2 epochs * 5 PPO steps
        ({"strategy": "sequential"}, 18),
        ({"strategy": "sequential", "ppo_steps": 0}, 8),
    ],
)
def test_epochs_set_the_length(spec, steps):
    assert make_strategy(spec).for_epochs(2, sft_steps_per_epoch=4, ppo_steps_per_epoch=5).num_steps == steps


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"strategy": "alternat"}, "did you mean 'alternate'"),
        (
            {"strategy": "luffy"},
            "'luffy' is an objective, not a strategy: mixing: {strategy: objective, objective: luffy}",
        ),
        ({"cycle": 3}, "did you mean 'cycles'"),
        ({"cycles": -1}, "mixing.cycles must be >= 1"),
        ({"cycles": "many"}, "mixing.cycles must be int"),
        ({"cycles": 0}, "mixing.cycles must be >= 1"),
        ({"sft_steps_per_cycle": 0, "ppo_steps_per_cycle": 0}, "leave no step to take"),
    ],
)
def test_a_bad_spec_is_refused_by_name(spec, message):
    with pytest.raises(InputError, match=message):
        make_strategy(spec)


def test_every_strategy_stands_in_the_docs_with_its_fields():
    docs = (Path(__file__).resolve().parents[1] / "docs" / "mixing.md").read_text(encoding="utf-8")
    rows = defaultdict(str)  # an objective may have the name too
    for line in docs.splitlines():
        if line.startswith("| `"):
            rows[line.split("`")[1]] += line
    own = {name: make_strategy({"strategy": name}) for name in strategy_names()}
    own = {name: strategy for name, strategy in own.items() if type(strategy).__module__.startswith("hybrid.")}
    assert "sequential" in own  # others may stand beside: tests register theirs
    for name, strategy in own.items():
        fields = strategy.spec().keys() - {"strategy"}
        assert all(f"`{field}`" in rows[name] for field in fields), name


@pytest.mark.parametrize("curriculum", ["linear", "cosine"])
def test_a_curriculum_goes_from_the_first_counts_to_the_final_ones(curriculum):
    spec = {"cycles": 9, "sft_steps_per_cycle": 8, "ppo_steps_per_cycle": 0}
    strategy = make_strategy({**spec, "curriculum": curriculum})
    counts = [[kind[:3] for kind in kinds(strategy) if kind[3:] == str(cycle)] for cycle in range(9)]
    sft = [cycle.count("sft") for cycle in counts]
    assert (sft[0], sft[-1]) == (8, 0) and sft == sorted(sft, reverse=True)
    assert [len(cycle) for cycle in counts] == [8] * 9
    # The straight line leaves its end at once; half a cosine hardly.
    assert sft[1] == {"linear": 7, "cosine": 8}[curriculum]


@pytest.mark.parametrize("curriculum", ["none", "linear", "cosine"])
def test_the_updates_of_cycles_are_those_of_their_plans(curriculum):
    strategy = make_strategy({"cycles": 7, "sft_steps_per_cycle": 4, "curriculum": curriculum})
    plans = [strategy.plan(step, {}) for step in range(strategy.num_steps)]
    updates = {"sft": 1, "ppo": 100}
    assert strategy.num_updates(updates) == sum(updates[plan.kind] for plan in plans)


def test_the_reward_curriculum_follows_the_measured_reward():
    spec = {"cycles": 4, "sft_steps_per_cycle": 4, "ppo_steps_per_cycle": 1, "final_sft_steps_per_cycle": 0}
    strategy = make_strategy({**spec, "final_ppo_steps_per_cycle": 1, "curriculum": "reward", "target_reward": 1.0})
    rewards, seen, metrics = iter([0.0, 0.5, 2.0, 0.25]), [], {}
    while (plan := strategy.plan(len(seen), metrics)) is not None:
        seen.append((plan.cycle, plan.kind))
        metrics = {"reward": next(rewards)} if plan.kind == "ppo" else {}
    # From the first reward, 0: half-way after 0.5, all the way (and no further) after 2.
    assert [sum(cycle == c and kind == "sft" for c, kind in seen) for cycle in range(4)] == [4, 4, 2, 0]


def test_training_needs_no_memory_where_the_plan_is_a_function_of_the_step():
    assert make_strategy({"strategy": "sequential"}).state_dict() == {}


def test_the_prefixes_of_prefix_rft_are_between_a_bound_that_falls_and_the_share():
    target = tuple(range(10, 31))  # 20 tokens and EOS
    example = Encoded((1, 2, *target), (-100, -100, *target), (1, 2), "", "", {})
    strategy = make_strategy({"strategy": "prefix_rft", "steps": 40, "decay_steps": 20, "prefixed": 2})
    lows = [strategy.low_at(step) for step in (0, 10, 20, 39)]
    assert lows == pytest.approx([0.95, 0.5, 0.05, 0.05])
    for step, low in ((0, 0.95), (10, 0.5), (30, 0.05)):
        rows = strategy.repeated([example] * 50, 4, step)
        hints = [row.num_hint for row in rows]
        assert [h == 0 for h in hints[:4]][:2] == [True, True] and len(rows) == 200
        given = [h for row in range(0, 200, 4) for h in hints[row + 2 : row + 4]]
        assert int(low * 20) <= min(given) and max(given) <= 19
        assert all(row.prompt_ids == (1, 2, *target[: row.num_hint]) for row in rows)
        assert len(set(given)) > 1 or low == 0.95
        again = strategy.repeated([example] * 50, 4, step)
        assert [row.num_hint for row in again] == hints
    assert strategy.repeated([example], 4, 11) != strategy.repeated([example], 4, 12)


def test_a_prompt_without_a_target_gets_no_prefix():
    bare = Encoded((1, 2), (-100, -100), (1, 2), "", "", {})
    rows = make_strategy({"strategy": "prefix_rft"}).repeated([bare], 3, 0)
    assert [row.num_hint for row in rows] == [0, 0, 0]


def test_a_hint_ends_before_what_a_user_says():
    """Three tokens of an answer, two of a user, and three of another answer."""
    labels = (-100, -100, 10, 11, 12, -100, -100, 15, 16, 17)
    example = Encoded((1, 2, 10, 11, 12, 13, 14, 15, 16, 17), labels, (1, 2), "", "", {})
    strategy = make_strategy({"strategy": "prefix_rft", "share": 1.0})
    assert [row.num_hint for row in strategy.repeated([example], 3, 0)] == [0, 0, 2]


def test_prefixes_for_all_responses_are_refused_where_the_responses_are_known():
    with pytest.raises(InputError, match="prefixed must be less than the 3 responses to a prompt, got 3"):
        make_strategy({"strategy": "prefix_rft", "prefixed": 3}).repeated([], 3, 0)
