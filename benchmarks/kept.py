"""The runs of a study: each is made once for its settings and kept, several at a time where there are cores."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

__all__ = ["found", "in_processes", "kept"]

Job = TypeVar("Job")
Result = dict[str, Any]


def found(file: Path, about: Mapping[str, Any]) -> Result | None:
    """What `file` holds, if it was made with the settings `about`, which are in the types of JSON."""
    if not file.is_file():
        return None
    held: Result = json.loads(file.read_text(encoding="utf-8"))
    return held if all(held.get(name) == value for name, value in about.items()) else None


def kept(file: Path, about: Mapping[str, Any], make: Callable[[], Mapping[str, Any]]) -> Result:
    """What `file` holds, if it was made with the settings `about`; else what `make` gives with them, now kept there.

    about: in the types of JSON, or the file is never found to be the same.
    """
    if (held := found(file, about)) is not None:
        return held
    result = {**about, **make()}
    file.parent.mkdir(parents=True, exist_ok=True)
    # Whole or not at all: the next start trusts what it finds.
    temporary = file.with_suffix(".tmp")
    temporary.write_text(json.dumps(result) + "\n", encoding="utf-8")
    temporary.replace(file)
    return result


def in_processes(make: Callable[[Job], Result], jobs: Sequence[Job], processes: int) -> Iterator[tuple[int, Result]]:
    """(number from 1, result) of each job, in order of completion."""
    # A fresh interpreter each: torch does not survive a fork.
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        made = as_completed([pool.submit(make, job) for job in jobs])
        yield from enumerate((future.result() for future in made), start=1)
