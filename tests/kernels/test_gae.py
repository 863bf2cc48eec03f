"""The GAE kernel against a loop in float64, in the interpreter or on a GPU, and compiled for every architecture."""

import importlib
import math
import os
import re
import subprocess
import tempfile
from pathlib import Path

import pytest
import torch
from kernel_case import DEVICE, kernel, launcher, on_gpu, run_interpreted

from hybrid.functional import gae as definition

triton = pytest.importorskip("triton", reason="Triton is an extra: pip install 'hybrid-trainer[triton]'")

# By its name in sys.modules: as an attribute, hybrid_kernels.gae is the function.
module = importlib.import_module("hybrid_kernels.gae")
gae = module.gae

# float64, rewards and values of order 1, at most 300 terms: rounding stays far below this. A gamma that was
# rounded to float32 on its way is 1e-8 off and fails.
TIGHT = {"rtol": 0, "atol": 1e-11}
# float32: 65 terms of order 1, a scan adds and multiplies each a few times at 6e-8.
FLOAT32 = {"rtol": 0, "atol": 2e-5}


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of 16 tokens, so that short rows are many blocks; the interpreter takes 60 us a token."""
    monkeypatch.setattr(module, "BLOCK", 16)


def random_case(rows, length, seed=0):
    generator = torch.Generator().manual_seed(seed)
    reward, value = torch.randn(2, rows, length, generator=generator, dtype=torch.float64)
    mask = torch.rand(rows, length, generator=generator) < 0.7
    return reward.to(DEVICE), value.to(DEVICE), mask.to(DEVICE)


def by_loop(reward, value, mask, gamma, lam):
    """Advantage and return by the recursion, token by token from the last one back, over python floats."""
    reward, value, mask = reward.tolist(), value.tolist(), mask.tolist()
    advantage, return_ = [[0.0] * len(row) for row in mask], [[0.0] * len(row) for row in mask]
    for b, row in enumerate(mask):
        next_value = next_advantage = 0.0
        for t in reversed(range(len(row))):
            if row[t]:
                delta = reward[b][t] + gamma * next_value - value[b][t]
                next_value, next_advantage = value[b][t], delta + gamma * lam * next_advantage
                advantage[b][t], return_[b][t] = next_advantage, next_advantage + next_value
    return [torch.tensor(x, dtype=torch.float64, device=DEVICE) for x in (advantage, return_)]


def assert_same(given, expected, **tolerance):
    for name, a, b in zip(("advantage", "return"), given, expected, strict=True):
        torch.testing.assert_close(a, b, msg=lambda text, name=name: f"{name}: {text}", **tolerance)


@launcher
@pytest.mark.slow
def test_the_interpreted_cases_pass_in_a_process_of_their_own():
    run_interpreted(__file__, at_least=59)


@kernel
@pytest.mark.parametrize("length", [1, 2, 5, 15, 16, 17, 31, 32, 33, 65, 289])
def test_it_equals_the_recursion_at_every_length_around_a_block(small_blocks, length):
    case = random_case(2, length)
    assert_same(gae(*case, gamma=0.99, lam=0.95), by_loop(*case, 0.99, 0.95), **TIGHT)


@kernel
@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.8), (1.0, 1.0), (0.5, 0.0), (0.0, 1.0), (0.0, 0.0)])
def test_it_equals_the_recursion_and_the_definition_at_every_corner_of_gamma_and_lambda(small_blocks, gamma, lam):
    case = random_case(3, 37)
    result = gae(*case, gamma=gamma, lam=lam)
    assert_same(result, by_loop(*case, gamma, lam), **TIGHT)
    assert_same(result, definition(*case, gamma=gamma, lam=lam), **TIGHT)


@kernel
def test_the_defaults_are_those_of_the_definition(small_blocks):
    case = random_case(2, 9)
    assert_same(gae(*case), definition(*case), **TIGHT)


@kernel
def test_the_shipped_block_carries_its_state_too():
    case = random_case(1, module.BLOCK + 1)
    # 1025 terms instead of 300.
    assert_same(gae(*case, lam=1.0), by_loop(*case, 1.0, 1.0), rtol=0, atol=1e-10)


@kernel
@pytest.mark.slow
def test_a_row_of_100_000_tokens_equals_the_recursion():
    case = random_case(1, 100_000)
    assert_same(gae(*case, gamma=0.999, lam=0.99), by_loop(*case, 0.999, 0.99), rtol=0, atol=1e-10)


@kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64])
@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.int64, torch.float32])
def test_other_dtypes_are_computed_in_float32(small_blocks, dtype, mask_dtype):
    reward, value, mask = random_case(2, 65)
    reward, value = reward.to(dtype), value.to(dtype)
    expected = by_loop(reward.double(), value.double(), mask, 1.0, 0.95)
    result = gae(reward, value, mask.to(mask_dtype))
    assert result[0].dtype == result[1].dtype == torch.float32
    assert_same([x.double() for x in result], expected, **FLOAT32)


@kernel
@pytest.mark.parametrize("double", [0, 1], ids=["reward", "value"])
def test_one_float64_input_makes_the_result_float64(small_blocks, double):
    reward, value, mask = random_case(1, 20)
    given = [x if i == double else x.float() for i, x in enumerate((reward, value))]
    assert_same(gae(*given, mask), by_loop(given[0].double(), given[1].double(), mask, 1.0, 0.95), **TIGHT)


@kernel
def test_inputs_of_any_strides_are_read_where_they_lie(small_blocks):
    reward, value, mask = random_case(3, 33)
    wide = torch.full((3, 70), math.nan, dtype=torch.float64, device=DEVICE)
    wide[:, 1:67:2] = reward
    one_value = value[:1].expand(3, 33)  # stride 0
    columns = mask.T.contiguous().T
    assert_same(gae(wide[:, 1:67:2], one_value, columns), by_loop(reward, one_value, mask, 1.0, 0.95), **TIGHT)


@kernel
def test_what_stands_outside_the_mask_is_not_read(small_blocks):
    reward, value, mask = random_case(2, 40)
    clean = gae(reward, value, mask)
    for poison in (math.nan, math.inf):
        poisoned = gae(reward.masked_fill(~mask, poison), value.masked_fill(~mask, poison), mask)
        assert_same(poisoned, clean, rtol=0, atol=0)


@kernel
def test_holes_at_the_ends_and_over_whole_blocks_are_skipped(small_blocks):
    reward, value, mask = random_case(2, 80)
    mask[:, :3], mask[:, 20:60], mask[:, 77:] = False, False, False
    mask[1] = False
    result = gae(reward, value, mask)
    assert_same(result, by_loop(reward, value, mask, 1.0, 0.95), **TIGHT)
    assert not any(x[~mask].any() for x in result)


@kernel
@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0)])
def test_no_rows_or_no_tokens_give_an_empty_result(shape):
    result = gae(*torch.zeros(2, *shape, device=DEVICE), torch.ones(shape, device=DEVICE))
    assert [x.shape for x in result] == [shape, shape]


@kernel
def test_a_row_is_the_same_bits_alone_and_in_a_batch(small_blocks):
    reward, value, mask = random_case(3, 40)
    reward, value = reward.float(), value.float()
    alone = [gae(reward[b : b + 1], value[b : b + 1], mask[b : b + 1]) for b in range(3)]
    assert_same(gae(reward, value, mask), [torch.cat(x) for x in zip(*alone, strict=True)], rtol=0, atol=0)


@kernel
def test_no_gradient_flows_and_the_inputs_stay_as_they_were(small_blocks):
    reward, value, mask = random_case(1, 20)
    before = reward.clone(), value.clone(), mask.clone()
    result = gae(reward.requires_grad_(), value.requires_grad_(), mask)
    assert not result[0].requires_grad and not result[1].requires_grad
    assert all(torch.equal(a, b) for a, b in zip(before, (reward, value, mask), strict=True))


@kernel
@pytest.mark.parametrize(
    "context", [torch.no_grad, torch.inference_mode, lambda: torch.autocast(DEVICE.type, torch.bfloat16)]
)
def test_it_is_the_same_under_no_grad_inference_mode_and_autocast(small_blocks, context):
    case = random_case(1, 20)
    plain = gae(*case)
    with context():
        assert_same(gae(*case), plain, rtol=0, atol=0)


@kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_operator_passes_opcheck(small_blocks, dtype):
    reward, value, mask = random_case(2, 5)
    torch.library.opcheck(torch.ops.hybrid_kernels.gae.default, (reward.to(dtype), value.to(dtype), mask, 0.9, 0.8))


@kernel
def test_it_compiles_into_one_graph_of_any_length(small_blocks):
    torch._dynamo.reset()
    whole = torch.compile(lambda *case: gae(*case, gamma=0.9)[0] * 2, fullgraph=True, dynamic=True, backend="aot_eager")
    for length in (5, 20, 33):
        case = random_case(2, length)
        torch.testing.assert_close(whole(*case), by_loop(*case, 0.9, 0.95)[0] * 2, **TIGHT)


@pytest.mark.parametrize("wrong", [0, 1, 2], ids=["reward", "value", "mask"])
def test_different_shapes_are_refused(wrong):
    with pytest.raises(ValueError, match=r"\(2, 4\)"):
        gae(*(torch.zeros(2, 4 if i == wrong else 3) for i in range(3)))


def test_a_single_row_without_its_batch_dimension_is_refused():
    with pytest.raises(ValueError, match=r"\(B, T\)"):
        gae(torch.zeros(3), torch.zeros(3), torch.ones(3))


@pytest.mark.parametrize("name", ["gamma", "lam"])
@pytest.mark.parametrize("number", [-0.1, 1.1, math.nan])
def test_gamma_and_lambda_outside_zero_to_one_are_refused(name, number):
    with pytest.raises(ValueError, match=name):
        gae(torch.zeros(1, 2), torch.zeros(1, 2), torch.ones(1, 2), **{name: number})


def test_a_dtensor_is_refused_by_name():
    class Sharded(torch.Tensor):
        device_mesh = None  # what tells a DTensor apart without importing torch.distributed

    with pytest.raises(TypeError, match="value is a DTensor"):
        gae(torch.zeros(1, 2), torch.zeros(1, 2).as_subclass(Sharded), torch.ones(1, 2))


@launcher
def test_cpu_tensors_without_the_interpreter_are_refused():
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"):
        gae(torch.zeros(1, 2), torch.zeros(1, 2), torch.ones(1, 2))


@launcher
def test_no_size_makes_a_variant():
    parameters = {p.name: p for p in module.gae_kernel.params}
    assert all(parameters[name].do_not_specialize for name in module.SIZES)
    assert {name for name, parameter in parameters.items() if parameter.is_constexpr} == {"DTYPE", "BLOCK"}


@pytest.mark.parametrize("number", [0.0, 1.0, 0.95, 0.99, 1e-3, 1 / 3])
def test_a_coefficient_passed_as_two_float32_numbers_keeps_48_bits(number):
    high, low = torch.tensor(module._halves(number), dtype=torch.float32).tolist()
    assert abs(high + low - number) <= 2**-48 * number


TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}


@launcher
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("element", "result"), [("fp32", "fp32"), ("bf16", "fp32"), ("fp64", "fp64")])
def test_it_compiles_ahead_of_time_without_a_spill(target, element, result):
    assert spilled_bytes(compiled_for(target, element, result), target) == 0


def compiled_for(target, element, result):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if target == "gfx942" and triton.__version__.startswith("3.3."):
        pytest.skip("Triton 3.3 needs ROCm's linker to compile for AMD")
    pointers = {
        "reward_ptr": element,
        "value_ptr": element,
        "mask_ptr": "i1",
        "advantage_ptr": result,
        "return_ptr": result,
    }
    signature = {
        **{name: f"*{kind}" for name, kind in pointers.items()},
        **dict.fromkeys(module.SIZES, "i32"),
        **dict.fromkeys(("lam_high", "lam_low", "rest_high", "rest_low"), "fp32"),
        **dict.fromkeys(("DTYPE", "BLOCK"), "constexpr"),
    }
    dtype = triton.language.float64 if result == "fp64" else triton.language.float32
    source = ASTSource(module.gae_kernel, signature, {"DTYPE": dtype, "BLOCK": module.BLOCK}, {})
    return triton.compile(source, target=GPUTarget(*TARGETS[target]), options=module.OPTIONS).asm


def spilled_bytes(asm, target):
    """Registers (AMD) or bytes (NVIDIA) that the assembler had to keep in memory."""
    if target.startswith("gfx"):
        counts = re.findall(r"\.[sv]gpr_spill_count:\s+(\d+)", asm["amdgcn"])
    else:
        done = assembled(asm["ptx"], target)
        assert done.returncode == 0, done.stderr
        counts = re.findall(r"(\d+) bytes spill", done.stderr)
    assert counts, f"{target}: no count of spills found"
    return sum(map(int, counts))


def assembled(ptx, target):
    """What Triton's own assembler says, verbosely; the newer of the two where the older cannot read the PTX."""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    names = ["ptxas-blackwell"] if target == "sm_100" else ["ptxas", "ptxas-blackwell"]
    architecture = re.search(r"^\.target (\w+)", ptx, re.MULTILINE).group(1)
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        for tool in (tools / name for name in names if (tools / name).exists()):
            command = [tool, "-v", f"--gpu-name={architecture}", "-o", os.devnull, file.name]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode == 0:
                break
    return done


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("length", [1, 48, 1023, 1024, 1025, 100_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_on_a_gpu_it_equals_the_definition_without_waiting_for_the_gpu(length, dtype):
    reward, value, mask = random_case(4, length)
    given = reward.to(dtype), value.to(dtype), mask
    torch.cuda.set_sync_debug_mode("error")
    try:
        result = gae(*given, gamma=0.999)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    # float32: sums over the 20 tokens or so that lam = 0.95 remembers.
    tolerance = FLOAT32 if dtype == torch.float32 else TIGHT
    assert_same([x.double() for x in result], definition(reward, value, mask, gamma=0.999), **tolerance)


@pytest.mark.gpu
@on_gpu
def test_on_a_gpu_64_shapes_make_one_variant():
    def variants():
        return len(module.gae_kernel.device_caches[torch.cuda.current_device()][0])

    before = variants()
    for length in range(1, 65):
        gae(*torch.ones(3, length, 3 * length, device=DEVICE))
    assert variants() - before <= 1
