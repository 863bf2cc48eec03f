"""Fixtures of the kernels' tests."""

import importlib

import pytest
import torch
from kernel_case import DEVICE


@pytest.fixture
def products(monkeypatch):
    """Collects the three lengths of each matrix product of a head."""
    names = ("head", "linear_logprob", "linear_loss")
    found, modules = [], [importlib.import_module(f"hybrid_kernels.{name}") for name in names]
    inner = modules[0].product

    def product(a, b, out):
        # Where a has padding, inner comes back here with room for it in out.
        if len(a) == len(out):
            found.append((*a.shape, b.shape[1]))
        return inner(a, b, out)

    for module in modules:
        monkeypatch.setattr(module, "product", product)
    return found


@pytest.fixture
def unwritten_memory_is_nan():
    if DEVICE.type != "cpu":
        pytest.skip("cuBLAS refuses to run where only deterministic algorithms may")
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)
