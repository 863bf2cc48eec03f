"""Every shipped configuration of the logit kernels compiles for every architecture, without a GPU: no register
spills, and the inner loop loads 16 bytes a thread, also where an odd vocabulary starts rows anywhere."""

import os
import re
import subprocess

import pytest
import torch
from kernel_case import launcher

triton = pytest.importorskip("triton", reason="Triton is an extra: pip install 'hybrid-trainer[triton]'")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from hybrid_kernels.configs import VECTOR, shipped_configs  # noqa: E402
from hybrid_kernels.epilogue import backward_kernel, forward_kernel  # noqa: E402

pytestmark = [launcher, pytest.mark.slow]

KERNELS = {"forward": forward_kernel, "backward": backward_kernel}
FLAGS = {
    "logprob": {"LOGPROB"},
    "logprob and entropy": {"LOGPROB", "ENTROPY"},
    "with kl": {"LOGPROB", "ENTROPY", "KL"},
    "everything": {"LOGPROB", "ENTROPY", "KL", "SOFTCAP", "BIAS", "REF_BIAS"},
}
CASES = [
    pytest.param(kernel, *target, config, id=f"{kernel} {target[0]}{target[1] or ''} {config.lanes}/{config.num_warps}")
    for kernel in KERNELS
    for target, table in shipped_configs(kernel).items()
    for config in table
]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """A compiled kernel in the user's cache would hide a broken one."""
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))


def compiled(name, backend, arch, config, dtype, flags, *, align=VECTOR, aligned_base=True):
    """A kernel as the launcher calls it; `aligned_base`: Triton saw that all pointers are multiples of 16 bytes."""
    kernel = KERNELS[name]
    signature, constants, hints = {}, {}, {}
    for i, argument in enumerate(kernel.arg_names):
        if argument.isupper():
            sizes = {"ALIGN": align, "LANES": config.lanes, "WIDTH": config.width}
            signature[argument], constants[(i,)] = "constexpr", sizes.get(argument, argument in flags)
        elif argument == "labels_ptr":
            signature[argument] = "*i64"
        elif argument in ("logits_ptr", "ref_ptr", "bias_ptr", "ref_bias_ptr", "grad_ptr"):
            signature[argument] = f"*{dtype}"
        elif argument.endswith("_ptr"):
            signature[argument] = "*fp32"
        else:
            signature[argument] = "fp32" if argument in ("temperature", "softcap") else "i32"
        if argument.endswith("_ptr") and aligned_base:
            hints[(i,)] = [["tt.divisibility", 16]]
    target = GPUTarget("cuda", arch, 32) if backend == "cuda" else GPUTarget("hip", "gfx942", 64)
    source = ASTSource(kernel, signature, constants, hints)
    return triton.compile(source, target=target, options={"num_warps": config.num_warps})


def spilled(result, backend, arch, tmp_path) -> int:
    """Bytes or registers that went to memory."""
    if backend == "hip":
        return sum(int(n) for n in re.findall(r"\.[sv]gpr_spill_count:\s*(\d+)", result.asm["amdgcn"]))
    from triton.backends.nvidia.compiler import get_ptxas

    path = tmp_path / "kernel.ptx"
    path.write_text(result.asm["ptx"])
    command = [
        get_ptxas(arch).path,
        "-v",
        f"--gpu-name=sm_{arch}{'a' if arch >= 90 else ''}",
        str(path),
        "-o",
        os.devnull,
    ]
    report = subprocess.run(command, capture_output=True, text=True, check=True)
    numbers = re.findall(r"(\d+) bytes spill", report.stderr + report.stdout)
    assert numbers, f"ptxas reported nothing: {report.stderr}"
    return sum(map(int, numbers))


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("flags", FLAGS.values(), ids=FLAGS)
@pytest.mark.parametrize(("name", "backend", "arch", "config"), CASES)
def test_it_compiles_without_a_spill(name, backend, arch, config, flags, dtype, tmp_path):
    assert spilled(compiled(name, backend, arch, config, dtype, flags), backend, arch, tmp_path) == 0


@pytest.mark.parametrize(("name", "backend", "arch", "config"), CASES)
def test_float16_and_rows_that_share_no_alignment_compile_too(name, backend, arch, config, tmp_path):
    result = compiled(name, backend, arch, config, "fp16", FLAGS["with kl"], align=1, aligned_base=False)
    assert spilled(result, backend, arch, tmp_path) == 0


def inner_loop(ptx: str) -> str:
    """The block with unconditional loads: that without edges."""
    blocks = [block for block in re.split(r"^\$L__BB", ptx, flags=re.M) if re.search(r"^\s+ld\.global", block, re.M)]
    loops = [block for block in blocks if "ex2" in block and not re.search(r"@%p\d+ ld\.global", block)]
    assert len(loops) == 1, f"{len(loops)} inner loops"
    return loops[0]


# The row start is data here, so that one build serves V = 128256 and 50257; also from a misaligned base.
@pytest.mark.parametrize("aligned_base", [True, False], ids=["", "misaligned base"])
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize(("name", "backend", "arch", "config"), [c for c in CASES if "cuda" in c.id])
def test_the_inner_loop_loads_and_stores_16_bytes_a_thread(name, backend, arch, config, dtype, aligned_base):
    ptx = compiled(name, backend, arch, config, dtype, FLAGS["with kl"], aligned_base=aligned_base).asm["ptx"]
    accesses = re.findall(r"^\s+(?:@\S+ )?((?:ld|st)\.global\S*)", inner_loop(ptx), re.M)
    assert accesses and all(re.search(r"v4\.[bfu]32|v2\.[bu]64|v8\.b32", access) for access in accesses), accesses
    assert any(access.startswith("st") for access in accesses) == (name == "backward")


@pytest.mark.skipif(torch.version.hip is not None, reason="asks for a CUDA build")
def test_an_unlisted_gpu_gets_the_newest_older_configuration(monkeypatch):
    from hybrid_kernels import configs

    for capability, arch in {(7, 5): 80, (8, 9): 80, (9, 0): 90, (12, 0): 100}.items():
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index, capability=capability: capability)
        configs._table.cache_clear()
        found = tuple(configs.config_for("backward", columns, torch.device("cuda", 0)) for columns in (2048, 50_257))
        assert found == shipped_configs("backward")["cuda", arch]
    configs._table.cache_clear()
