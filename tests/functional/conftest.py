"""Tiles of `linear_logprob` that are small enough for a test to cross."""

import pytest
from linear_case import MODULE


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of 2 rows and 3 columns, so that a few numbers already cross every edge; backward finds the logits of
    one of them (of float64) kept in memory of its own, some in the weight's gradient, and computes the rest anew."""
    monkeypatch.setattr(MODULE, "_VOCAB_SLICE", 3)
    monkeypatch.setattr(MODULE, "_ROW_CHUNK", 2)
    monkeypatch.setattr(MODULE, "_SPARE", 2 * 3 * 8)
