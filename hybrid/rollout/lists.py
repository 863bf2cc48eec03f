"""Responses that the user generated: lists of id tensors and scores, as tensors that `assemble` takes."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hybrid.core import InputError
from hybrid.data import left_pad
from hybrid.rollout.responses import Responses

__all__ = ["Ids", "from_lists"]

Ids = Tensor | Sequence[int]


def from_lists(
    queries: Sequence[Ids],
    responses: Sequence[Ids],
    scores: Sequence[float] | Sequence[Tensor] | Tensor,
    *,
    eos_ids: Sequence[int],
    logprobs: Sequence[Tensor | Sequence[float]] | None = None,
    device: torch.device | str = "cpu",
) -> tuple[Tensor, Tensor, Responses, Tensor]:
    """(prompt_ids (B, P), prompt_mask (B, P), responses, scores) for `assemble`.

    queries, responses: one 1-D tensor or list of ids each, without padding; a response counts as ended where its
        last token is one of `eos_ids`.
    scores: a number for each response (also as (B, 1)), or for each a 1-D tensor with a score per token.
    logprobs: for each response those of its tokens, as the engine that drew them gives them; what
        `PPOConfig.importance` needs.
    Raises InputError: lists of different lengths, an empty query or response, a score or log-prob that is not
        finite, another number of them per token than the response has tokens.
    """
    for name, given in (("queries", queries), ("responses", responses), ("scores", scores)):
        if not isinstance(given, (Sequence, Tensor)) or isinstance(given, str):
            raise InputError(f"step needs lists of queries, responses and scores, got {name} = {given!r:.60}")
    if not len(queries) == len(responses) == len(scores) or not len(queries):
        raise InputError(
            f"step needs as many queries as responses and scores, at least one, "
            f"got {len(queries)}, {len(responses)} and {len(scores)}"
        )
    asked, answered = _ids("queries", queries), _ids("responses", responses)
    for name, tensors in (("queries", asked), ("responses", answered)):
        for i, ids in enumerate(tensors):
            if ids.dim() != 1 or not len(ids) or ids.dtype.is_floating_point:
                raise InputError(f"{name}[{i}] must be a 1-D tensor of token ids, got {ids.dtype} {tuple(ids.shape)}")
    prompt_ids, prompt_mask = left_pad([ids.tolist() for ids in asked], pad_id=0)
    ids, mask = _right_pad([ids.cpu().long() for ids in answered])
    ended = torch.tensor([int(response[-1]) in eos_ids for response in answered])
    score = _scores(_numbers("scores", scores), answered)
    drawn = None
    if logprobs is not None:
        if len(logprobs) != len(answered):
            raise InputError(f"step needs as many logprobs as responses, {len(answered)}, got {len(logprobs)}")
        drawn = _per_token("logprobs", _numbers("logprobs", logprobs), answered).to(device)
    answers = Responses(ids.to(device), mask.to(device), ended.to(device), drawn)
    return prompt_ids.to(device), prompt_mask.to(device), answers, score.to(device)


def _ids(name: str, rows: Sequence[Any]) -> list[Tensor]:
    tensors = []
    for i, row in enumerate(rows):
        try:
            tensors.append(torch.as_tensor(row))
        except (TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise InputError(f"{name}[{i}] must be token ids, as the tokenizer makes them, got {row!r:.60}") from error
    return tensors


def _numbers(name: str, rows: Sequence[Any] | Tensor) -> list[Tensor]:
    """Each row as a float32 tensor, all of them finite."""
    tensors = []
    for i, row in enumerate(rows):
        try:
            tensors.append(torch.as_tensor(row, dtype=torch.float32).detach().cpu())
        except (TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise InputError(f"{name}[{i}] must be a number or a tensor of them, got {row!r:.60}") from error
    for i, row in enumerate(tensors):
        if not row.isfinite().all():
            raise InputError(f"{name}[{i}] must be finite, got {row.tolist()}")
    return tensors


def _scores(scores: Sequence[Tensor], responses: Sequence[Tensor]) -> Tensor:
    """(B,), or (B, T) right-padded where the scores are per token."""
    if all(score.numel() == 1 for score in scores):
        return torch.stack([score.reshape(()) for score in scores])
    return _per_token("scores", scores, responses)


def _per_token(name: str, rows: Sequence[Tensor], responses: Sequence[Tensor]) -> Tensor:
    """(B, T), right-padded."""
    for i, (row, response) in enumerate(zip(rows, responses, strict=True)):
        if row.shape != response.shape:
            one = "one number or " if name == "scores" else ""
            raise InputError(
                f"{name}[{i}] must be {one}one per token of responses[{i}] {tuple(response.shape)}, "
                f"got shape {tuple(row.shape)}"
            )
    return _right_pad(rows)[0]


def _right_pad(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Rows of one dtype as (B, T), 0 behind each, and the mask of what is real."""
    padded = torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True)
    lengths = torch.tensor([len(row) for row in rows])
    return padded, torch.arange(padded.shape[1]) < lengths.unsqueeze(1)
