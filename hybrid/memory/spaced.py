"""Spaced repetition: when a prompt is due again. The clock is the run's step."""

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from functools import cached_property
from importlib.util import find_spec
from typing import Any, Protocol

from hybrid.core import InputError

__all__ = ["FSRS", "Card", "Leitner", "Scheduler"]

Card = dict[str, Any]  # JSON; "due": the step from which on the prompt is due

NUM_BOXES = 10  # the last one comes again after 512 intervals
EPOCH = datetime(2000, 1, 1, tzinfo=UTC)  # step 0 of FSRS's calendar


class Scheduler(Protocol):
    """Gives a prompt the card by which it comes again."""

    def reviewed(self, card: Mapping[str, Any] | None, grade: float, step: int) -> Card:
        """The card after a visit in `step`. card: None before the first.   grade: in [0, 1]."""


class Leitner:
    """Boxes: a right answer moves the prompt up one box, a wrong one back to the first.

        due = step + interval * 2^(box - 1),   right where the grade is at least 1/2

    interval: steps until the first box comes again.   Source: Leitner 1972, with intervals that double.
    """

    def __init__(self, interval: float = 1.0):
        self.interval = interval

    def reviewed(self, card: Mapping[str, Any] | None, grade: float, step: int) -> Card:
        box = min((card or {"box": 0})["box"] + 1, NUM_BOXES) if grade >= 0.5 else 1
        return {"box": box, "due": step + self.interval * 2 ** (box - 1)}


class FSRS:
    """PyPI's `fsrs`: stability and difficulty of each prompt, due where 9 of 10 would still be remembered.

        rating = Again below 1/4, Hard below 1/2, Good below 9/10, else Easy, of the grade

    interval: the steps that FSRS takes for a day. Without its random fuzz and its steps of minutes.
    Raises InputError, when it is made, where the package is not there.
    """

    def __init__(self, interval: float = 1.0):
        if find_spec("fsrs") is None:
            raise InputError(
                "memory.scheduler 'fsrs' needs fsrs, which is not installed: pip install 'hybrid-trainer[memory]', or "
                "memory.scheduler=leitner"
            )
        self.interval = interval

    @cached_property
    def _scheduler(self) -> Any:
        import fsrs

        return fsrs.Scheduler(learning_steps=(), relearning_steps=(), enable_fuzzing=False)

    def reviewed(self, card: Mapping[str, Any] | None, grade: float, step: int) -> Card:
        import fsrs

        now = EPOCH + timedelta(days=step / self.interval)
        # A card without a number asks the clock for one.
        saved: Any = None if card is None else card["fsrs"]
        before = fsrs.Card(card_id=0, due=EPOCH) if saved is None else fsrs.Card.from_dict(saved)
        ratings = fsrs.Rating.Again, fsrs.Rating.Hard, fsrs.Rating.Good, fsrs.Rating.Easy
        rating = ratings[sum(grade >= bound for bound in (0.25, 0.5, 0.9))]
        after, _ = self._scheduler.review_card(before, rating, now)
        return {"fsrs": after.to_dict(), "due": (after.due - EPOCH) / timedelta(days=1) * self.interval}
