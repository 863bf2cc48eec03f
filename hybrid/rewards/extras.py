"""Optional libraries: looked for when a reward is built, imported when it first scores."""

import sys
from importlib.util import find_spec

from hybrid.core import InputError

__all__ = ["require"]


def require(module: str, *, reward: str, install: str = "hybrid-trainer[rewards]") -> None:
    """Raises InputError with what to install where there is no package `module`. Imports nothing."""
    # None in sys.modules is how Python marks a module that must not be imported.
    if sys.modules.get(module, module) is None or (module not in sys.modules and find_spec(module) is None):
        raise InputError(f"reward {reward!r} needs {module}: pip install '{install}'")
