"""Where the optimizers come from: is the package there, and does it run on these parameters?"""

import warnings
from collections.abc import Callable, Iterable, Mapping
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from hybrid.core import InputError

__all__ = ["loaded", "require", "try_step"]

INSTALL = {"bitsandbytes": "pip install hybrid-trainer[bnb]"}
# One element more than the least that bitsandbytes keeps in 8 bits.
TRIAL_SIZE = 4097


def require(name: str, backend: str) -> None:
    """Refuse the optimizer `name` where its package is not installed. Imports nothing."""
    if find_spec(backend) is None:
        raise _not_installed(name, backend)


def loaded(name: str, path: str) -> Callable[..., torch.optim.Optimizer]:
    """The class or function at "module:name". Raises InputError if it is not there."""
    module, _, attribute = path.partition(":")
    backend = module.partition(".")[0]
    try:
        made: Callable[..., torch.optim.Optimizer] = getattr(import_module(module), attribute)
        return made
    except ImportError as error:
        raise _not_installed(name, backend) from error
    except AttributeError:
        raise InputError(f"optimizer {name!r} needs a newer {backend}: it has no {attribute!r}") from None


def try_step(
    name: str,
    make: Callable[..., torch.optim.Optimizer],
    arguments: Mapping[str, Any],
    parameters: Iterable[nn.Parameter],
) -> None:
    """One step on a throwaway weight per device and dtype: only the backend knows where it has a kernel."""
    for device, dtype in {(p.device, p.dtype) for p in parameters}:
        weight = nn.Parameter(torch.zeros(TRIAL_SIZE, device=device, dtype=dtype))
        weight.grad = torch.ones_like(weight)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                make([weight], lr=1e-3, **arguments).step()
        except (RuntimeError, ValueError, TypeError, AttributeError, KeyError, OSError) as error:
            why = str(error).partition("\n")[0]
            kind = str(dtype).removeprefix("torch.")
            raise InputError(
                f"optimizer {name!r} cannot step {kind} weights on {str(device)!r} ({why}); use 'adamw' there"
            ) from error


def _not_installed(name: str, backend: str) -> InputError:
    how = INSTALL.get(backend, f"pip install {backend}")
    return InputError(f"optimizer {name!r} needs {backend}, which is not installed: {how}, or use 'adamw'")
