"""The user's rows: read, turned into examples, encoded, batched."""

from hybrid.data.config import DataConfig
from hybrid.data.encode import encode, encode_all, encode_turns
from hybrid.data.examples import (
    ExampleSet,
    data_line,
    examples_from,
    read_example_set,
    read_examples,
    read_pairs,
    read_training_sets,
    split_examples,
)
from hybrid.data.loader import AnswerLoader, Endless, Loader, PairLoader
from hybrid.data.pack import collate, filler_id, left_pad, pack
from hybrid.data.pairs import Answer, answers_of, collate_answers, collate_pairs
from hybrid.data.read import read_rows
from hybrid.data.template import prompt_text

__all__ = [
    "Answer",
    "AnswerLoader",
    "DataConfig",
    "Endless",
    "ExampleSet",
    "Loader",
    "PairLoader",
    "answers_of",
    "collate",
    "collate_answers",
    "collate_pairs",
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
    "read_pairs",
    "read_rows",
    "read_training_sets",
    "split_examples",
]
