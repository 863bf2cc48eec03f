"""Which side computes a call, what is refused, and that a training step is the same on both."""

import inspect
import os
import re
import subprocess
import sys
import types
import warnings
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from kernel_case import DEVICE, kernel, launcher
from tiny import tiny_examples, tiny_model, tiny_policy
from torch._subclasses.fake_tensor import FakeTensorMode

from hybrid import functional, fused
from hybrid.core import InputError
from hybrid.data import collate
from hybrid.fused import kernel_backend
from hybrid.models import Policy, Reference
from hybrid.objectives import PPOConfig, SFTConfig, ppo_batch_loss, sft_batch_loss, with_advantages
from hybrid.rewards import make_reward
from hybrid.rollout import SamplingConfig, collect

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is an extra: hybrid-trainer[triton]")
FUNCTIONS = ["gae", "linear_logprob", "token_stats"]


@pytest.fixture(autouse=True)
def nothing_asked_yet(monkeypatch):
    """Each test finds the process as it starts."""
    monkeypatch.delenv("HYBRID_KERNELS", raising=False)
    monkeypatch.setattr(fused, "_missing", fused._NOT_ASKED)
    monkeypatch.setattr(fused, "_warned", False)


@pytest.fixture
def kernels(monkeypatch):
    """A stand-in for hybrid_kernels: each function returns its own arguments, as a kernel its statistics."""

    def stats(*args, **kwargs):
        return types.SimpleNamespace(logprob=args, entropy=kwargs, kl=None)

    module = types.ModuleType("hybrid_kernels")
    module.gae, module.linear_logprob, module.token_stats = (lambda *args, **kwargs: (args, kwargs)), stats, stats
    monkeypatch.setitem(sys.modules, "hybrid_kernels", module)
    return module


@pytest.fixture
def no_kernels(monkeypatch):
    """None in sys.modules makes the import fail as if nothing were installed."""
    monkeypatch.setitem(sys.modules, "hybrid_kernels", None)


def on(device, *shapes, dtype=torch.float32):
    """Tensors of a device that need not exist."""
    with FakeTensorMode():
        return [torch.empty(shape, dtype=dtype, device=device) for shape in shapes]


def arguments(name, device, dtype=torch.float32):
    if name == "gae":
        return on(device, (2, 3), (2, 3), (2, 3), dtype=dtype)
    if name == "token_stats":
        return [*on(device, (2, 7), dtype=dtype), *on(device, (2,), dtype=torch.int64)]
    return [*on(device, (2, 5), (7, 5), dtype=dtype), *on(device, (2,), dtype=torch.int64)]


def cpu_arguments(name, dtype):
    generator = torch.Generator().manual_seed(0)
    shapes = {"gae": [(2, 3), (2, 3)], "linear_logprob": [(2, 5), (7, 5)], "token_stats": [(2, 7)]}[name]
    floats = [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]
    return [*floats, torch.ones(2, 3) if name == "gae" else torch.tensor([1, 4])]


def test_the_default_on_a_cpu_is_torch(kernels):
    assert kernel_backend("cpu") == kernel_backend(torch.device("cpu")) == "torch"


@pytest.mark.parametrize("device", ["mps", "xpu", "meta"])
def test_no_other_device_than_a_gpu_of_cuda_or_rocm_takes_triton(kernels, device):
    assert kernel_backend(device) == "torch"


@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_a_gpu_takes_triton_where_it_can_be_imported(kernels, device):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert kernel_backend(device) == "triton"


def test_a_gpu_without_triton_takes_torch_and_warns_once_how_to_install_it(no_kernels):
    with pytest.warns(UserWarning, match=r"pip install 'hybrid-trainer\[triton\]'") as record:
        assert [kernel_backend("cuda") for _ in range(3)] == ["torch"] * 3
    assert len(record) == 1


@pytest.mark.parametrize("device", ["cpu", "mps"])
def test_nothing_is_imported_and_nothing_said_where_there_is_no_gpu(no_kernels, device):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert kernel_backend(device) == "torch"
    assert fused._missing == fused._NOT_ASKED


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_torch_is_forced_everywhere(kernels, monkeypatch, device):
    monkeypatch.setenv("HYBRID_KERNELS", "torch")
    assert kernel_backend(device) == "torch"


def test_the_variable_is_read_at_every_call(kernels, monkeypatch):
    assert kernel_backend("cuda") == "triton"
    monkeypatch.setenv("HYBRID_KERNELS", "torch")
    assert kernel_backend("cuda") == "torch"
    monkeypatch.setenv("HYBRID_KERNELS", "auto")
    assert kernel_backend("cuda") == "triton"


@pytest.mark.parametrize("value", ["", "Triton", "cuda", "1"])
def test_another_value_is_refused_with_the_allowed_ones(monkeypatch, value):
    monkeypatch.setenv("HYBRID_KERNELS", value)
    with pytest.raises(InputError, match=f"must be auto, torch or triton, got '{value}'"):
        fused.gae(torch.zeros(1, 2), torch.zeros(1, 2), torch.ones(1, 2))


def test_triton_forced_on_a_cpu_needs_the_interpreter(kernels, monkeypatch):
    monkeypatch.setenv("HYBRID_KERNELS", "triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(InputError, match="TRITON_INTERPRET=1"):
        kernel_backend("cpu")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert kernel_backend("cpu") == "triton"


def test_triton_forced_on_a_device_it_has_no_way_to_is_refused(kernels, monkeypatch):
    monkeypatch.setenv("HYBRID_KERNELS", "triton")
    with pytest.raises(InputError, match="on mps"):
        kernel_backend("mps")


def test_triton_forced_without_triton_is_refused_with_the_way_to_install_it(no_kernels, monkeypatch):
    monkeypatch.setenv("HYBRID_KERNELS", "triton")
    with pytest.raises(InputError, match=r"pip install 'hybrid-trainer\[triton\]'"):
        kernel_backend("cuda")


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_call_with_gpu_tensors_reaches_the_kernel_with_its_arguments_untouched(kernels, name, dtype):
    given = arguments(name, "cuda", dtype)
    args, kwargs = passed(name, getattr(fused, name)(*given, unknown=1))
    assert all(a is b for a, b in zip(args, given, strict=True)) and kwargs == {"unknown": 1}


def passed(name, result):
    """What the stand-in was called with."""
    if name == "gae":
        return result
    assert isinstance(result, functional.TokenStats)
    return result.logprob, result.entropy


def test_arguments_given_by_name_reach_the_kernel_too(kernels):
    reward, value, mask = arguments("gae", "cuda")
    assert fused.gae(reward=reward, value=value, mask=mask)[1].keys() == {"reward", "value", "mask"}


def test_float64_goes_to_the_kernel_of_gae(kernels):
    given = arguments("gae", "cuda", torch.float64)
    assert fused.gae(*given)[0][0] is given[0]


@pytest.mark.parametrize("name", ["linear_logprob", "token_stats"])
def test_float64_of_the_head_goes_to_the_definition(kernels, monkeypatch, name):
    monkeypatch.setenv("HYBRID_KERNELS", "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    given = cpu_arguments(name, torch.float64)
    assert torch.equal(getattr(fused, name)(*given).logprob, getattr(functional, name)(*given).logprob)
    assert isinstance(getattr(fused, name)(*cpu_arguments(name, torch.float32)).logprob, tuple)  # the stand-in's


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_dtensor_is_refused_on_every_device(kernels, name, device):
    given = arguments(name, device)
    given[1].device_mesh = None  # what tells a DTensor apart without importing torch.distributed
    with pytest.raises(TypeError, match=rf"{name}: a DTensor .* full_tensor"):
        getattr(fused, name)(*given)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_has_the_signature_and_the_docstring_of_its_definition(name):
    ours, definition = getattr(fused, name), getattr(functional, name)
    assert inspect.signature(ours) == inspect.signature(definition)
    assert ours.__doc__ == definition.__doc__ and ours.__name__ == name


@needs_triton
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_kernel_takes_the_arguments_of_its_definition(name):
    import hybrid_kernels

    def arguments(function):
        return [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()]

    assert arguments(getattr(hybrid_kernels, name)) == arguments(getattr(functional, name))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_cpu_call_is_the_definition(kernels, name):
    given = cpu_arguments(name, torch.float32)
    ours, theirs = getattr(fused, name)(*given), getattr(functional, name)(*given)
    if name != "gae":
        ours, theirs = [ours.logprob], [theirs.logprob]
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_the_rule_breaks_no_graph_under_compile(kernels):
    torch._dynamo.reset()
    case = torch.randn(2, 5), torch.randn(2, 5), torch.ones(2, 5)
    whole = torch.compile(lambda *case: fused.gae(*case)[0] * 2, fullgraph=True, backend="eager")
    torch.testing.assert_close(whole(*case), functional.gae(*case)[0] * 2)


@launcher
@needs_triton
@pytest.mark.slow
def test_in_the_interpreter_the_steps_below_are_the_same():
    options = ["-k", "both_sides", "-p", "no:cacheprovider", "-W", "ignore::RuntimeWarning"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", __file__, *options],
        cwd=Path(__file__).parents[1],
        env=os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"\b3 passed", done.stdout), f"the steps did not run: {done.stdout}"


# float32 through a tiny model: both sides sum the same terms in another order.
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


def both_sides(monkeypatch, compute):
    """`compute()` under torch and under Triton, and a look at whether the kernels took part."""
    import hybrid_kernels

    results, calls = [], []
    for name in ("linear_logprob", "gae"):
        monkeypatch.setattr(hybrid_kernels, name, counted(getattr(hybrid_kernels, name), calls))
    for mode in ("torch", "triton"):
        monkeypatch.setenv("HYBRID_KERNELS", mode)
        results.append(compute())
        assert bool(calls) == (mode == "triton")
    return results


def counted(function, calls):
    def wrapper(*args, **kwargs):
        calls.append(function)
        return function(*args, **kwargs)

    return wrapper


def loss_and_gradients(policy, loss):
    policy.zero_grad()
    loss.backward()
    return {"loss": loss.detach()} | {
        name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None
    }


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, x in ours.items():
        torch.testing.assert_close(x, theirs[name], msg=lambda text, name=name: f"{name}: {text}", **CLOSE)


@kernel
@needs_triton
@pytest.mark.parametrize("family", ["llama", "gptj"])  # without and with a bias in the head
def test_an_sft_step_is_the_same_on_both_sides(monkeypatch, family):
    policy = tiny_policy(family).to(DEVICE)
    batch = collate(tiny_examples(7, 3, 12, seed=1), pad_id=0).to(DEVICE)
    torch_side, triton_side = both_sides(
        monkeypatch, lambda: loss_and_gradients(policy, sft_batch_loss(policy, batch, SFTConfig())[0])
    )
    assert_same(triton_side, torch_side)


@kernel
@needs_triton
def test_a_rollout_and_its_ppo_step_are_the_same_on_both_sides(monkeypatch, tokenizer):
    policy = tiny_policy().to(DEVICE)
    reference = Reference.from_policy(Policy(tiny_model("llama", seed=1)), device=DEVICE)
    config = PPOConfig(batch_size=4, minibatch_size=4, entropy_coef=0.01)

    def compute():
        rollout = collect(
            policy, [reference], make_reward(lambda response: float(len(response))), tiny_examples(5, 3, 4, 6, seed=1),
            tokenizer=tokenizer, sampling=SamplingConfig(max_new_tokens=12, temperature=1.3), kl_coef=0.1,
            kl_kind="full", generator=torch.Generator(DEVICE).manual_seed(1),
        )  # fmt: skip
        rollout = with_advantages(rollout, config)
        tensors = {name: getattr(rollout, name) for name in ROLLOUT}
        # Off the ratio of 1, so that clipping has a part in the gradient.
        with torch.no_grad():
            rollout.old_logprob.add_(0.3 * rollout.mask)
        return tensors | loss_and_gradients(policy, ppo_batch_loss(policy, rollout, config)[0])

    torch_side, triton_side = both_sides(monkeypatch, compute)
    assert_same(triton_side, torch_side)


ROLLOUT = ["old_logprob", "entropy", "kl", "ref_logprob", "reward", "advantage", "return_"]
