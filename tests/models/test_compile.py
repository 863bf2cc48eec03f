"""The compiled trunk: the same numbers, few graphs, and nothing of it in copies or in decoding."""

import copy
import sys

import pytest
import torch
from tiny import tiny_model, tiny_policy

from hybrid import HybridConfig, HybridTrainer
from hybrid.core import InputError

ROWS = [{"prompt": "the movie was", "target": "good"}, {"prompt": "it is", "target": "fine and good"}]


@pytest.fixture(autouse=True)
def recursion_limit():
    """torch.compile raises it for the whole process, and how deep a JSON can be judged hangs on it."""
    before = sys.getrecursionlimit()
    yield
    sys.setrecursionlimit(before)


def rows(num_rows, length):
    ids = torch.randint(3, 97, (num_rows, length), generator=torch.Generator().manual_seed(length))
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[0, :2] = False
    return ids, mask


def gradients(policy, *batch):
    policy.zero_grad()
    policy(*batch).hidden.sin().sum().backward()
    return [p.grad.clone() for p in policy.backbone.parameters() if p.grad is not None]


@pytest.mark.slow
def test_a_compiled_trunk_gives_the_same_gradients_for_all_shapes_with_few_graphs():
    policy, compiled = tiny_policy(), tiny_policy()
    compiled.backbone.compile_trunk()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for shape in ((3, 12), (2, 9), (4, 17)):
        for found, wanted in zip(gradients(compiled, *rows(*shape)), gradients(policy, *rows(*shape)), strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4 * wanted.abs().max().item())
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2


@pytest.mark.slow
def test_a_run_with_a_compiled_trunk_is_the_run_without_to_rounding(tokenizer):
    losses, tokens = [], []
    for on in (False, True):
        config = HybridConfig.from_dict(
            {"model": {"compile": on}, "sampling": {"max_new_tokens": 6}, "ppo": {"batch_size": 2, "minibatch_size": 2},
             "data": {"template": "none"}}
        )  # fmt: skip
        hybrid = HybridTrainer(tiny_model("llama"), tokenizer, ROWS, lambda response: float(len(response)), config)
        assert hybrid.policy.backbone.is_compiled == on
        rollout = hybrid.rollout(ROWS)
        metrics = hybrid.ppo_step(rollout)
        assert metrics["sampling_gap_max"] < 1e-4
        tokens.append(rollout.input_ids)
        losses.append([metrics["loss"], metrics["grad_norm"], metrics["kl"]])
    assert torch.equal(*tokens)  # drawn by compiled steps
    assert losses[0] == pytest.approx(losses[1], rel=1e-3, abs=1e-5)


def test_a_copy_is_not_compiled_and_has_weights_of_its_own():
    policy = tiny_policy()
    policy.backbone.compile_trunk()
    other = copy.deepcopy(policy)
    assert policy.backbone.is_compiled and not other.backbone.is_compiled
    assert set(policy.state_dict()) == set(tiny_policy().state_dict())


def test_compiling_beside_checkpointing_is_refused():
    with pytest.raises(InputError, match=r"does not go with ModelConfig\.gradient_checkpointing"):
        HybridConfig.from_dict({"model": {"compile": True, "gradient_checkpointing": True}})
