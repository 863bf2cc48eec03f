"""A sparse Markov chain whose transitions are worth what came of them. Numbers only: no prompts, no model."""

import math
import random
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence

from hybrid.core import InputError, unknown_name

__all__ = ["Chain"]


class Chain:
    """How much a visit to s' after s was worth, for the pairs that were seen.

        M[s, s'] <- (1 - decay) M[s, s'] + alpha (r + gamma r')         (0 before the first time)
        P[s, s'] = (1 - smoothing) softmax(M[s, .] / temperature) + smoothing / N

    over N states. A pair that was never seen counts as M = 0, so that it is tried where those that were are worth
    little; a row without a seen pair is 1 / N. With decay = alpha M tends to the mean of r + gamma r'.
    capacity: pairs; beyond it the one is forgotten that was followed longest ago.
    """

    def __init__(
        self, *, capacity: int, alpha: float, gamma: float, decay: float, temperature: float, smoothing: float
    ):
        self.capacity, self.alpha, self.gamma, self.decay = capacity, alpha, gamma, decay
        self.temperature, self.smoothing = temperature, smoothing
        self.worth: OrderedDict[tuple[str, str], float] = OrderedDict()  # the pair that was followed last comes last
        self._rows: dict[str, dict[str, None]] = {}

    def follow(self, s: str, then: str, reward: float, next_reward: float) -> None:
        """A visit to `then` came after one to `s`, with these rewards."""
        pair = s, then
        old = self.worth.pop(pair, 0.0)
        self.worth[pair] = (1 - self.decay) * old + self.alpha * (reward + self.gamma * next_reward)
        self._rows.setdefault(s, {})[then] = None
        self._forget()

    def _forget(self) -> None:
        while len(self.worth) > self.capacity:
            (first, second), _ = self.worth.popitem(last=False)
            del self._rows[first][second]
            if not self._rows[first]:
                del self._rows[first]

    def load(self, pairs: Iterable[tuple[str, str, float]]) -> None:
        """Hold these and no others, the pair that was followed last at the end."""
        self.worth, self._rows = OrderedDict(), {}
        for s, then, worth in pairs:
            self.worth[s, then] = worth
            self._rows.setdefault(s, {})[then] = None
        self._forget()

    def row(self, s: str, states: Sequence[str]) -> list[float]:
        """P[s, .] over these states, among which all of the row's are."""
        weights, unseen = self._weights(s)
        total = sum(weights.values()) + unseen * (len(states) - len(weights))
        even = self.smoothing / len(states)
        return [(1 - self.smoothing) * weights.get(then, unseen) / total + even for then in states]

    def draw(self, s: str | None, states: Sequence[str], chance: random.Random, without: Mapping[str, object]) -> str:
        """The next state after s (None: any), from its row without the states in `without`, if others are left."""
        weights: dict[str, float] = {}
        if s is not None and chance.random() >= self.smoothing:
            every, unseen = self._weights(s)
            weights = {then: weight for then, weight in every.items() if then not in without}
            num_others = len(states) - len(without) - len(weights)
            if chance.random() * (sum(weights.values()) + unseen * max(num_others, 0)) < sum(weights.values()):
                return chance.choices([*weights], weights=[*weights.values()])[0]
            # One of those that never followed s.
            without = {**without, **weights}
        return chance.choice([state for state in states if state not in without] or list(states))

    def _weights(self, s: str) -> tuple[dict[str, float], float]:
        """exp(M / temperature) over the largest: of the pairs that were seen, by name, and of one that was not.

        In order of name, because a sum of floats depends on its order.
        """
        row = {then: self.worth[s, then] / self.temperature for then in sorted(self._rows.get(s, ()))}
        top = max([0.0, *row.values()])
        return {then: math.exp(value - top) for then, value in row.items()}, math.exp(-top)

    def states(self) -> Iterator[str]:
        """Every state of a pair, once."""
        return iter(dict.fromkeys(state for pair in self.worth for state in pair))

    def check(self) -> None:
        """Refuse what no chain can have."""
        if self.capacity < 1:
            raise InputError(f"capacity must be at least 1, got {self.capacity}")
        if not 0 < self.alpha <= 1:
            raise InputError(f"alpha must lie in (0, 1], got {self.alpha}")
        for name in ("gamma", "decay", "smoothing"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name} must lie in [0, 1], got {getattr(self, name)}")
        if not self.temperature > 0:
            raise InputError(f"temperature must be > 0, got {self.temperature}")


def unknown_state(state: str, known: Sequence[str]) -> InputError:
    """The error for a state that the chain has never been in."""
    return unknown_name("state of the chain", state, known)
