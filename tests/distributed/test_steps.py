"""Two and three processes learn what one learns from the same rows."""

import json

import pytest
import torch
from launched import KINDS, STEPS, forked, needs, sections, torchrun

# Of weights that are new the largest are about 1e-4, and what rounding leaves of their gradients' sums is seen.
SMALL = 2e-8
# Differences of nearly equal numbers, or the sign of one.
ROUNDED = ("sampling_gap", "sampling_gap_max", "kl", "approx_kl", "chosen_reward", "rejected_reward", "margin_mean")


@pytest.fixture(scope="module")
def alone(stories, tmp_path_factory):
    """What one process found, by step."""
    folder = tmp_path_factory.mktemp("alone")
    done = forked(1, STEPS, stories, str(folder), ",".join(KINDS), "{}")
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("engine", "count"),
    [("ddp", 3), ("fsdp2", 2), ("deepspeed-2", 2), ("deepspeed-3", 2)],
)
def test_processes_learn_what_one_learns_from_all_their_rows(alone, stories, tmp_path, engine, count):
    needs(engine)
    launch = torchrun if count == 3 else forked
    done = launch(count, STEPS, stories, str(tmp_path), ",".join(KINDS), json.dumps(sections(engine)), engine=engine)
    assert done.returncode == 0, done.stderr
    for kind in KINDS:
        one, many = (json.loads((folder / f"{kind}.json").read_text()) for folder in (alone, tmp_path))
        assert many["world"] == [engine.partition("-")[0], count]
        assert one["states"] == many["states"], "what one process has no gradient for, none has"
        assert_same_numbers(one["metrics"], many["metrics"])
        weights = [torch.load(folder / f"{kind}.pt") for folder in (alone, tmp_path)]
        for name, x in weights[0].items():
            torch.testing.assert_close(weights[1][name], x, rtol=2e-6, atol=SMALL + 1e-6 * float(x.abs().max()))


def assert_same_numbers(one, many):
    for before, after in zip(one, many, strict=True):
        assert before.keys() == after.keys()
        for name, x in before.items():
            if "second" in name or name == "accuracy":  # of answers that tie but for rounding
                continue
            loose = 1e-4 if name in ROUNDED else 1e-6
            assert after[name] == pytest.approx(x, rel=1e-4, abs=loose), name


@pytest.mark.slow
def test_a_supervised_step_leaves_the_value_head_as_it_is(alone):
    weights, states = torch.load(alone / "sft.pt"), json.loads((alone / "sft.json").read_text())["states"]
    assert not weights["value_head.linear.weight"].any()
    assert len(states) < len(weights)


@pytest.mark.slow
def test_weights_in_bfloat16_beside_heads_in_float32_are_sharded(stories, tmp_path):
    values = {"model": {"name": stories, "dtype": "bfloat16"}, **sections("fsdp2")}
    done = forked(2, STEPS, stories, str(tmp_path), "joint", json.dumps(values))
    assert done.returncode == 0, done.stderr
    weights = torch.load(tmp_path / "joint.pt")
    assert weights["value_head.linear.weight"].any()
    assert {x.dtype for name, x in weights.items() if "backbone" in name} == {torch.bfloat16}
