"""bfloat16 and float16 computation: float32 losses, and in float16 gradients that do not vanish."""

from types import SimpleNamespace

import pytest
import torch
from tiny import tiny_model

from hybrid.core import Encoded
from hybrid.data import collate
from hybrid.functional import FixedKL
from hybrid.models import Policy, Reference
from hybrid.objectives import (
    PPOConfig,
    SFTConfig,
    Term,
    autocast,
    grad_scaler,
    make_objective,
    update,
    with_advantages,
)
from hybrid.rollout import KLConfig, Responses, assemble

CPU = torch.device("cpu")
# Half a unit in the last of 11 bits (8 in bfloat16), for sums over a few layers.
TOLERANCE = {"float16": 2e-2, "bfloat16": 8e-2}


def rows(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 97, (3, 12), generator=generator)


def term_of(policy, phase, precision, coef=1.0):
    parts = SimpleNamespace(policy=policy, kl=FixedKL(0.0), memory=None, autocast=lambda: autocast(precision, CPU))
    config = PPOConfig(batch_size=3, minibatch_size=3)
    objective = make_objective(phase, parts, {"sft": SFTConfig(), "ppo": config, "kl": KLConfig()})
    if phase == "sft":
        batch = collate([Encoded(tuple(ids), tuple(ids), (ids[0],), "", "", {}) for ids in rows().tolist()], pad_id=0)
        return objective.term(batch, coef)
    prompts, answers = rows(), rows(1)
    whole = torch.ones_like(answers, dtype=torch.bool)
    # In float32 for all: the ratios' numerators alone are in question.
    rollout = assemble(
        policy, [Reference.from_policy(policy)], prompts, torch.ones_like(prompts),
        Responses(answers, whole, whole[:, 0]), torch.tensor([1.0, -1.0, 0.5]),
    )  # fmt: skip
    return objective.term(with_advantages(rollout, config), coef)


def gradient(phase, precision, *, coef=1.0, scaled=True):
    """The step that plain SGD of rate 1 makes, over coef, and its metrics."""
    policy = Policy(tiny_model("llama", std=0.1))
    before = [p.detach().double() for p in policy.parameters()]
    metrics = update(
        policy, torch.optim.SGD(policy.parameters(), lr=1.0), [term_of(policy, phase, precision, coef)],
        max_grad_norm=float("inf"), scaler=grad_scaler(precision, CPU) if scaled else None,
    )  # fmt: skip
    after = policy.parameters()
    return torch.cat([(x - y.detach()).flatten() for x, y in zip(before, after, strict=True)]) / coef, metrics


@pytest.mark.parametrize("phase", ["sft", "ppo"])
@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
def test_the_step_is_float32s_but_for_rounding(phase, precision):
    expected, exact = gradient(phase, "float32")
    found, metrics = gradient(phase, precision)
    assert metrics["skipped"] == 0.0
    assert metrics["loss"] == pytest.approx(exact["loss"], abs=2e-2)
    error = (found - expected).norm() / expected.norm()
    assert 0 < error < TOLERANCE[precision]


def test_float16_keeps_gradients_that_would_vanish_without_its_scale():
    expected, _ = gradient("sft", "float32", coef=1e-6)
    found, metrics = gradient("sft", "float16", coef=1e-6)
    lost, _ = gradient("sft", "float16", coef=1e-6, scaled=False)
    assert metrics["loss_scale"] == 65536.0
    # The weights' own rounding in float32 is most of what is left: the steps are that small.
    assert (found - expected).norm() / expected.norm() < 5e-2
    assert (lost - expected).norm() / expected.norm() > 5e-1


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_losses_are_float32(precision):
    policy = Policy(tiny_model("llama", std=0.1))
    for phase in ("sft", "ppo"):
        term: Term = term_of(policy, phase, precision)
        loss, metrics = term.loss_of(term.rows)
        assert {loss.dtype, *(x.dtype for x in metrics.values())} == {torch.float32}


def test_only_float16_has_a_scale():
    assert [grad_scaler(name, CPU).is_enabled() for name in ("float32", "bfloat16", "float16")] == [False, False, True]
