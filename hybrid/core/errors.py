"""The one error for bad input, and the "did you mean" that all of them share."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches

__all__ = [
    "InputError",
    "RunStopped",
    "check_seed",
    "enough_memory",
    "first_line",
    "is_out_of_memory",
    "unknown_name",
]


class InputError(ValueError):
    """Something the user gave cannot be used: a key, a value, a file, a row.

    The message is one line that names the thing, its value, what is allowed and the way out.
    The command line prints it alone and exits with status 2.
    """


class RunStopped(RuntimeError):
    """A run cannot go on: its updates are not finite, its policy has diverged, or the memory is too small.

    The message says why and what to change; the command line prints it alone and exits with status 1.
    """


def unknown_name(what: str, name: str, known: Iterable[str], *, hint: str = "") -> InputError:
    """The error for a name that is not among `known`: it gives the nearest ones, else all of them."""
    known = sorted(known)
    near = get_close_matches(name.lower(), known, n=3, cutoff=0.6)
    options = f"did you mean {' or '.join(map(repr, near))}?" if near else f"known: {', '.join(known)}"
    if hint:
        options += f"{'' if near else '.'} {hint}"
    return InputError(f"unknown {what} {name!r}; {options}")


def check_seed(name: str, seed: int) -> None:
    """Refuse a seed that torch's generators do not take."""
    if not -(2**63) <= seed < 2**63:
        raise InputError(f"{name} must lie in [-2^63, 2^63), got {seed}")


def first_line(error: Exception) -> str:
    """The first line of a library's message, for a message of one line."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


def is_out_of_memory(error: RuntimeError) -> bool:
    """A GPU's has a class of its own, the CPU's is known by its allocator's name."""
    return type(error).__name__ == "OutOfMemoryError" or "DefaultCPUAllocator" in str(error)


@contextmanager
def enough_memory(what: str, remedy: str) -> Iterator[None]:
    """Inside the block memory that runs out is a RunStopped that says at what, and what makes it less."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise RunStopped(f"out of memory while {what} ({first_line(error)}). {remedy}") from None
