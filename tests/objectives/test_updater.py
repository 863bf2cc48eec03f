"""Optimizer and scheduler together: one step each, in both phases, and back from a saved state."""

import io

import pytest
import torch

from hybrid.core import Encoded, InputError, RunStopped
from hybrid.data import collate
from hybrid.objectives import GradientConfig, Term, Updater

BATCH = collate([Encoded((5, 6, 7), (-100, 6, 7), (5,), "", "", {})], pad_id=0)


def made(scheduler, *, num_updates=10, optimizer=None, **options):
    torch.manual_seed(0)
    module = torch.nn.Linear(80, 80)  # 6400 weights: large enough for 8-bit states
    section = {"name": "adamw", "lr": 1.0, **(optimizer or {})}
    return Updater(module, section, scheduler, GradientConfig(max_skipped=2), num_updates=num_updates, **options)


def step(updater, lr_factor=1.0, factor=1.0):
    """One update, its loss times `factor`."""
    loss = lambda _: (factor * updater.module(torch.ones(80)).square().mean(), {})  # noqa: E731
    return updater([Term("sft", BATCH, loss, lr_factor=lr_factor)])


NAN = float("nan")


def test_skipped_steps_in_a_row_stop_the_run_and_others_do_not():
    updater = made({})
    for factor in (NAN, 1.0, NAN):
        step(updater, factor=factor)
    with pytest.raises(RunStopped, match="2 updates in a row had a loss or gradient that is not finite"):
        step(updater, factor=NAN)


def test_who_asked_is_told_of_each_skipped_update_with_its_rows():
    updater, told = made({}), []
    updater.on_skip = lambda terms, metrics: told.append((terms[0].rows, metrics["skipped"]))
    for factor in (1.0, NAN, 1.0):
        step(updater, factor=factor)
    assert told == [(BATCH, 1.0)]


def test_the_scheduler_counts_skipped_steps_too():
    updater = made({"name": "linear"}, num_updates=4)
    assert [step(updater, factor=f)["lr"] for f in (NAN, 1.0, NAN, 1.0)] == pytest.approx([1.0, 0.75, 0.5, 0.25])


@pytest.mark.filterwarnings("error")
def test_a_first_step_that_is_skipped_brings_no_warning_of_torchs():
    step(made({"name": "linear"}), factor=NAN)


def test_overflows_of_float16_halve_the_scale_and_are_not_counted():
    updater = made({}, precision="float16")
    # A gradient beyond float32 only with the scale on it.
    losses = [step(updater, factor=1e36) for _ in range(4)]
    assert [m["loss_scale"] for m in losses] == [65536 / 2**i for i in range(4)]
    assert all(m["overflow"] == m["skipped"] == 1.0 for m in losses)
    assert updater.skipped_in_a_row == 0


def test_a_loss_that_is_not_finite_is_counted_in_float16_and_leaves_the_scale_alone():
    updater = made({}, precision="float16")
    metrics = step(updater, factor=NAN)
    assert (metrics["skipped"], metrics["overflow"], updater.skipped_in_a_row) == (1.0, 0.0, 1)
    assert updater.scaler.get_scale() == 65536.0


def test_overflows_at_the_smallest_scale_are_counted():
    updater = made({}, precision="float16")
    updater.scaler.load_state_dict({**updater.scaler.state_dict(), "scale": 1.0})
    with pytest.raises(RunStopped, match="bfloat16"):
        for _ in range(2):
            step_with_an_infinite_gradient(updater)
    assert updater.scaler.get_scale() == 1.0


def step_with_an_infinite_gradient(updater):
    weight = updater.module.weight
    updater([Term("sft", BATCH, lambda _: ((weight - weight.detach()).sum().abs().sqrt(), {}))])


def test_scale_and_microbatches_survive_saving():
    one, two = (made({}, precision="float16") for _ in range(2))
    step(one, factor=1e36)
    one.row_limits["sft"] = 3
    two.load_state_dict(one.state_dict())
    assert two.row_limits == {"sft": 3}
    assert step(two)["loss_scale"] == step(one)["loss_scale"] == 32768.0


def test_the_scheduler_steps_once_per_optimizer_step_and_the_factor_survives_it():
    updater = made({"name": "linear"}, num_updates=4)
    factors = (1.0, 0.5, 1.0, 0.5)
    assert [step(updater, f)["lr"] for f in factors] == pytest.approx([1.0, 0.75 * 0.5, 0.5, 0.25 * 0.5])


def test_a_length_in_the_section_goes_before_the_runs():
    updater = made({"name": "linear", "Num_Training_Steps": 2}, num_updates=100)
    assert [step(updater)["lr"] for _ in range(2)] == [1.0, 0.5]


def test_without_a_scheduler_the_rate_stays():
    updater = made({})
    assert updater.scheduler is None
    assert [step(updater)["lr"] for _ in range(3)] == [1.0] * 3


def test_a_plateau_is_told_the_evaluations_metric_only():
    updater = made({"name": "reduce_on_plateau", "PATIENCE": 0, "FACTOR": 0.5})
    assert step(updater)["lr"] == 1.0
    for loss in (2.0, 2.0):
        updater.evaluated({"sft_loss": loss}, "sft_loss")
    assert step(updater)["lr"] == 0.5
    with pytest.raises(InputError, match="did you mean"):
        updater.evaluated({"sft_loss": 1.0}, "stf_loss")


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit", "ademamix_8bit", "lion_8bit", "adafactor"])
@pytest.mark.parametrize("scheduler", ["cosine", "onecycle", "reduce_on_plateau", "cosineannealing_warm_restarts"])
def test_saved_and_loaded_it_goes_on_as_if_never_stopped(name, scheduler):
    if name.endswith("8bit"):
        pytest.importorskip("bitsandbytes")
    section = {"name": scheduler, **({"MAX_LR": 0.5} if scheduler == "onecycle" else {})}
    one, two = (made(section, optimizer={"name": name, "lr": 0.1}) for _ in range(2))
    for _ in range(3):
        step(one)
    buffer = io.BytesIO()
    torch.save([one.module.state_dict(), one.state_dict()], buffer)
    buffer.seek(0)
    weights, state = torch.load(buffer, weights_only=True)
    two.module.load_state_dict(weights)
    two.load_state_dict(state)
    assert [step(one) for _ in range(3)] == [step(two) for _ in range(3)]
    assert torch.equal(one.module.weight, two.module.weight)
