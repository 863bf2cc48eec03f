"""The schedules of torch: against closed forms written here, and what we add to one-cycle and cyclic."""

from math import cos, pi

import pytest
import torch
from optim.rates import BASES, optimizer, rates
from torch import nn

from hybrid.core import InputError
from hybrid.optim import make_optimizer, make_scheduler


def warm_restarts(step, first, times):
    length = first
    while step >= length:
        step, length = step - length, length * times
    return (1 + cos(pi * step / length)) / 2


@pytest.mark.parametrize(
    ("name", "config", "rate"),
    [
        ("step", {"STEP_SIZE": 3, "GAMMA": 0.5}, lambda t, base: base * 0.5 ** (t // 3)),
        ("step", {}, lambda t, base: base),
        ("multistep", {"MILESTONES": [2, 7]}, lambda t, base: base * 0.1 ** ((t >= 2) + (t >= 7))),
        ("multistep", {"MILESTONES": "7, 2", "GAMMA": 0.5}, lambda t, base: base * 0.5 ** ((t >= 2) + (t >= 7))),
        ("exponential", {}, lambda t, base: base * 0.95**t),
        ("cosineannealing", {}, lambda t, base: base * (1 + cos(pi * t / 20)) / 2),
        (
            "cosineannealing",
            {"T_MAX": 8, "ETA_MIN": 1e-4},
            lambda t, base: 1e-4 + (base - 1e-4) * (1 + cos(pi * t / 8)) / 2,
        ),
        ("cosineannealing_warm_restarts", {}, lambda t, base: base * warm_restarts(t, 2, 2)),
        (
            "cosineannealing_warm_restarts",
            {"T0": 3, "T_MULT": 3, "MIN_LR": 1e-4},
            lambda t, base: 1e-4 + (base - 1e-4) * warm_restarts(t, 3, 3),
        ),
        ("cosineannealing_warm_restarts", {"T_0": 5, "T_MULT": 1}, lambda t, base: base * warm_restarts(t, 5, 1)),
    ],
)
def test_a_schedule_is_its_closed_form(name, config, rate):
    mine = optimizer()
    for step, row in enumerate(rates(mine, make_scheduler(mine, name, config, num_training_steps=20), 30).tolist()):
        assert row == pytest.approx([rate(step, base) for base in BASES], rel=1e-9, abs=1e-15), step


def test_multistep_has_its_milestones_at_1000_2000_and_3000():
    scheduler = make_scheduler(optimizer(), "multistep")
    assert sorted(scheduler.milestones) == [1000, 2000, 3000]


def onecycle_rate(step, total, top=1e-3, share=0.3):
    peak, last = share * total - 1, total - 1
    low, end = top / 25, top / 25 / 1e4
    if step <= peak:
        return low + (top - low) * (1 - cos(pi * step / peak)) / 2
    return end + (top - end) * (1 + cos(pi * min(1, (step - peak) / (last - peak)))) / 2


def test_onecycle_rises_falls_and_keeps_the_ratio_of_the_groups():
    mine = optimizer()
    for step, row in enumerate(rates(mine, make_scheduler(mine, "onecycle", num_training_steps=20), 30).tolist()):
        assert row == pytest.approx([onecycle_rate(step, 20), 4 * onecycle_rate(step, 20)], rel=1e-9)


def test_onecycle_past_its_total_holds_the_last_rate_and_says_so_once(caplog):
    mine = optimizer()
    scheduler = make_scheduler(mine, "onecycle", num_training_steps=5)
    seen = rates(mine, scheduler, 12).tolist()
    assert all(row == seen[4] for row in seen[5:])
    assert [r.getMessage() for r in caplog.records] == [
        "scheduler onecycle is past its 5 steps: it holds the last learning rate"
    ]


@pytest.mark.parametrize(("total", "share"), [(10, 0.1), (1, 0.3), (2, 0.5), (7, 0.0), (7, 1.0)])
@pytest.mark.parametrize("three_phase", [False, True])
def test_onecycle_of_any_length_does_not_crash(total, share, three_phase):
    mine = optimizer()
    config = {"PCT_START": share, "THREE_PHASE": three_phase}
    rates(mine, make_scheduler(mine, "onecycle", config, num_training_steps=total), total + 2)


@pytest.mark.parametrize(
    ("make", "read", "cycles"),
    [
        (lambda: optimizer(), lambda group: group["betas"][0], True),
        (lambda: optimizer(torch.optim.SGD, momentum=0.5), lambda group: group["momentum"], True),
        (lambda: optimizer(torch.optim.Adagrad), lambda group: None, False),
    ],
    ids=["betas", "momentum", "neither"],
)
@pytest.mark.parametrize("name", ["onecycle", "cyclic"])
def test_momentum_cycles_against_the_rate_where_there_is_one(name, make, read, cycles):
    mine = make()
    scheduler = make_scheduler(mine, name, num_training_steps=10)
    seen = [read(mine.param_groups[1])]
    for _ in range(9):
        mine.step()
        scheduler.step()
        seen.append(read(mine.param_groups[1]))
    if cycles:
        assert (seen[0], min(seen)) == pytest.approx((0.95, 0.85))
    else:
        assert seen == [None] * 10


@pytest.mark.parametrize("name", ["rmsprop_8bit", "adagrad_8bit"])
def test_bitsandbytes_keeps_its_alpha_when_the_momentum_cycles(name):
    pytest.importorskip("bitsandbytes")
    mine = make_optimizer([nn.Parameter(torch.zeros(8))], name, 1e-3)
    betas = mine.param_groups[0]["betas"]
    make_scheduler(mine, "cyclic", num_training_steps=10)
    assert mine.param_groups[0]["betas"] == betas


def test_cycling_a_momentum_that_is_not_there_is_refused():
    with pytest.raises(InputError, match="cycle_momentum must be false for Adagrad"):
        make_scheduler(optimizer(torch.optim.Adagrad), "cyclic", {"CYCLE_MOMENTUM": "yes"})


def test_the_momentum_stays_where_cycling_is_turned_off():
    mine = optimizer(betas=(0.7, 0.9))
    make_scheduler(mine, "cyclic", {"CYCLE_MOMENTUM": "no"})
    assert mine.param_groups[0]["betas"] == (0.7, 0.9)


@pytest.mark.parametrize(
    ("mode", "height"),
    [
        ("triangular", lambda step, cycle: 1.0),
        ("triangular2", lambda step, cycle: 0.5**cycle),
        ("exp_range", lambda step, cycle: 0.9**step),
    ],
)
def test_cyclic_is_its_closed_form(mode, height):
    mine = optimizer()
    scheduler = make_scheduler(mine, "cyclic", {"MODE": mode, "GAMMA": 0.9}, num_training_steps=10)
    for step, row in enumerate(rates(mine, scheduler, 25).tolist()):  # 4 up and 4 down: ceil(0.4 x 10)
        place = 1 - abs(step % 8 - 4) / 4
        rate = 1e-6 + (1e-3 - 1e-6) * place * height(step, step // 8)
        assert row == pytest.approx([rate, 4 * rate], rel=1e-9)


def test_cyclic_takes_its_two_step_sizes():
    mine = optimizer()
    seen = rates(mine, make_scheduler(mine, "cyclic", {"STEP_SIZE_UP": 2, "STEP_SIZE_DOWN": "6"}), 8).tolist()
    assert max(range(9), key=lambda step: seen[step]) == 2
    assert seen[8] == pytest.approx([1e-6, 4e-6])


def test_reduce_on_plateau_takes_the_metric():
    mine = optimizer()
    scheduler = make_scheduler(mine, "reduce_on_plateau", {"PATIENCE": 1, "FACTOR": 0.5, "MODE": "MAX"})
    for metric in (1.0, 0.9, 0.8, 2.0, 1.0, 1.0):  # two bad ones in a row, twice
        scheduler.step(metric)
    assert [group["lr"] for group in mine.param_groups] == [base / 4 for base in BASES]
