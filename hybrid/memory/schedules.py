"""Which of the prompts that were seen come again: by class, by how much there is to learn, or by when they are due."""

import math
import random
from collections.abc import Mapping, Sequence

from hybrid.memory.record import CLASSES, Record, class_of

__all__ = ["apportioned", "by_class", "by_due", "by_learnability"]


def apportioned(shares: Mapping[str, float], number: int) -> dict[str, int]:
    """So many of `number` for each share, by the largest remainders; they add up to it."""
    exact = {name: share * number for name, share in shares.items()}
    counts = {name: math.floor(count + 1e-9) for name, count in exact.items()}
    by_remainder = sorted(exact, key=lambda name: counts[name] - exact[name])
    for name in by_remainder[: number - sum(counts.values())]:
        counts[name] += 1
    return counts


def by_class(
    records: Sequence[Record],
    number: int,
    shares: Mapping[str, float],
    limits: tuple[float, float],
    chance: random.Random,
) -> list[Record]:
    """At most `number` records, drawn without replacement: of each class its share; what one lacks the others give."""
    groups: dict[str, list[Record]] = {name: [] for name in CLASSES}
    for record in records:
        groups[class_of(record.success, limits)].append(record)
    counts = apportioned({name: shares.get(name, 0.0) for name in CLASSES}, min(number, len(records)))
    picked = [r for name in CLASSES for r in chance.sample(groups[name], min(counts[name], len(groups[name])))]
    chosen = {record.key for record in picked}
    left = [record for record in records if record.key not in chosen]
    return picked + chance.sample(left, min(number - len(picked), len(left)))


def by_learnability(
    records: Sequence[Record], number: int, limits: tuple[float, float], chance: random.Random
) -> list[Record]:
    """At most `number` records: those of medium difficulty first, then other mixed ones, those without variance last.

    Within each of these drawn without replacement, in proportion to p (1 - p): the order of u^(1/w) for uniform u.
    Source: ExGRPO (arXiv:2510.02245) for the medium range; Efraimidis and Spirakis 2006 for the draw.
    """
    low, high = limits

    def rank(record: Record) -> tuple[int, float]:
        tier = 2 if record.learnability == 0 else 0 if low <= record.success <= high else 1
        weight = record.uncertainty if tier == 2 else record.learnability
        # -log(u) / w rises as u^(1/w) falls; 1 - u is never 0.
        return tier, -math.log(1 - chance.random()) / weight

    ranks = {record.key: rank(record) for record in records}
    return sorted(records, key=lambda record: ranks[record.key])[:number]


def by_due(records: Sequence[Record], number: int) -> list[Record]:
    """At most `number` records, those that have been due longest first; then those that will be soonest."""
    return sorted(records, key=lambda record: ((record.card or {"due": 0.0})["due"], record.key))[:number]
