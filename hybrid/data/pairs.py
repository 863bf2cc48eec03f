"""Preferences as tensors: batches of pairs, and of answers that are good or bad."""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch

from hybrid.core import IGNORE, Encoded, InputError, Labelled, Pairs
from hybrid.data.pack import collate

__all__ = ["Answer", "answers_of", "collate_answers", "collate_pairs"]


class Answer(NamedTuple):
    """One answer that was called good or bad.   mismatched: its prompt with an answer to another one."""

    encoded: Encoded
    is_good: bool
    mismatched: Encoded


def collate_pairs(examples: Sequence[Encoded], *, pad_id: int) -> Pairs:
    """Both sides of each example, right-padded together."""
    rejected = [e.rejected for e in examples if e.rejected is not None]
    if len(rejected) != len(examples):
        raise InputError(f"{len(examples) - len(rejected)} of {len(examples)} rows are no pairs of answers")
    return Pairs(
        sides=replace(collate([*examples, *rejected], pad_id=pad_id), examples=()),
        weight=torch.tensor([e.weight for e in examples]),
        margin=torch.tensor([e.margin for e in examples]),
        examples=tuple(examples),
    )


def answers_of(examples: Sequence[Encoded]) -> list[Answer]:
    """Every answer on its own: targets are good, rejected ones bad.

    Each is mismatched with the next one in the list whose prompt is another, cut to the longest length there is.
    Raises InputError where all have the same prompt.
    """
    judged = [(e, True) for e in examples if e.has_target]
    judged += [(e.rejected, False) for e in examples if e.rejected is not None and e.rejected.has_target]
    prompts = {e.prompt_ids for e, _ in judged}
    if judged and len(prompts) == 1:
        raise InputError(
            f"all {len(judged)} answers are to the same prompt, and kto estimates its KL from answers to others; add "
            "other prompts, or take objective dpo"
        )
    longest = max((len(e.input_ids) for e, _ in judged), default=0)
    others = _next_of_another_prompt([e for e, _ in judged])
    return [
        Answer(e, is_good, _mismatched(e, other, longest)) for (e, is_good), other in zip(judged, others, strict=True)
    ]


def collate_answers(answers: Sequence[Answer], *, pad_id: int) -> Labelled:
    """One answer a row, right-padded."""
    return Labelled(
        answers=replace(collate([a.encoded for a in answers], pad_id=pad_id), examples=()),
        label=torch.tensor([a.is_good for a in answers]),
        mismatched=replace(collate([a.mismatched for a in answers], pad_id=pad_id), examples=()),
        examples=tuple((a.encoded, a.mismatched) for a in answers),
    )


def _next_of_another_prompt(examples: Sequence[Encoded]) -> list[Encoded]:
    """For each the next one, the first behind the last, whose prompt is another; there are several prompts."""
    count = len(examples)
    found = list(examples)
    # Backwards, and twice around: the end's are known once the beginning's are.
    for i in reversed(range(2 * count - 1)):
        here, behind = i % count, (i + 1) % count
        is_other = examples[here].prompt_ids != examples[behind].prompt_ids
        found[here] = examples[behind] if is_other else found[behind]
    return found


def _mismatched(e: Encoded, other: Encoded, longest: int) -> Encoded:
    """The prompt of `e` with the answer of `other`."""
    start, begin = e.prompt_ids, len(other.prompt_ids)
    ids = (*start, *other.input_ids[begin:])[:longest]
    labels = (*[IGNORE] * len(start), *other.labels[begin:])[:longest]
    return Encoded(ids, labels, start, e.prompt, other.target, {})
