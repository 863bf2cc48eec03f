"""Strategies: which step comes when, how many there are, and what they refuse."""

import pytest

from hybrid.core import InputError
from hybrid.mixing import make_strategy


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
    assert {kind[:3] for kind in kinds(strategy)} == strategy.kinds
    assert len(strategy.kinds) == 1


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
