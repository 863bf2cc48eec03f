"""linear_logprob on the shapes, dtypes and layouts that kernels trip over, against the definitions in float64."""

import pytest
import torch
from linear_case import MODULE, NAMES, TIGHT, WANTS, Case

from hybrid.functional import linear_logprob

# Products and statistics are float32, whatever comes in: logits up to about 15, a few roundings of 1e-6 each.
VALUE = {"rtol": 1e-6, "atol": 1e-5}
# A gradient is then rounded to the dtype of its input: 2^-8 and 2^-11 of it.
GRADIENT = {
    torch.float32: {"rtol": 1e-5, "atol": 2e-5},
    torch.bfloat16: {"rtol": 2**-7, "atol": 2e-5},
    torch.float16: {"rtol": 2**-10, "atol": 2e-5},
}
ROWS, VOCABS = [0, 1, 5, 289], [1, 2, 37, 668, 1128, 4097]


@pytest.fixture
def crossing_tiles(monkeypatch):
    """Tiles that 289 rows and 668 columns cross, of which one is kept."""
    monkeypatch.setattr(MODULE, "_VOCAB_SLICE", 512)
    monkeypatch.setattr(MODULE, "_ROW_CHUNK", 128)
    monkeypatch.setattr(MODULE, "_SPARE", 512 * 128 * 4)


def weighted_sum(stats, seed=1):
    """One number that uses every statistic of every token with a coefficient of its own."""
    generator = torch.Generator().manual_seed(seed)
    stats = stats if isinstance(stats, dict) else {name: getattr(stats, name) for name in NAMES}
    factor = torch.randn(3, *stats["kl"].shape, generator=generator, dtype=torch.float64)
    return sum((c * stats[name]).sum() for c, name in zip(factor, NAMES, strict=True))


@pytest.mark.parametrize("dtype", GRADIENT, ids=str)
@pytest.mark.parametrize("vocab", VOCABS)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.usefixtures("crossing_tiles")
def test_ragged_shapes_equal_the_definition_in_float64(rows, vocab, dtype):
    case = Case((rows,), vocab, dtype=dtype)
    stats, expected = case.stats(temperature=0.7, softcap=20.0), case.double().by_definition(0.7, 20.0)
    for name in NAMES:
        torch.testing.assert_close(getattr(stats, name).double(), expected[name], **VALUE)


@pytest.mark.parametrize("dtype", GRADIENT, ids=str)
@pytest.mark.parametrize("vocab", VOCABS)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.usefixtures("crossing_tiles")
def test_ragged_shapes_have_the_gradient_of_the_definition_in_float64(rows, vocab, dtype):
    case = Case((rows,), vocab, dtype=dtype)
    exact = case.double()
    inputs, exact_inputs = case.trainable(), exact.trainable()
    found = torch.autograd.grad(weighted_sum(case.stats(temperature=0.7)), inputs)
    expected = torch.autograd.grad(weighted_sum(exact.by_definition(0.7)), exact_inputs)
    for a, b in zip(found, expected, strict=True):
        # Sums over rows cancel: what is left is judged by the size of the whole gradient.
        size = max(1.0, b.abs().max().item()) if b.numel() else 1.0
        torch.testing.assert_close(a.double() / size, b / size, **GRADIENT[dtype])


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("want", WANTS, ids="+".join)
@pytest.mark.usefixtures("crossing_tiles")
def test_a_soft_cap_is_that_of_the_definition(want, temperature):
    case = Case((130,), 600)
    inputs, found = case.trainable(), case.stats(want, temperature=temperature, softcap=2.5)
    expected = case.by_definition(temperature, softcap=2.5)
    for name in want:
        torch.testing.assert_close(getattr(found, name), expected[name], rtol=0, atol=TIGHT)
    gradients = torch.autograd.grad(sum(getattr(found, name).sum() for name in want), inputs)
    for a, b in zip(gradients, torch.autograd.grad(sum(expected[name].sum() for name in want), inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=TIGHT, atol=TIGHT)


@pytest.mark.parametrize("softcap", [0.0, -1.0])
def test_a_soft_cap_that_is_not_positive_is_refused(softcap):
    with pytest.raises(ValueError, match="softcap"):
        Case().stats(softcap=softcap)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shift", [1e4, -1e4])
@pytest.mark.usefixtures("crossing_tiles")
def test_a_constant_added_to_every_logit_changes_no_gradient(name, shift):
    # On a grid of 1/8 the products, also 1e4 away, are exact in float32.
    case = Case((5,), 668)
    for tensor in ("hidden", "weight", "bias", "ref_hidden", "ref_weight", "ref_bias"):
        setattr(case, tensor, ((getattr(case, tensor) * 8).round() / 8).float())
    gradients = []
    for by in (0.0, shift):
        case.bias = case.bias.detach() + by
        inputs = case.trainable()
        gradients.append(torch.autograd.grad(getattr(case.stats(), name).sum(), inputs))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def strided(x):
    """The same numbers, not contiguous in any dimension."""
    wide = x.new_zeros([2 * size for size in x.shape])
    view = wide[tuple(slice(1, None, 2) for _ in x.shape)]
    return view.copy_(x)


def misaligned(x):
    """The same numbers, contiguous, one element behind an aligned address."""
    return x.new_zeros(x.numel() + 1)[1:].view(x.shape).copy_(x)


def transposed(x):
    return x.mT.contiguous().mT if x.ndim > 1 else x


@pytest.mark.parametrize("layout", [strided, misaligned, transposed])
@pytest.mark.parametrize("tensor", ["hidden", "weight", "bias", "labels", "ref_hidden", "ref_weight", "ref_bias"])
@pytest.mark.usefixtures("crossing_tiles")
def test_the_layout_of_an_input_changes_nothing(tensor, layout):
    case = Case((2, 3), 668)
    inputs = case.trainable()
    expected = torch.autograd.grad(weighted_sum(case.stats()), inputs)
    given = getattr(case, tensor).detach()
    setattr(case, tensor, layout(given).requires_grad_(getattr(case, tensor).requires_grad))
    names = [name for name in ("hidden", "weight", "bias") if getattr(case, name).requires_grad]
    found = torch.autograd.grad(weighted_sum(case.stats()), [getattr(case, name) for name in names])
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=TIGHT)


@pytest.mark.usefixtures("crossing_tiles")
def test_labels_of_int32_give_what_labels_of_int64_give():
    case = Case((300,), 668)
    case.labels[7] = -100
    expected = case.stats()
    case.labels = case.labels.int()
    assert all(torch.equal(getattr(case.stats(), name), getattr(expected, name)) for name in NAMES)


@pytest.mark.parametrize("name", ["weight", "bias"])
@pytest.mark.usefixtures("crossing_tiles")
def test_the_gradient_of_a_bfloat16_head_is_summed_in_float32(name):
    # Summed in bfloat16, 289 rows would lose every digit.
    case = Case((289,), 668, dtype=torch.bfloat16)
    single = case.double()
    for tensor in ("hidden", "weight", "bias", "ref_hidden", "ref_weight", "ref_bias"):
        setattr(single, tensor, getattr(single, tensor).float())
    gradients = []
    for each in (case, single):
        each.trainable()
        gradients.append(torch.autograd.grad(weighted_sum(each.stats()), getattr(each, name))[0])
    assert torch.equal(gradients[0], gradients[1].bfloat16())


def test_a_row_of_logits_that_are_all_forbidden_but_one_is_certain():
    weight, bias = torch.zeros(4097, 1), torch.full((4097,), -torch.inf)
    bias[4096] = 0.0
    stats = linear_logprob(torch.ones(1, 1), weight, torch.tensor([4096]), bias=bias, want=("logprob", "entropy"))
    assert (stats.logprob.item(), stats.entropy.item()) == (0.0, 0.0)
