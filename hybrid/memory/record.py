"""What is known of one prompt, and the class of difficulty that this puts it in."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from hybrid.memory.spaced import Card
from hybrid.memory.visits import Kept, Visit

__all__ = ["CLASSES", "Record", "bounds", "class_of"]

CLASSES = ("easy", "medium", "hard")


@dataclass
class Record:
    """One prompt.

    attempts: responses so far, in so many `visits`.   success, score: the running share of good responses and the
        running mean score, each visit's mean counting `rate`.
    kl: nats per response, of the last visit.   sft_loss: nats per token, of the last supervised step with it.
    last_step: of the last visit.   card: when it is due, where that is asked for.
    best: the best responses so far, each once, by score; of equal ones the one of lower entropy first.
    """

    key: str
    text: str = ""
    attempts: int = 0
    visits: int = 0
    success: float = 0.0
    score: float = 0.0
    kl: float = 0.0
    sft_loss: float | None = None
    last_step: int = 0
    card: Card | None = None
    best: list[Kept] = field(default_factory=list)

    @property
    def learnability(self) -> float:
        """p (1 - p), which is 0 where all responses, or none, were good."""
        return self.success * (1 - self.success)

    @property
    def uncertainty(self) -> float:
        """p (1 - p) of p = (n success + 1/2) / (n + 1): of two that always fail, the one less often tried is ahead."""
        p = (self.attempts * self.success + 0.5) / (self.attempts + 1)
        return p * (1 - p)

    def add(self, visit: Visit, step: int, *, success: float, rate: float, keep: int) -> None:
        """Take in a visit with this share of good responses."""
        rate = rate if self.visits else 1.0
        self.success += rate * (success - self.success)
        self.score += rate * (visit.score - self.score)
        self.attempts += len(visit.rows)
        self.visits += 1
        self.text, self.kl, self.last_step = visit.text, visit.kl, step
        # The same response again: its newer log-probs.
        kept = {row.response: row for row in (*self.best, *visit.rows)}
        self.best = sorted(kept.values(), key=lambda row: (-row.score, row.entropy))[:keep]

    def as_row(self) -> dict[str, Any]:
        """As JSON."""
        plain = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "best"}
        return {**plain, "best": [row.as_row() for row in self.best]}

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> "Record":
        """From what `as_row` made of one."""
        return replace(cls(**row), best=[Kept.of(kept) for kept in row["best"]])


def bounds(rates: Iterable[float], thresholds: Sequence[float], by: str) -> tuple[float, float]:
    """The success rates below which a prompt is hard and above which it is easy.

    by: fixed: the thresholds themselves; quantile: the rates at these shares of all, lowest first.
    """
    low, high = thresholds
    ordered = sorted(rates)
    if by == "fixed" or not ordered:
        return low, high
    last = len(ordered) - 1
    return ordered[round(low * last)], ordered[round(high * last)]


def class_of(success: float, limits: tuple[float, float]) -> str:
    """easy, medium or hard."""
    low, high = limits
    return "hard" if success < low else "easy" if success > high else "medium"
