"""Held-out measures: what an evaluation finds, and what is made of it."""

from hybrid.evaluate.config import EvalConfig
from hybrid.evaluate.measures import distinct_n, evaluate, evaluate_responses, evaluate_sft, sample_rows
from hybrid.evaluate.text import TEXT_METRICS, evaluate_texts

__all__ = [
    "TEXT_METRICS",
    "EvalConfig",
    "distinct_n",
    "evaluate",
    "evaluate_responses",
    "evaluate_sft",
    "evaluate_texts",
    "sample_rows",
]
