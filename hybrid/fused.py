"""The hot path, and the one rule that says what computes it.

    tensors                                  computed by
    on CUDA or ROCm, Triton can be imported  hybrid_kernels
    on CUDA or ROCm, no Triton               hybrid.functional, and one warning that says how to install it
    on a CPU or anything else                hybrid.functional

float64 goes to the definition, because a kernel of the head computes in float32 (`gae`'s takes it). A DTensor is
refused. The environment variable HYBRID_KERNELS = auto | torch | triton (default auto) forces one side; it is read
at every call. On a CPU, triton means its interpreter, for debugging: set TRITON_INTERPRET=1 before the start.

Every model-sized computation of the steps, the rollout and the evaluation is called through here. A function here
has the name, the arguments and the result of its definition, which its docstring is taken from.
"""

import functools
import os
import warnings
from collections.abc import Callable
from typing import Any, Literal, ParamSpec, TypeVar

import torch
from torch import Tensor

from hybrid import functional
from hybrid.core import InputError
from hybrid.functional import TokenStats

__all__ = ["TokenStats", "gae", "kernel_backend", "linear_logprob", "token_stats"]

_MODES = ("auto", "torch", "triton")
_INSTALL = "pip install 'hybrid-trainer[triton]'"

# What this process has found out. Plain globals, because torch.compile warns of a functools.cache.
_NOT_ASKED = "not asked yet"
_missing: str | None = _NOT_ASKED
_warned = False

P = ParamSpec("P")
R = TypeVar("R")


def kernel_backend(device: torch.device | str) -> Literal["triton", "torch"]:
    """What computes the float32 and half-precision tensors of a device, by the rule above.

    Raises InputError where HYBRID_KERNELS is not one of its values, or is triton where Triton cannot run.
    """
    kind = torch.device(device).type  # ROCm's is "cuda" too
    mode = os.environ.get("HYBRID_KERNELS", "auto")
    if mode not in _MODES:
        raise InputError(f"HYBRID_KERNELS must be auto, torch or triton, got {mode!r}")
    if mode == "torch" or (mode == "auto" and kind != "cuda"):
        return "torch"
    if kind not in ("cuda", "cpu"):
        raise InputError(f"HYBRID_KERNELS is triton, and the kernels run on CUDA and ROCm, not on {kind}; set auto")
    if kind == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise InputError(
            "HYBRID_KERNELS is triton, and on a CPU Triton has only its interpreter; set TRITON_INTERPRET=1 as well, "
            "before the start, or HYBRID_KERNELS=auto"
        )
    missing = _why_kernels_are_missing()
    if missing is None:
        return "triton"
    if mode == "triton":
        raise InputError(f"HYBRID_KERNELS is triton, and the kernels cannot be imported ({missing}): {_INSTALL}")
    _warn_once(missing)
    return "torch"


def _why_kernels_are_missing() -> str | None:
    """The import's error; None where the kernels are there."""
    global _missing
    if _missing == _NOT_ASKED:
        try:
            import hybrid_kernels  # noqa: F401  not at the top: it loads Triton
        except ImportError as error:
            _missing = str(error)
        else:
            _missing = None
    return _missing


def _warn_once(missing: str) -> None:
    global _warned
    if not _warned:
        _warned = True
        warnings.warn(
            f"the GPU computes log-probs and advantages without Triton ({missing}), which is slower: {_INSTALL}",
            stacklevel=3,
        )


def _takes_kernel(name: str, tensors: list[Tensor], float64: bool) -> bool:
    """The rule for one call."""
    if any(hasattr(x, "device_mesh") for x in tensors):
        raise TypeError(f"{name}: a DTensor is not taken; gather it with full_tensor() (FSDP2: unshard the module)")
    if not float64 and any(x.dtype == torch.float64 for x in tensors):
        return False
    return kernel_backend(tensors[0].device) == "triton"


def _picked(
    definition: Callable[P, R], *, float64: bool = False, wrap: Callable[[Any], Any] = lambda x: x
) -> Callable[P, R]:
    """The definition and its kernel as one function.   float64: the kernel takes it.   wrap: makes its result ours."""
    name = definition.__name__

    @functools.wraps(definition)
    def function(*args: P.args, **kwargs: P.kwargs) -> R:
        tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
        if not tensors or not _takes_kernel(name, tensors, float64):
            return definition(*args, **kwargs)
        import hybrid_kernels

        return wrap(getattr(hybrid_kernels, name)(*args, **kwargs))

    return function


def _as_token_stats(stats: Any) -> TokenStats:
    """The kernels know nothing of `hybrid`, so they return their own type."""
    return TokenStats(stats.logprob, stats.entropy, stats.kl)


gae = _picked(functional.gae, float64=True)
linear_logprob = _picked(functional.linear_logprob, wrap=_as_token_stats)
token_stats = _picked(functional.token_stats, wrap=_as_token_stats)
