"""A memory as a file in the run's folder: a line that says what it is, then a line for each thing that it holds."""

import json
from pathlib import Path
from typing import Any

from hybrid.core import InputError
from hybrid.memory.memory import Memory
from hybrid.run import disk_errors, read_jsonl, write_file

__all__ = ["MEMORY", "load_memory", "read_memory", "write_memory"]

MEMORY = "memory.jsonl"


def write_memory(memory: Memory, folder: Path) -> None:
    """Put memory.jsonl into the folder, whole, in place of the one there."""
    rows = memory.rows()
    text = "".join(json.dumps(line) + "\n" for line in [{**memory.header(), "num_rows": len(rows)}, *rows])
    with disk_errors(f"write to {str(folder / MEMORY)!r}"):
        write_file(folder / MEMORY, text.encode("ascii"))


def read_memory(path: str | Path) -> dict[str, Any]:
    """The state that `write_memory` wrote. path: a run's folder, or the file.

    Raises InputError where it is none, or not whole.
    """
    file = Path(path) / MEMORY if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise InputError(f"{str(path)!r} holds no memory: there is no file {str(file)!r}")
    header, *rows = list(read_jsonl(file)) or [{}]
    if not {"memory", "tokenizer", "step", "num_rows"} <= header.keys():
        raise InputError(f"{str(file)!r} is no memory: its first line must say which, as a run's {MEMORY} does")
    if len(rows) != (number := header.pop("num_rows")):
        raise InputError(f"{str(file)!r} is not whole: {len(rows)} of its {number} rows are there")
    return {**header, "rows": rows}


def load_memory(memory: Memory, path: str | Path) -> None:
    """Begin a run with what another one learnt.

    Raises InputError for a memory of another type or tokenizer, and for one that is not whole.
    """
    state = read_memory(path)
    try:
        memory.load_state_dict(state)
    except (KeyError, TypeError) as error:
        raise InputError(
            f"{str(path)!r} holds no {state['memory']} memory as this version writes it: {error!r}"
        ) from error
    memory.begin()
