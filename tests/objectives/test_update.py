"""One optimizer step: the gradient of parts, clipping, skipped steps, the phase's rate."""

import pytest
import torch
from tiny import tiny_examples, tiny_model
from torch.utils._pytree import tree_leaves

from hybrid.core import microbatches
from hybrid.data import collate, pack
from hybrid.models import Policy
from hybrid.objectives import GradientConfig, SFTConfig, Term, over_updates, scaled_lr, sft_batch_loss, update
from hybrid.optim import make_optimizer


@pytest.fixture
def policy():
    return Policy(tiny_model("llama")).eval()


def gradients(policy, parts, num_tokens):
    policy.zero_grad()
    for microbatch in parts:
        sft_batch_loss(policy, microbatch, SFTConfig(), num_tokens=num_tokens)[0].backward()
    return {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("size", [1, 2, 3])
def test_accumulation_gives_the_gradient_of_the_whole_batch(policy, size):
    # Rows of very different lengths: a mean of means would be far off.
    batch = collate(tiny_examples(3, 12, 5, 9, 4), pad_id=0)
    whole = gradients(policy, [batch], None)
    parts = gradients(policy, microbatches(batch, size), batch.num_tokens)
    for name, gradient in whole.items():
        torch.testing.assert_close(parts[name], gradient, atol=1e-6, rtol=1e-5)


def test_padding_on_the_right_changes_no_gradient(policy):
    short = tiny_examples(6)
    alone = gradients(policy, [collate(short, pad_id=0)], None)
    beside = collate([*short, *tiny_examples(14, seed=1)], pad_id=7)[0:1]
    for name, gradient in gradients(policy, [beside], None).items():
        torch.testing.assert_close(gradient, alone[name], atol=1e-6, rtol=1e-5)


def test_packed_examples_give_the_gradient_of_separate_rows(policy):
    examples = tiny_examples(6, 4, 9, 3)
    rows = gradients(policy, [collate(examples, pad_id=0)], None)
    packed = gradients(policy, [pack(examples, max_length=16, pad_id=0)], None)
    for name, gradient in rows.items():
        torch.testing.assert_close(packed[name], gradient, atol=1e-6, rtol=1e-5)


def test_changing_prompt_tokens_labels_or_padding_labels_changes_no_loss(policy):
    examples = tiny_examples(6, 4)
    batch = collate(examples, pad_id=0)
    other = collate(examples, pad_id=9)
    loss, _ = sft_batch_loss(policy, batch, SFTConfig())
    assert torch.equal(loss, sft_batch_loss(policy, other, SFTConfig())[0])


def test_an_sft_step_leaves_the_value_head_bit_identical(policy):
    torch.nn.init.normal_(policy.value_head.linear.weight)
    before = {name: x.clone() for name, x in policy.value_head.state_dict().items()}
    optimizer = torch.optim.AdamW(policy.parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(2):
        batch = collate(tiny_examples(6, 4), pad_id=0)
        update(policy, optimizer, [Term("sft", batch, lambda b: sft_batch_loss(policy, b, SFTConfig()))])
    assert all(torch.equal(x, before[name]) for name, x in policy.value_head.state_dict().items())


def linear_step(loss, *, lr_factor=1.0, max_grad_norm=1.0):
    """One update of a single weight with the given loss of it."""
    module = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.ones_(module.weight)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
    batch = collate(tiny_examples(4), pad_id=0)
    term = Term("sft", batch, lambda _: (loss(module.weight), {}), lr_factor=lr_factor)
    metrics = update(module, optimizer, [term], max_grad_norm=max_grad_norm)
    return module.weight.item(), metrics, optimizer


def test_the_step_is_the_rate_times_the_clipped_gradient():
    weight, metrics, _ = linear_step(lambda w: 8 * w.sum())
    assert weight == pytest.approx(1 - 0.5 * 1.0)
    assert metrics["grad_norm"] == 8.0


def test_the_phase_factor_scales_the_step_and_leaves_the_optimizer_as_it_was():
    weight, metrics, optimizer = linear_step(lambda w: w.sum(), lr_factor=0.1)
    assert weight == pytest.approx(1 - 0.05)
    assert metrics["lr"] == pytest.approx(0.05)
    assert optimizer.param_groups[0]["lr"] == 0.5


def test_terms_add_up_by_their_coefficients_and_each_ones_loss_is_told():
    module = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.ones_(module.weight)
    batch = collate(tiny_examples(4), pad_id=0)
    terms = [
        Term("one", batch, lambda _: (3 * module.weight.sum(), {}), coef=0.5),
        Term("two", batch, lambda _: (5 * module.weight.sum(), {}), coef=2.0),
    ]
    metrics = update(module, torch.optim.SGD(module.parameters(), lr=0.1), terms, max_grad_norm=100.0)
    assert (metrics["one_loss"], metrics["two_loss"], metrics["loss"]) == (3.0, 5.0, 11.5)
    assert metrics["grad_norm"] == 11.5
    assert module.weight.item() == pytest.approx(1 - 0.1 * 11.5)


# A loss, and a gradient under a finite loss: of sqrt at 0.
NOT_FINITE = [lambda x: x.sum() * float("nan"), lambda x: x.sum() + float("inf"), lambda x: (x - x).sum().sqrt()]


@pytest.mark.parametrize("loss", NOT_FINITE)
@pytest.mark.parametrize("name", ["adamw", "adamw_8bit", "adafactor"])
def test_a_step_that_is_not_finite_leaves_weights_and_optimizer_as_they_were(loss, name):
    if name.endswith("8bit"):
        pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    module = torch.nn.Linear(80, 80)  # 6400 weights: large enough for 8-bit states
    optimizer = make_optimizer(module, name, 0.1)
    batch = collate(tiny_examples(4), pad_id=0)
    step = lambda loss: update(module, optimizer, [Term("sft", batch, lambda _: (loss(module(torch.ones(80))), {}))])  # noqa: E731
    assert step(lambda x: x.square().mean())["skipped"] == 0.0
    before = [x.clone() for x in state_of(module, optimizer)]
    assert step(loss)["skipped"] == 1.0
    after = state_of(module, optimizer)
    assert len(before) == len(after) > 2
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))


def state_of(module, optimizer):
    """Every tensor and number of the weights and of the optimizer's state."""
    leaves = tree_leaves([module.state_dict(), optimizer.state_dict()["state"]])
    return [torch.as_tensor(leaf) for leaf in leaves if leaf is not None]


def test_scaled_lr_is_undone_even_by_an_error():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)
    with pytest.raises(RuntimeError), scaled_lr(optimizer, 3.0):
        assert optimizer.param_groups[0]["lr"] == 3.0
        raise RuntimeError
    assert optimizer.param_groups[0]["lr"] == 1.0


def test_several_updates_are_averaged_and_the_skipped_ones_only_counted():
    steps = [{"loss": x, "ratio_max": x + 1, "skipped": 0.0} for x in (1.0, 3.0)]
    nan = float("nan")
    merged = over_updates([*steps, {"loss": nan, "ratio_max": nan, "skipped": 1.0}])
    assert merged == {"loss": 2.0, "ratio_max": 4.0, "skipped_updates": 1.0}


@pytest.mark.parametrize(("field", "value"), [("max_norm", 0.0), ("max_skipped", 0)])
def test_a_value_out_of_range_is_refused_by_name(field, value):
    with pytest.raises(ValueError, match=f"GradientConfig.{field}"):
        GradientConfig(**{field: value})
