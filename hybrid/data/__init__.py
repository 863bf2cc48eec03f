"""The user's rows: read, turned into examples, encoded, batched."""

from hybrid.data.config import DataConfig
from hybrid.data.encode import encode, encode_all, encode_turns
from hybrid.data.examples import (
    ExampleSet,
    data_line,
    examples_from,
    read_example_set,
    read_examples,
    read_training_sets,
    split_examples,
)
from hybrid.data.loader import Loader
from hybrid.data.pack import collate, filler_id, left_pad, pack
from hybrid.data.read import read_rows
from hybrid.data.template import prompt_text

__all__ = [
    "DataConfig",
    "ExampleSet",
    "Loader",
    "collate",
    "data_line",
    "encode",
    "encode_all",
    "encode_turns",
    "examples_from",
    "filler_id",
    "left_pad",
    "pack",
    "prompt_text",
    "read_example_set",
    "read_examples",
    "read_rows",
    "read_training_sets",
    "split_examples",
]
