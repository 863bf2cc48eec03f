"""Experience: what happened to every prompt, which decides when it comes again, and its best responses."""

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import fmean
from typing import Any, ClassVar, Literal

from torch import Tensor

from hybrid.core import Batch, Encoded, InputError, unknown_name
from hybrid.memory.memory import Memory, register_memory
from hybrid.memory.record import CLASSES, Record, bounds, class_of
from hybrid.memory.schedules import by_class, by_due, by_learnability
from hybrid.memory.shots import Nearness, with_shots
from hybrid.memory.spaced import FSRS, Leitner, Scheduler
from hybrid.memory.visits import Kept, Visit, example_key

__all__ = ["Experience"]


@register_memory("experience")
@dataclass
class Experience(Memory):
    """The prompts that are worth another try.

    Of a rollout's prompts the share `uniform` stays as the data's loader drew them. Of the others the share `unseen`
    are prompts that were never seen, as long as there are any, and the rest are chosen among those that were:

        classes         so many easy, medium and hard ones, by `shares`
        learnability    those of medium difficulty first, in proportion to p (1 - p); those without variance last
        due             spaced repetition: what was answered well comes again later and later

    A prompt is hard below thresholds[0] and easy above thresholds[1], by its running success rate p.
    Sources: ExGRPO (arXiv:2510.02245) for the range of 25 to 75 % and the low entropy of what is kept.
    """

    choose: Literal["classes", "learnability", "due"] = "learnability"
    shares: dict[str, float] = field(default_factory=lambda: {"easy": 0.2, "medium": 0.6, "hard": 0.2})
    thresholds: list[float] = field(default_factory=lambda: [0.25, 0.75])
    by: Literal["fixed", "quantile"] = "fixed"  # of the thresholds: success rates, or shares of the prompts
    success: float = 0.5  # a response with at least this score is a good one
    rate: float = 0.3  # what the newest visit counts in the running means
    unseen: float = 1.0  # 1: prompts that were never seen come first
    uniform: float = 0.1
    scheduler: Literal["leitner", "fsrs"] = "leitner"  # of choose "due"
    interval: float = 1.0  # steps until Leitner's first box comes again; FSRS's day
    capacity: int = 20000  # prompts; beyond it the one is forgotten that was seen longest ago
    keep: int = 4  # best responses of each prompt
    staleness: int = 0  # PPO also learns from rollouts that are at most so many steps old; 0: from fresh ones alone
    replay_share: float = 0.25  # of that: stale responses, as a share of the fresh ones
    shots: int = 0  # so many good answers to the nearest other prompts stand in front of a prompt
    shots_tokens: int = 256  # the most tokens of them together
    embedder: str | None = None  # of shots: "module:name", texts -> a vector each
    path: str | None = None  # begin with another run's memory: its folder, or its memory.jsonl

    keeps_responses: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name in ("capacity", "keep"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("staleness", "shots", "shots_tokens"):
            if getattr(self, name) < 0:
                raise InputError(f"{name} must be at least 0, got {getattr(self, name)}")
        if bool(self.shots) != (self.embedder is not None):
            raise InputError(
                f"shots and embedder go together, got {self.shots} and {self.embedder!r}: give both or neither"
            )
        for name in ("unseen", "uniform", "rate", "replay_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name} must lie in [0, 1], got {getattr(self, name)}")
        if not 0 < self.interval < math.inf:
            raise InputError(f"interval must be > 0 steps and finite, got {self.interval}")
        if not math.isfinite(self.success):
            raise InputError(f"success must be a finite score, got {self.success}")
        low, high = [*self.thresholds, 0, 0][:2]
        if len(self.thresholds) != 2 or not 0 <= low <= high <= 1:
            raise InputError(f"thresholds must be two numbers in [0, 1], the lower one first, got {self.thresholds}")
        for name in self.shares:
            if name not in CLASSES:
                raise unknown_name("class of prompts: memory.shares.", str(name), CLASSES)
        if not (all(share >= 0 for share in self.shares.values()) and abs(sum(self.shares.values()) - 1) <= 1e-6):
            raise InputError(f"shares must be at least 0 and add up to 1, got {self.shares}")
        self.records: dict[str, Record] = {}
        self.recent: deque[Visit] = deque()  # whole visits of the last `staleness` steps
        self._nearness = None if self.embedder is None else Nearness(self.embedder)
        self._eos_id: int | None = None
        self._supervised: dict[tuple[int, ...], str] = {}
        self._scheduler: Scheduler = (FSRS if self.choose == "due" and self.scheduler == "fsrs" else Leitner)(
            self.interval
        )

    def attach(self, examples: Sequence[Encoded], tokenizer: Any = None, *, seed: int = 0) -> None:
        super().attach(examples, tokenizer, seed=seed)
        self._eos_id = None if tokenizer is None else tokenizer.eos_token_id
        self._supervised = {example.input_ids: example_key(example) for example in examples}

    @property
    def limits(self) -> tuple[float, float]:
        """The success rates below which a prompt is hard and above which it is easy, now."""
        return bounds((r.success for r in self.records.values() if r.visits), self.thresholds, self.by)

    def knows(self, key: str) -> bool:
        return key in self.records and self.records[key].visits > 0

    # What comes next

    def pick(self, drawn: Sequence[Encoded], step: int) -> list[Encoded]:
        number, chance = len(drawn), self.chance(step)
        picked = {example_key(example): example for example in drawn[: round(self.uniform * number)]}
        offered = {example_key(example): example for example in drawn}
        new = [key for key in offered if not self.knows(key) and key not in picked]
        others = [key for key in self.pool if not self.knows(key) and key not in offered]
        new += chance.sample(others, len(others))
        place = number - len(picked)
        wanted = new[: round(self.unseen * place)]
        wanted += [record.key for record in self._again(place - len(wanted), picked, step)]
        # Where too few were seen: the others that were not, then whatever the loader has.
        wanted += [key for key in (*new, *offered) if key not in wanted and key not in picked]
        for key in wanted[:place]:
            picked[key] = offered[key] if key in offered else self._example(key)
        # A loader that draws a prompt twice has fewer than `number`.
        return self.shown([*picked.values(), *drawn][:number])

    def shown(self, examples: Sequence[Encoded]) -> list[Encoded]:
        """Behind the best answers to the prompts nearest to their own, where there are shots."""
        if self._nearness is None:
            return list(examples)
        records = self.records.items()
        good = {key: r.best[0] for key, r in records if r.best and r.best[0].score >= self.success}
        found = []
        for example in examples:
            key = example_key(example)
            others = {other: self.records[other].text for other in good if other != key}
            near = self._nearness.nearest(example.prompt, others, self.shots)
            found.append(with_shots(example, [good[other] for other in near], self.shots_tokens, self._eos_id))
        return found

    @property
    def most_added(self) -> int:
        return self.shots_tokens if self.shots else 0

    def _again(self, number: int, without: Mapping[str, Encoded], step: int) -> list[Record]:
        """At most so many of the prompts that were seen and are in the run's data, the ones to come next first."""
        chance = self.chance(step)
        records = [r for r in self.records.values() if r.visits and r.key in self.pool and r.key not in without]
        if self.choose == "classes":
            return by_class(records, number, self.shares, self.limits, chance)
        if self.choose == "due":
            return by_due(records, number)
        return by_learnability(records, number, self.limits, chance)

    def _example(self, key: str) -> Encoded:
        """Of examples with the same prompt each in its turn."""
        examples = self.pool[key]
        return examples[(self.records[key].visits if key in self.records else 0) % len(examples)]

    # What came of it

    def visited(self, visits: Sequence[Visit], step: int) -> None:
        for visit in visits:
            record = self.records.setdefault(visit.key, Record(visit.key))
            success = visit.success(self.success)
            record.add(visit, step, success=success, rate=self.rate, keep=self.keep)
            if self.choose == "due":
                record.card = self._scheduler.reviewed(record.card, success, step)
        if self.staleness:
            self.recent.extend(visits)
            while self.recent and self.recent[0].rows[0].step < step - self.staleness:
                self.recent.popleft()
        self._forget()

    def after_supervised(self, batch: Batch, loss: Tensor) -> None:
        # Of packed rows nothing says which loss is whose.
        if batch.position_ids is not None:
            return
        for ids, length, value in zip(
            batch.input_ids.tolist(), batch.attention_mask.sum(1).tolist(), loss.tolist(), strict=True
        ):
            key = self._supervised.get(tuple(ids[:length]))
            if key is not None:
                record = self.records.setdefault(key, Record(key))
                record.sft_loss = value
                record.text = record.text or self.pool[key][0].prompt
        self._forget()

    def _forget(self) -> None:
        excess = len(self.records) - self.capacity
        if excess > 0:
            oldest = sorted(self.records.values(), key=lambda record: (record.last_step, record.key))
            for record in oldest[:excess]:
                del self.records[record.key]

    # What is learnt from again

    def best(self, number: int) -> list[tuple[Kept, float]]:
        """The best response to each of `number` prompts, among those that are not mastered and have a good one.

        Medium difficulty first, as `learnability` has it.
        """
        good = [r for r in self.records.values() if r.best and r.best[0].score >= self.success]
        open_ones = [r for r in good if r.best[0].score > r.score]
        again = by_learnability(open_ones, number, self.limits, self.chance(self.step))
        return [(record.best[0], record.score) for record in again]

    def stale(self, number: int) -> list[Visit]:
        earlier = [v for v in self.recent if self.step - self.staleness <= v.rows[0].step < self.step]
        picked: list[Visit] = []
        room = round(self.replay_share * number)
        for visit in self.chance(self.step).sample(earlier, len(earlier)):
            if len(visit.rows) <= room:
                picked.append(visit)
                room -= len(visit.rows)
        return picked

    # What there is to say and to save

    def class_shares(self) -> dict[str, float]:
        """The shares of easy, medium, hard and never seen prompts among those of the run."""
        limits, seen = self.limits, [r for r in self.records.values() if r.visits and r.key in self.pool]
        total = max(len(self.pool), 1)
        shares = {name: sum(class_of(r.success, limits) == name for r in seen) / total for name in CLASSES}
        return {**shares, "unseen": 1 - len(seen) / total}

    def metrics(self) -> dict[str, float]:
        seen = [record.success for record in self.records.values() if record.visits]
        shares = {f"memory/{name}": share for name, share in self.class_shares().items()}
        return {**super().metrics(), **shares, **({"memory/success": fmean(seen)} if seen else {})}

    def begin(self) -> None:
        super().begin()
        self.recent.clear()  # another policy's

    def header(self) -> dict[str, Any]:
        recent = [{**asdict(visit), "rows": [row.as_row() for row in visit.rows]} for visit in self.recent]
        return {**super().header(), "limits": list(self.limits), "recent": recent}

    def rows(self) -> list[dict[str, Any]]:
        return [record.as_row() for record in self.records.values()]

    def load_rows(self, rows: Sequence[Mapping[str, Any]], header: Mapping[str, Any]) -> None:
        self.records = {row["key"]: Record.of(row) for row in rows}
        self.recent = deque(
            Visit(**{**visit, "rows": tuple(Kept.of(row) for row in visit["rows"])}) for visit in header["recent"]
        )
        self._forget()
