"""The schedules of transformers: our factors against theirs, and what ours do where theirs leave the road."""

import pytest
import torch
from optim.rates import BASES, optimizer, rates

from hybrid.optim import make_scheduler

TOTAL, WARMUP = 40, 5


@pytest.mark.parametrize(
    ("name", "config", "theirs"),
    [
        ("constant", {}, {}),
        ("constant_with_warmup", {}, {}),
        ("linear", {}, {}),
        ("inverse_sqrt", {}, {}),
        ("inverse_sqrt", {"TIMESCALE": 9}, {"timescale": 9}),
        ("cosine", {}, {}),
        ("cosine", {"NUM_CYCLES": "1.5"}, {"num_cycles": 1.5}),
        ("cosine_with_restarts", {}, {}),
        ("cosine_with_restarts", {"NUM_CYCLES": 3}, {"num_cycles": 3}),
        ("polynomial", {}, {}),
        ("polynomial", {"POLY_POWER": 2, "LR_END": 1e-4}, {"power": 2.0, "lr_end": 1e-4}),
        ("cosine_with_min_lr", {"MIN_LR": 1e-4}, {"min_lr": 1e-4}),
        ("cosine_with_min_lr", {}, {"min_lr_rate": 0.1}),
        ("warmup_stable_decay", {}, {"num_decay_steps": 4}),
        (
            "warmup_stable_decay",
            {"NUM_DECAY_STEPS": 10, "NUM_STABLE_STEPS": 7, "DECAY_TYPE": "1-sqrt", "MIN_LR_RATIO": 0.2},
            {"num_decay_steps": 10, "num_stable_steps": 7, "decay_type": "1-sqrt", "min_lr_ratio": 0.2},
        ),
        (
            "warmup_stable_decay",
            {"NUM_DECAY_STEPS": 10, "WARMUP_TYPE": "cosine", "DECAY_TYPE": "linear"},
            {"num_decay_steps": 10, "warmup_type": "cosine", "decay_type": "linear"},
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:Both num_training_steps")
def test_a_schedule_equals_that_of_transformers_up_to_its_total(name, config, theirs):
    get_scheduler = pytest.importorskip("transformers.optimization").get_scheduler
    mine, other = optimizer(), optimizer()
    ours = make_scheduler(mine, name, {"NUM_WARMUP_STEPS": WARMUP, **config}, num_training_steps=TOTAL)
    reference = get_scheduler(name, other, WARMUP, TOTAL, scheduler_specific_kwargs=theirs)
    torch.testing.assert_close(rates(mine, ours, TOTAL), rates(other, reference, TOTAL), rtol=1e-12, atol=1e-18)


@pytest.mark.parametrize(
    ("name", "last"),
    [
        ("linear", 0.0),
        ("cosine", 0.0),
        ("cosine_with_restarts", 0.0),
        ("polynomial", 1e-7 / BASES[0]),
        ("cosine_with_min_lr", 0.1),
        ("warmup_stable_decay", 0.0),
        ("lambda", 0.0),
    ],
)
def test_a_run_that_outlives_the_total_keeps_the_last_rate(name, last):
    held = optimizer()
    seen = rates(held, make_scheduler(held, name, num_training_steps=TOTAL), 2 * TOTAL)[TOTAL:]
    torch.testing.assert_close(seen, last * torch.tensor(BASES, dtype=torch.float64).expand_as(seen))


@pytest.mark.parametrize("name", ["linear", "cosine", "cosine_with_restarts", "polynomial", "cosine_with_min_lr"])
def test_a_warm_up_as_long_as_the_run_does_not_divide_by_zero(name):
    whole = optimizer()
    seen = rates(whole, make_scheduler(whole, name, num_training_steps=4, num_warmup_steps=4), 6)
    torch.testing.assert_close(seen[:4, 0], BASES[0] * torch.arange(4, dtype=torch.float64) / 4)


@pytest.mark.parametrize("floor", [0.0, 0.25])
def test_lambda_falls_linearly_to_its_floor(floor):
    mine = optimizer()
    seen = rates(mine, make_scheduler(mine, "lambda", {"LR_FLOOR": floor}, num_training_steps=TOTAL), 50)
    for step, row in enumerate(seen.tolist()):
        factor = floor + (1 - floor) * max(0, 1 - step / TOTAL)
        assert row == pytest.approx([base * factor for base in BASES])


def test_poly_is_polynomial_and_wsd_is_warmup_stable_decay():
    for alias, name in (("Poly", "polynomial"), ("WSD", "warmup_stable_decay")):
        one, two = optimizer(), optimizer()
        assert torch.equal(
            rates(one, make_scheduler(one, alias), 5),
            rates(two, make_scheduler(two, name), 5),
        )


def test_every_group_keeps_its_own_base_rate():
    mine = optimizer()
    seen = rates(mine, make_scheduler(mine, "cosine", num_training_steps=TOTAL), TOTAL - 1)
    torch.testing.assert_close(seen[:, 1] / seen[:, 0], torch.full((TOTAL,), 4.0, dtype=torch.float64))
