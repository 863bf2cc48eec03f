"""A sparse Markov chain whose transitions are worth what came of them. Numbers only: no prompts, no model."""

import math
import random
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence

from hybrid.core import InputError, unknown_name

__all__ = ["Chain"]


class Chain:
    """How much a visit to s' after s was worth, for the pairs that were seen.

        M[s, s'] <- (1 - decay) M[s, s'] + alpha (r + gamma r')                     (M = 0 before the first time)
        P[s, s'] = (1 - smoothing) softmax(M[s, .] / temperature) over the seen pairs of s  +  smoothing / N

    of N states. A row without a seen pair is 1 / N. With decay = alpha M is a running mean of r + gamma r'.
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
        while len(self.worth) > self.capacity:
            (first, second), _ = self.worth.popitem(last=False)
            del self._rows[first][second]
            if not self._rows[first]:
                del self._rows[first]

    def load(self, pairs: Iterable[tuple[str, str, float]]) -> None:
        """Hold exactly these, the pair that was followed last at the end."""
        self.worth, self._rows = OrderedDict(), {}
        for s, then, worth in pairs:
            self.worth[s, then] = worth
            self._rows.setdefault(s, {})[then] = None

    def seen(self, s: str) -> dict[str, float]:
        """The softmax over the seen pairs of a row; none where there are none. In order of name: sums have one."""
        row = {then: self.worth[s, then] / self.temperature for then in sorted(self._rows.get(s, ()))}
        if not row:
            return {}
        top = max(row.values())
        exps = {then: math.exp(value - top) for then, value in row.items()}
        total = sum(exps.values())
        return {then: value / total for then, value in exps.items()}

    def row(self, s: str, states: Sequence[str]) -> list[float]:
        """P[s, .] over these states, among which all of the row's are."""
        seen, even = self.seen(s), 1 / len(states)
        if not seen:
            return [even] * len(states)
        return [(1 - self.smoothing) * seen.get(then, 0.0) + self.smoothing * even for then in states]

    def draw(self, s: str | None, states: Sequence[str], chance: random.Random, without: Mapping[str, object]) -> str:
        """The next state after s (None: any), from its row without the states in `without`."""
        seen = {} if s is None else {then: p for then, p in self.seen(s).items() if then not in without}
        if seen and chance.random() >= self.smoothing:
            return chance.choices([*seen], weights=[*seen.values()])[0]
        return chance.choice([state for state in states if state not in without] or list(states))

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
