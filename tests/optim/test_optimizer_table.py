"""Every optimizer name: it builds its class with the documented defaults, steps, and resumes bit for bit."""

import io
from importlib.util import find_spec

import pytest
import torch
from torch import nn

from hybrid.optim import known_optimizers, make_optimizer

NO_BNB = find_spec("bitsandbytes") is None
needs_bnb = pytest.mark.skipif(NO_BNB, reason="bitsandbytes is not installed")

TORCH = {
    "adamw": "AdamW",
    "adagrad": "Adagrad",
    "rmsprop": "RMSprop",
    "sgd": "SGD",
    "adafactor": "Adafactor",
}
BNB = {
    "adamw_8bit": "AdamW8bit",
    "adamw_32bit": "AdamW32bit",
    "paged_adamw_8bit": "PagedAdamW8bit",
    "paged_adamw_32bit": "PagedAdamW32bit",
    "adam_8bit": "Adam8bit",
    "adam_32bit": "Adam32bit",
    "paged_adam_8bit": "PagedAdam8bit",
    "paged_adam_32bit": "PagedAdam32bit",
    "ademamix_8bit": "AdEMAMix8bit",
    "ademamix_32bit": "AdEMAMix",  # AdEMAMix32bit raises at the first step on the CPU
    "paged_ademamix_8bit": "PagedAdEMAMix8bit",
    "paged_ademamix_32bit": "PagedAdEMAMix",
    "lion_8bit": "Lion8bit",
    "lion_32bit": "Lion32bit",
    "paged_lion_8bit": "PagedLion8bit",
    "paged_lion_32bit": "PagedLion32bit",
    "adagrad_8bit": "Adagrad8bit",
    "adagrad_32bit": "Adagrad32bit",
    "sgd_8bit": "SGD8bit",
}
REQUIRED = TORCH | BNB
SIZE = 72  # 72 x 72 elements are more than the 4096 from which bitsandbytes keeps 8 bits

names = [
    pytest.param(known.name, marks=needs_bnb if known.backend == "bitsandbytes" else ()) for known in known_optimizers()
]


def config(name):
    return {"MOMENTUM": 0.9} if name.lower().startswith("sgd_") else {}


def built(name, dtype=torch.float32, **keys):
    torch.manual_seed(0)
    weights = [nn.Parameter(torch.randn(SIZE, SIZE).to(dtype)), nn.Parameter(torch.randn(SIZE).to(dtype))]
    return weights, make_optimizer(weights, name, 1e-3, config(name) | keys)


def run(weights, optimizer, steps):
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for weight in weights:
            weight.grad = torch.randn(weight.shape, generator=generator).to(weight.dtype)
        optimizer.step()


def test_the_24_names_are_known():
    assert len(REQUIRED) == 24
    assert REQUIRED.keys() <= {known.name for known in known_optimizers()}


@pytest.mark.filterwarnings("ignore:Paged optimizers")
@pytest.mark.parametrize("name", [pytest.param(n, marks=needs_bnb if n in BNB else ()) for n in REQUIRED])
def test_a_name_builds_its_class(name):
    _, optimizer = built(name.upper())
    module = type(optimizer).__module__.partition(".")[0]
    assert type(optimizer).__name__ == REQUIRED[name]
    assert module == ("bitsandbytes" if name in BNB else "transformers" if name == "adafactor" else "torch")


@pytest.mark.filterwarnings("ignore:Paged optimizers")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", names)
def test_a_name_steps_and_resumes_bit_for_bit(name, dtype):
    weights, optimizer = built(name, dtype)
    before = [weight.detach().clone() for weight in weights]
    run(weights, optimizer, range(2))
    assert all(torch.isfinite(w).all() and not torch.equal(w, b) for w, b in zip(weights, before, strict=True))
    if "8bit" in name:
        assert optimizer.state[weights[0]]["state1"].dtype == torch.uint8
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    again, resumed = built(name, dtype)
    for weight, saved in zip(again, weights, strict=True):
        weight.data.copy_(saved.data)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    run(weights, optimizer, range(2, 5))
    run(again, resumed, range(2, 5))
    assert all(torch.equal(w, a) for w, a in zip(weights, again, strict=True))


@pytest.mark.filterwarnings("ignore:Paged optimizers")
@pytest.mark.parametrize("name", names)
def test_weight_decay_and_its_default_reach_every_name(name):
    _, optimizer = built(name)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.01]
    weights, decayed = built(name, WEIGHT_DECAY=50.0)
    others, plain = built(name, WEIGHT_DECAY=0)
    run(weights, decayed, range(2))
    run(others, plain, range(2))
    assert weights[0].norm() < others[0].norm()


@needs_bnb
@pytest.mark.parametrize("name", [k.name for k in known_optimizers() if k.name.endswith("ademamix_32bit")])
@pytest.mark.filterwarnings("ignore:Paged optimizers")
def test_ademamix_takes_its_third_beta_and_its_mix(name):
    _, optimizer = built(name, BETA3=0.99, ALPHA_MIX=2, T_ALPHA=10, T_BETA3="10")
    group = optimizer.param_groups[0]
    assert (group["betas"], group["alpha"], group["t_alpha"], group["t_beta3"]) == ((0.9, 0.999, 0.99), 2.0, 10, 10)


@pytest.mark.parametrize(
    ("name", "defaults"),
    [
        ("adamw", {"betas": (0.9, 0.999), "eps": 1e-8}),
        ("adagrad", {"initial_accumulator_value": 0.0, "lr_decay": 0.0, "eps": 1e-8}),
        ("rmsprop", {"alpha": 0.99, "eps": 1e-8, "momentum": 0.0, "centered": False}),
        ("sgd", {"momentum": 0.0, "dampening": 0.0, "nesterov": False}),
        ("adafactor", {"relative_step": False, "scale_parameter": False, "warmup_init": False, "lr": 1e-3}),
        pytest.param("lion_8bit", {"betas": (0.9, 0.999)}, marks=needs_bnb),
        pytest.param("adam_32bit", {"betas": (0.9, 0.999), "eps": 1e-8}, marks=needs_bnb),
        pytest.param("ademamix", {"betas": (0.9, 0.999, 0.9999), "alpha": 5.0, "eps": 1e-8}, marks=needs_bnb),
        pytest.param("adagrad_8bit", {"eps": 1e-8}, marks=needs_bnb),
    ],
)
def test_defaults_are_the_documented_ones(name, defaults):
    _, optimizer = built(name)
    group = optimizer.param_groups[0]
    assert {key: group[key] for key in defaults} == defaults


def test_booleans_of_the_backends_come_as_strings_too():
    assert built("sgd", NESTEROV="Yes", MOMENTUM="0.9")[1].param_groups[0]["nesterov"] is True
    assert built("rmsprop", CENTERED="t")[1].param_groups[0]["centered"] is True


def test_adafactor_moves_by_the_given_rate():
    # Its first update is g / |g| where nothing is factored: a vector moves by lr, whatever its size.
    weights, optimizer = built("adafactor", WEIGHT_DECAY=0)
    before = weights[1].detach().clone()
    run(weights, optimizer, range(1))
    assert (weights[1] - before).abs().sub(1e-3).abs().max() < 1e-6  # float32 rounding of a difference near 1


def test_adafactor_sets_its_own_rate_only_when_asked_and_says_so(caplog):
    weights, optimizer = built("adafactor", RELATIVE_STEP=True, WEIGHT_DECAY=0)
    assert optimizer.param_groups[0]["lr"] == 1e-3
    assert "lr and any scheduler are ignored" in caplog.text
    before = weights[1].detach().clone()
    run(weights, optimizer, range(1))
    assert (weights[1] - before).abs().sub(1e-2).abs().max() < 1e-6  # min(0.01, 1 / sqrt(1))


@needs_bnb
def test_adam_in_32_bits_decays_as_torch_adamw():
    weights, optimizer = built("adam_32bit", WEIGHT_DECAY=0.5)
    others, adamw = built("adamw", WEIGHT_DECAY=0.5)
    run(weights, optimizer, range(3))
    run(others, adamw, range(3))
    assert torch.allclose(weights[0], others[0], atol=1e-6)  # float32, another order of operations


def test_listings_have_every_alias_once_and_a_summary():
    rows = known_optimizers()
    listed = [name for row in rows for name in (row.name, *row.aliases)]
    assert len(listed) == len(set(listed))
    assert all(row.summary and row.backend in ("torch", "bitsandbytes", "transformers") for row in rows)
    assert next(row for row in rows if row.name == "adamw").keys == {
        "beta1": 0.9,
        "beta2": 0.999,
        "eps": 1e-8,
        "fused": True,
        "weight_decay": 0.01,
        "decay_all": False,
        "value_head_lr": None,
    }


@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_the_fused_step_is_the_plain_one(name):
    runs = []
    for fused in (True, False):
        torch.manual_seed(0)
        weight = torch.nn.Parameter(torch.randn(70, 30))
        optimizer = make_optimizer([weight], name, 1e-2, {"FUSED": fused, "WEIGHT_DECAY": 0.1})
        assert optimizer.defaults["fused"] is fused
        for step in range(5):
            weight.grad = torch.sin(weight.detach() * (step + 1))
            optimizer.step()
        runs.append(weight.detach())
    torch.testing.assert_close(*runs, rtol=0, atol=1e-6)  # float32
