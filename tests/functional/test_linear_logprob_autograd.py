"""How linear_logprob behaves under autograd: what is kept between forward and backward, and under which modes."""

import pytest
import torch
from linear_case import IGNORE, MODULE, NAMES, TIGHT, Case
from torch.utils.checkpoint import checkpoint


@pytest.fixture(params=[0, 2 * 3 * 8, 2**20], ids=["none", "one tile", "all"])
def kept(request, monkeypatch):
    """Small tiles, of which forward keeps none, one, or all beside those in the weight's gradient."""
    monkeypatch.setattr(MODULE, "_VOCAB_SLICE", 3)
    monkeypatch.setattr(MODULE, "_ROW_CHUNK", 2)
    monkeypatch.setattr(MODULE, "_SPARE", request.param)


def total(case):
    stats = case.stats()
    return sum(getattr(stats, name).sum() for name in NAMES)


def assert_all_close(found, expected):
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=TIGHT)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.usefixtures("kept")
def test_a_statistic_that_enters_no_loss_adds_nothing(name):
    case = Case((5,), 11)
    inputs = case.trainable()
    found = torch.autograd.grad(getattr(case.stats(), name).sum(), inputs)
    assert_all_close(found, torch.autograd.grad(case.by_definition()[name].sum(), inputs))


@pytest.mark.usefixtures("kept")
def test_an_expanded_upstream_gradient_is_that_of_a_full_one():
    case = Case((5,), 11)
    inputs, outputs = case.trainable(), [getattr(case.stats(), name) for name in NAMES]
    ones = [torch.ones((), dtype=torch.float64).expand(5) for _ in outputs]
    found = torch.autograd.grad(outputs, inputs, ones)
    assert_all_close(found, torch.autograd.grad(total(case), inputs))


@pytest.mark.usefixtures("kept")
def test_a_second_backward_of_a_retained_graph_gives_the_same():
    case = Case((5,), 11)
    inputs, loss = case.trainable(), total(case)
    first = [x.clone() for x in torch.autograd.grad(loss, inputs, retain_graph=True)]
    held = torch.autograd.grad(loss, inputs, retain_graph=True)
    third = torch.autograd.grad(loss, inputs)
    assert_all_close(held, first)
    assert_all_close(third, first)


@pytest.mark.usefixtures("kept")
def test_a_second_backward_leaves_the_first_ones_gradient_alone():
    case = Case((5,), 11)
    inputs, loss = case.trainable(), total(case)
    first = torch.autograd.grad(loss, inputs, retain_graph=True)
    before = [x.clone() for x in first]
    torch.autograd.grad(3 * loss, inputs)
    assert all(torch.equal(a, b) for a, b in zip(first, before, strict=True))


@pytest.mark.parametrize("asked", ["hidden", "weight", "bias"])
@pytest.mark.usefixtures("kept")
def test_asking_for_one_gradient_gives_that_one(asked):
    case = Case((5,), 11)
    inputs = dict(zip(("hidden", "weight", "bias"), case.trainable(), strict=True))
    whole = dict(zip(inputs, torch.autograd.grad(total(case), list(inputs.values())), strict=True))
    loss = total(case)
    assert torch.equal(torch.autograd.grad(loss, inputs[asked], retain_graph=True)[0], whole[asked])
    # What was kept is spent: the others are computed anew.
    assert_all_close(torch.autograd.grad(loss, list(inputs.values())), list(whole.values()))


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.usefixtures("kept")
def test_checkpointing_changes_no_gradient(reentrant):
    case = Case((5,), 11)
    inputs = case.trainable()
    expected = torch.autograd.grad(total(case), inputs)

    def loss(hidden, weight, bias):
        case.hidden, case.weight, case.bias = hidden, weight, bias
        return total(case)

    checkpoint(loss, *inputs, use_reentrant=reentrant).backward()
    assert_all_close([x.grad for x in inputs], expected)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.usefixtures("kept")
def test_values_without_a_graph_are_those_with_one(name, mode):
    case = Case((5,), 11)
    case.trainable()
    expected = getattr(case.stats(), name)
    with mode():
        found = getattr(case.stats(), name)
    assert torch.equal(found, expected) and not found.requires_grad


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_nothing_is_kept_without_a_graph(mode, monkeypatch):
    kept = []
    monkeypatch.setattr(MODULE._Head, "keep", kept.append)
    case = Case()
    case.trainable()
    with mode():
        case.stats()
    assert not kept


@pytest.mark.usefixtures("kept")
def test_two_losses_of_one_head_add_up():
    case = Case((5,), 11)
    inputs = case.trainable()
    once = torch.autograd.grad(total(case), inputs)
    (total(case) + total(case)).backward()
    assert_all_close([x.grad for x in inputs], [2 * x for x in once])


@pytest.mark.usefixtures("kept")
def test_ignored_rows_have_gradient_zero_whatever_they_hold():
    case = Case((5,), 11)
    case.labels[1] = case.labels[4] = IGNORE
    case.hidden[1] = case.ref_hidden[1] = torch.nan
    hidden = case.trainable()[0]
    gradient = torch.autograd.grad(total(case), hidden)[0]
    assert (gradient[[1, 4]] == 0).all() and gradient.isfinite().all()


def test_no_rows_at_all_give_a_connected_zero():
    case = Case((0,), 11)
    inputs = case.trainable()
    gradients = torch.autograd.grad(total(case), inputs)
    assert all(torch.equal(g, torch.zeros_like(x)) for g, x in zip(gradients, inputs, strict=True))
