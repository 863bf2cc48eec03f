"""What the tests of the Triton kernels share: where they run, a float64 oracle, and their input.

TRITON_INTERPRET is read when triton is imported, so each file's cases run in a process of their own, which its first
test starts. Where there is a GPU, the same cases run on it as well, compiled.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
GPU = torch.cuda.is_available() and not INTERPRETED
DEVICE = torch.device("cuda" if GPU else "cpu")

# A case of a kernel: in the interpreter or on a GPU.
kernel = pytest.mark.skipif(not (INTERPRETED or GPU), reason="runs in the interpreter's own process, or on a GPU")
launcher = pytest.mark.skipif(INTERPRETED, reason="this is the interpreter's process")
on_gpu = pytest.mark.skipif(not GPU, reason="needs a GPU")

IGNORE = -100
INF = float("inf")
NAMES = ("logprob", "entropy", "kl")
ALL = {"want": NAMES}
# Statistics of order 10 in float32, a few roundings each.
RESULT = {"rtol": 2e-6, "atol": 1e-5}
# Of a gradient of order 1, by the dtype it is written in; the interpreter truncates bfloat16 instead of rounding it.
GRADIENT = {
    torch.float32: {"rtol": 1e-5, "atol": 1e-5},
    torch.bfloat16: {"rtol": 2**-7, "atol": 1e-5},
    torch.float16: {"rtol": 2**-10, "atol": 1e-5},
}


def run_interpreted(file: str, *, at_least: int) -> None:
    """Run a test file with TRITON_INTERPRET=1, and insist that its cases were not skipped."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", file, "-p", "no:cacheprovider", "-W", "ignore::RuntimeWarning"],
        cwd=Path(__file__).parents[1],
        env=os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed and int(passed[1]) >= at_least, f"the cases did not run: {done.stdout}"


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(shape, generator=generator)).to(dtype).to(DEVICE)


def some_labels(shape: tuple[int, ...], vocab: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    """Labels that include the first and the last token where there is room."""
    labels = torch.randint(vocab, shape, generator=torch.Generator().manual_seed(1), dtype=dtype).flatten()
    labels[:1], labels[1:2] = vocab - 1, 0
    return labels.view(shape).to(DEVICE)


def oracle(logits, labels, ref_logits=None, *, temperature=1.0, softcap=None) -> dict[str, torch.Tensor]:
    """The three statistics by their formulas in float64, differentiable; 0 in ignored rows, whatever they hold."""
    ignored = labels == IGNORE

    def log_softmax(z):
        z = z.double().masked_fill(ignored[..., None], 0.0)
        z = z if softcap is None else softcap * torch.tanh(z / softcap)
        z = z / temperature
        return z - torch.logsumexp(z, -1, keepdim=True)

    logp = log_softmax(logits)
    p = logp.exp()
    label = labels.long().masked_fill(ignored, 0)[..., None]
    results = {
        "logprob": logp.gather(-1, label)[..., 0],
        "entropy": -(p * logp.masked_fill(p == 0, 0.0)).sum(-1),
    }
    if ref_logits is not None:
        results["kl"] = (p * (logp - log_softmax(ref_logits)).masked_fill(p == 0, 0.0)).sum(-1)
    return {name: x.masked_fill(ignored, 0.0) for name, x in results.items()}


def weighted(stats, seed: int = 2) -> torch.Tensor:
    """A scalar with a different random factor on every entry of every result."""
    named = stats if isinstance(stats, dict) else {n: x for n, x in stats._asdict().items() if x is not None}
    return sum((normal(*x.shape, seed=seed + i).to(x.dtype) * x).sum() for i, x in enumerate(named.values()))


def assert_results(stats, expected: dict[str, torch.Tensor], **tolerance) -> None:
    for name, x in expected.items():
        found = getattr(stats, name)
        assert found.dtype == torch.float32
        torch.testing.assert_close(
            found.double(), x.detach(), msg=lambda text, name=name: f"{name}: {text}", **(tolerance or RESULT)
        )


# Of a gradient that sums V or N terms of order 1. Short dtypes: dlogits are rounded once and the products again.
LINEAR_GRADIENT = {torch.float32: 2e-5, torch.bfloat16: 2**-6, torch.float16: 2**-9}


class LinearCase:
    """Inputs of one call. A reference of another width, unless it shares the head."""

    def __init__(self, shape=(3,), vocab=600, bias=False, ref=True, share=False, dtype=torch.float32, **options):
        self.options = options
        self.labels = some_labels(shape, vocab)
        self.inputs = {"hidden": normal(*shape, 8, dtype=dtype), "weight": normal(vocab, 8, seed=1, dtype=dtype)}
        if bias:
            self.inputs["bias"] = normal(vocab, seed=2, dtype=dtype)
        self.ref = {}
        if ref:
            width = 8 if share else 12
            self.ref["ref_hidden"] = normal(*shape, width, seed=3, dtype=dtype)
            self.ref["ref_weight"] = self.inputs["weight"] if share else normal(vocab, width, seed=4, dtype=dtype)
            if bias:
                self.ref["ref_bias"] = normal(vocab, seed=5, dtype=dtype)

    def require(self, *names):
        for name in names or tuple(self.inputs):
            self.inputs[name] = self.inputs[name].detach().requires_grad_()
        return [x for x in self.inputs.values() if x.requires_grad]

    def stats(self, **changes):
        names = NAMES if self.ref else NAMES[:2]
        from hybrid_kernels import linear_logprob

        return linear_logprob(labels=self.labels, **({"want": names} | self.inputs | self.ref | self.options | changes))

    def exact(self, autocast=None):
        """The oracle's results, and its leaves in the order of the inputs: under autocast the rounded operands."""

        def taken(name, x):
            return (x if autocast is None or name.endswith("bias") else x.to(autocast)).detach().double()

        leaves = {name: taken(name, x).requires_grad_() for name, x in self.inputs.items()}
        ref = {name: taken(name, x) for name, x in self.ref.items()}
        # An ignored row may hold anything.
        clean = (self.labels != IGNORE)[..., None]
        logits = torch.where(clean, leaves["hidden"], 0.0) @ leaves["weight"].T
        logits = logits + leaves["bias"] if "bias" in leaves else logits
        ref_logits = None
        if ref:
            ref_logits = torch.where(clean, ref["ref_hidden"], 0.0) @ ref["ref_weight"].T
            ref_logits = ref_logits + ref["ref_bias"] if "ref_bias" in ref else ref_logits
        return oracle(logits, self.labels, ref_logits, **self.options), list(leaves.values())

    def compare(self, autocast=None):
        """Against the oracle. The backward pass runs outside autocast, as PyTorch asks for."""
        inputs = self.require()
        with autocast_to(autocast):
            stats = self.stats()
        found = torch.autograd.grad(weighted(stats), inputs)
        expected, leaves = self.exact(autocast)
        assert_results(stats, expected)
        assert_gradients(found, torch.autograd.grad(weighted(expected), leaves), inputs, autocast)


def autocast_to(dtype):
    return torch.autocast(DEVICE.type, dtype, enabled=dtype is not None)


def assert_gradients(found, expected, inputs, autocast=None) -> None:
    for a, b, x in zip(found, expected, inputs, strict=True):
        assert a.dtype == x.dtype and a.shape == x.shape
        scale = max(b.abs().max().item(), 1.0) if b.numel() else 1.0
        rounding = max(LINEAR_GRADIENT[dtype] for dtype in (x.dtype, autocast or x.dtype))
        torch.testing.assert_close(a.double(), b, rtol=0, atol=rounding * scale)
