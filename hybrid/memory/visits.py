"""What a rollout says of each prompt: a visit, and the responses that came of it."""

import hashlib
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from hybrid.core import Encoded, Rollout
from hybrid.functional import masked_mean, masked_sum

__all__ = ["Kept", "Visit", "example_key", "prompt_key", "visits_of"]


@dataclass(frozen=True)
class Kept:
    """One response as it was drawn: all that is needed to learn from it again, as JSON.

    prompt: the ids that it answers, a hint among them.   response: its own ids, EOS among them.
    logprob: of each of its tokens under the distribution that it was drawn from; None where that is not known.
    entropy: of the policy that drew it, nats per token.   step: when.   ended: whether EOS or a stop text came.
    num_shots: the first so many of the prompt's ids are other prompts with their answers; see `Encoded`.
    """

    prompt: tuple[int, ...]
    response: tuple[int, ...]
    logprob: tuple[float, ...] | None
    score: float
    entropy: float
    step: int
    ended: bool
    text: str = ""
    num_shots: int = 0

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> "Kept":
        """From what `asdict` made of one."""
        lists = {name: tuple(row[name]) for name in ("prompt", "response")}
        return cls(**{**row, **lists, "logprob": None if row["logprob"] is None else tuple(row["logprob"])})

    def as_row(self) -> dict[str, Any]:
        """As JSON."""
        return {name: list(x) if isinstance(x, tuple) else x for name, x in asdict(self).items()}


@dataclass(frozen=True)
class Visit:
    """A prompt in a rollout with all its responses there. kl: nats per response, to the references."""

    key: str
    text: str
    rows: tuple[Kept, ...]
    kl: float

    @property
    def score(self) -> float:
        """The mean score."""
        return sum(row.score for row in self.rows) / len(self.rows)

    def success(self, threshold: float) -> float:
        """The share of responses with at least this score."""
        return sum(row.score >= threshold for row in self.rows) / len(self.rows)


def prompt_key(ids: Sequence[int]) -> str:
    """The name of a prompt: a hash of its tokens, the same in every run with the same tokenizer."""
    return hashlib.sha256(array("q", ids).tobytes()).hexdigest()[:16]


def example_key(example: Encoded) -> str:
    """That of an example's own prompt, without the hint that a strategy may have put behind it, and without shots."""
    return prompt_key(example.prompt_ids[example.num_shots : len(example.prompt_ids) - example.num_hint])


def visits_of(rollout: Rollout, step: int) -> list[Visit]:
    """The rollout's prompts in order, each as often as it is a group of its own."""
    entropy, kl = (
        masked_mean(rollout.entropy, rollout.mask, 1).tolist(),
        masked_sum(rollout.kl, rollout.mask, 1).tolist(),
    )
    scores, ended = rollout.score.tolist(), rollout.ended.tolist()
    prompts = _rows(rollout.input_ids[:, : rollout.prompt_length], rollout.attention_mask[:, : rollout.prompt_length])
    responses = _rows(rollout.input_ids[:, rollout.prompt_length :], rollout.mask)
    drawn = None if rollout.sampling_logprob is None else _rows(rollout.sampling_logprob, rollout.mask)
    around = [(e.num_shots, e.num_hint) for e in rollout.examples] or [(0, 0)] * len(rollout)
    keys = [prompt_key(ids[shots : len(ids) - hint]) for ids, (shots, hint) in zip(prompts, around, strict=True)]
    groups = keys if rollout.group is None else rollout.group.tolist()
    found: dict[Any, list[int]] = {}
    for row, group in enumerate(groups):
        found.setdefault(group, []).append(row)
    return [
        Visit(
            key=keys[rows[0]],
            text=rollout.prompts[rows[0]] if rollout.prompts else "",
            rows=tuple(
                Kept(
                    prompt=tuple(prompts[row]), response=tuple(responses[row]),
                    logprob=None if drawn is None else tuple(drawn[row]), score=scores[row], entropy=entropy[row],
                    step=step, ended=ended[row], text=rollout.responses[row] if rollout.responses else "",
                    num_shots=around[row][0],
                )
                for row in rows
            ),
            kl=sum(kl[row] for row in rows) / len(rows),
        )
        for rows in found.values()
    ]  # fmt: skip


def _rows(values: Any, mask: Any) -> list[list[Any]]:
    """Of each row what the mask leaves."""
    pairs = zip(values.tolist(), mask.bool().tolist(), strict=True)
    return [[x for x, valid in zip(row, valid_row, strict=True) if valid] for row, valid_row in pairs]
