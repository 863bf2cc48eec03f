"""What every room may use: the types that travel, the registry, the error for bad input."""

from hybrid.core.build import build, check_settings, fits, parameters_of
from hybrid.core.errors import (
    InputError,
    RunStopped,
    check_seed,
    enough_memory,
    first_line,
    is_out_of_memory,
    unknown_name,
)
from hybrid.core.json_text import parse_json
from hybrid.core.pairs import Labelled, Pairs
from hybrid.core.quiet import no_progress_bars
from hybrid.core.registry import Registry, load_object
from hybrid.core.rows import Record, Rows, by_length, extents, microbatches, used_columns
from hybrid.core.types import IGNORE, Batch, Encoded, Example, Rollout
from hybrid.core.yaml_text import parse_yaml

__all__ = [
    "IGNORE",
    "Batch",
    "Encoded",
    "Example",
    "InputError",
    "Labelled",
    "Pairs",
    "Record",
    "Registry",
    "Rollout",
    "Rows",
    "RunStopped",
    "build",
    "by_length",
    "check_seed",
    "check_settings",
    "enough_memory",
    "extents",
    "first_line",
    "fits",
    "is_out_of_memory",
    "load_object",
    "microbatches",
    "no_progress_bars",
    "parameters_of",
    "parse_json",
    "parse_yaml",
    "unknown_name",
    "used_columns",
]
