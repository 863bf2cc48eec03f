"""Tokens that any tiny model takes."""

import pytest
import torch


@pytest.fixture
def tokens():
    """Two rows of six tokens, and a mask of ones."""
    ids = torch.randint(3, 97, (2, 6), generator=torch.Generator().manual_seed(1))
    return ids, torch.ones_like(ids, dtype=torch.bool)
