"""token_stats: what one pass over logits gives, against the three functions it is made of and against float64."""

import math

import pytest
import torch
from linear_case import IGNORE, INF, NAMES, TIGHT

from hybrid.functional import entropy, full_kl, token_logprob, token_stats


def case(rows=6, vocab=11, dtype=torch.float64, seed=0):
    """logits, ref_logits (rows, V) and labels (rows,)."""
    generator = torch.Generator().manual_seed(seed)
    logits, ref_logits = 3 * torch.randn(2, rows, vocab, generator=generator, dtype=torch.float64)
    return logits.to(dtype), ref_logits.to(dtype), torch.randint(vocab, (rows,), generator=generator)


def stats(logits, ref_logits, labels, **options):
    return token_stats(logits, labels, want=NAMES, ref_logits=ref_logits, **options)


def total(found):
    return sum(getattr(found, name).sum() for name in NAMES)


@pytest.mark.parametrize("options", [{}, {"temperature": 0.7}, {"softcap": 2.0}, {"temperature": 0.7, "softcap": 2.0}])
def test_each_statistic_is_that_of_its_function(options):
    logits, ref_logits, labels = case()
    found = stats(logits, ref_logits, labels, **options)
    assert torch.equal(found.logprob, token_logprob(logits, labels, **options))
    assert torch.equal(found.entropy, entropy(logits, **options))
    assert torch.equal(found.kl, full_kl(logits, ref_logits, **options))


def test_a_soft_cap_comes_before_the_temperature():
    # Logits 0 and 3, cap 2, temperature 0.5: z = 0 and 2 tanh(1.5), logprob of the first -log(1 + exp(2 z)).
    logprob = token_logprob(
        torch.tensor([[0.0, 3.0]], dtype=torch.float64), torch.tensor([0]), temperature=0.5, softcap=2
    )
    assert logprob.item() == pytest.approx(-math.log1p(math.exp(2 * 2 * math.tanh(1.5))), abs=TIGHT)


def test_a_large_soft_cap_changes_nothing_to_speak_of():
    # c tanh(z / c) = z - z^3 / (3 c^2): below 1e-9 for z up to 10 and c = 1e6.
    logits, ref_logits, labels = case()
    for name in NAMES:
        capped = getattr(stats(logits, ref_logits, labels, softcap=1e6), name)
        torch.testing.assert_close(capped, getattr(stats(logits, ref_logits, labels), name), rtol=0, atol=1e-8)


@pytest.mark.parametrize("softcap", [0.0, -1.0, math.nan])
def test_a_soft_cap_that_is_not_positive_is_refused(softcap):
    with pytest.raises(ValueError, match="softcap"):
        stats(*case(), softcap=softcap)


@pytest.mark.parametrize("want", [["logprob"], ["entropy"], ["kl"], ["kl", "logprob"]], ids="+".join)
def test_only_what_is_wanted_is_returned(want):
    logits, ref_logits, labels = case()
    found = token_stats(logits, labels, want=want, ref_logits=ref_logits)
    assert {name for name in NAMES if getattr(found, name) is not None} == set(want)


@pytest.mark.parametrize(
    ("changes", "message"), [({"want": ()}, "want"), ({"want": ("loss",)}, "want"), ({"want": ("kl",)}, "ref_logits")]
)
def test_arguments_without_a_meaning_are_refused(changes, message):
    logits, _, labels = case()
    with pytest.raises(ValueError, match=message):
        token_stats(logits, labels, **changes)


def test_ignored_rows_give_zero_and_have_no_gradient_though_they_hold_nan():
    logits, ref_logits, labels = case()
    labels[[1, 4]] = IGNORE
    logits[1] = ref_logits[1] = math.nan
    logits[4] = ref_logits[4] = INF
    found = stats(logits.requires_grad_(), ref_logits, labels)
    total(found).backward()
    for name in NAMES:
        assert (getattr(found, name)[[1, 4]] == 0).all()
    assert (logits.grad[[1, 4]] == 0).all() and logits.grad.isfinite().all()


@pytest.mark.parametrize("rows", [0, 3])
def test_no_valid_row_gives_a_connected_zero(rows):
    logits, ref_logits, labels = case(rows)
    loss = total(stats(logits.requires_grad_(), ref_logits, labels.fill_(IGNORE)))
    assert loss.item() == 0
    assert torch.equal(torch.autograd.grad(loss, logits)[0], torch.zeros_like(logits))


def test_the_reference_gets_no_gradient():
    logits, ref_logits, labels = case()
    total(stats(logits.requires_grad_(), ref_logits.requires_grad_(), labels)).backward()
    assert ref_logits.grad is None


def test_labels_of_int32_give_what_labels_of_int64_give():
    logits, ref_logits, labels = case()
    labels[2] = IGNORE
    for name in NAMES:
        found = getattr(stats(logits, ref_logits, labels.int()), name)
        assert torch.equal(found, getattr(stats(logits, ref_logits, labels), name))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("vocab", [1, 2, 37, 668, 1128, 4097])
@pytest.mark.parametrize("rows", [0, 1, 5, 289])
def test_ragged_shapes_are_as_exact_as_float32(rows, vocab, dtype):
    logits, ref_logits, labels = case(rows, vocab, dtype)
    found = stats(logits.requires_grad_(), ref_logits, labels, temperature=0.7)
    exact_logits = logits.detach().double().requires_grad_()
    expected = stats(exact_logits, ref_logits.double(), labels, temperature=0.7)
    for name in NAMES:
        # Of sums over 4,097 float32 numbers some processors round away 2.4e-6: 40 times half a unit of the last place.
        torch.testing.assert_close(getattr(found, name).double(), getattr(expected, name), rtol=5e-6, atol=1e-5)
    gradient = torch.autograd.grad(total(found), logits)[0]
    # Rounded to the dtype of the logits: 2^-9 of it in bfloat16. Log-probabilities of -40 are known to 4e-6, twice.
    close = {"rtol": 1e-5 if dtype == torch.float32 else 2**-8, "atol": 5e-5}
    torch.testing.assert_close(gradient.double(), torch.autograd.grad(total(expected), exact_logits)[0], **close)


def test_gradients_pass_gradcheck_under_a_soft_cap():
    logits, ref_logits, labels = case(3, 5)

    def outputs(x):
        found = stats(x, ref_logits, labels, temperature=0.7, softcap=2.5)
        return tuple(getattr(found, name) for name in NAMES)

    assert torch.autograd.gradcheck(outputs, (logits.requires_grad_(),))


def test_the_callers_logits_are_left_alone():
    logits, ref_logits, labels = case()
    before = logits.clone(), ref_logits.clone()
    total(stats(logits.requires_grad_(), ref_logits, labels, softcap=3.0)).backward()
    assert torch.equal(logits, before[0]) and torch.equal(ref_logits, before[1])
