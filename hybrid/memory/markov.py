"""A Markov chain over prompts: the next one is drawn from the row of the last."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from statistics import fmean
from typing import Any, Literal

import torch
from torch import Tensor

from hybrid.core import Encoded, InputError
from hybrid.memory.chain import Chain, unknown_state
from hybrid.memory.clusters import clusters_of
from hybrid.memory.memory import Memory, register_memory
from hybrid.memory.visits import Visit, example_key

__all__ = ["MarkovMemory", "State"]


@dataclass
class State:
    """A prompt, or a cluster of them. level: the running mean of its rewards.   best: its best reward, and response."""

    text: str = ""
    visits: int = 0
    level: float = 0.0
    best: float | None = None
    response: str = ""


@register_memory("markov")
@dataclass
class MarkovMemory(Memory):
    """A chain over prompts that holds how much a visit to s' after s was worth; see `Chain` for the formulas.

        memory = MarkovMemory()
        memory.add("2+2=", "4", reward=1.0)     # a visit; in a run the mean score of the prompt's responses
        memory.add("3+5=", "7", reward=0.0)
        memory.update()                         # the chain learns the visits since the last update, in their order
        memory.next_state("2+2=")               # the likeliest next one
        memory.sample(8)                        # a walk of 8, from where the last one ended
        memory.transition_probabilities()       # (N, N), rows sum to 1

    In a run the share `uniform` of each rollout stays as the data's loader drew it; the others are a walk that begins
    at the last prompt of the rollout before, without a prompt twice; with the probability `smoothing` a step of it
    goes to any prompt of the data. Of a cluster any prompt comes.
    prefer: reward: r is the score: what led to reward comes again.   progress: r is the gain over the state's running
        mean reward: what led to learning comes again (Matiisen et al. 2017, arXiv:1707.00183).
    capacity bounds the pairs and, apart from these, the states: beyond it the oldest are forgotten.
    """

    capacity: int = 20000
    alpha: float = 0.1
    gamma: float = 0.9
    decay: float = 0.1
    temperature: float = 0.1
    smoothing: float = 0.1
    prefer: Literal["reward", "progress"] = "reward"
    uniform: float = 0.1
    clusters: int | None = None  # states are so many clusters of prompts by `embedder`; None: the prompts themselves
    embedder: str | None = None  # "module:name": texts -> a vector each
    path: str | None = None  # begin with another run's memory: its folder, or its memory.jsonl

    def __post_init__(self) -> None:
        names = ("capacity", "alpha", "gamma", "decay", "temperature", "smoothing")
        self.chain = Chain(**{name: getattr(self, name) for name in names})
        self.chain.check()
        if not 0 <= self.uniform <= 1:
            raise InputError(f"uniform must lie in [0, 1], got {self.uniform}")
        if (self.clusters is None) != (self.embedder is None):
            raise InputError(
                f"clusters and embedder go together, got {self.clusters} and {self.embedder!r}: give both or neither"
            )
        if self.clusters is not None and self.clusters < 1:
            raise InputError(f"clusters must be at least 1, got {self.clusters}")
        self.states: dict[str, State] = {}
        self.last: str | None = None  # where the chain stands
        self._last_reward = 0.0  # what it came there with
        self.draws = 0  # of `sample` so far
        self._waiting: list[tuple[str, float]] = []
        self._state_of: dict[str, str] = {}
        self._prompts: dict[str, list[str]] = {}  # of a state, the keys of the run's prompts in it

    def attach(self, examples: Sequence[Encoded], tokenizer: Any = None, *, seed: int = 0) -> None:
        super().attach(examples, tokenizer, seed=seed)
        self._state_of = {key: key for key in self.pool}
        if self.clusters is not None and self.embedder is not None:
            found = clusters_of([e[0].prompt for e in self.pool.values()], self.embedder, self.clusters, seed)
            self._state_of = {key: f"cluster {number}" for key, number in zip(self.pool, found, strict=True)}
        self._prompts = {}
        for key, state in self._state_of.items():
            self._prompts.setdefault(state, []).append(key)

    # The mission's own names

    def add(self, prompt: str, response: str, reward: float) -> None:
        """A visit to the state `prompt`, and what its response got. The chain learns it at the next `update`.

        Raises InputError for a reward that is not finite: it would spoil every mean that it goes into.
        """
        if not math.isfinite(reward):
            raise InputError(f"the reward of a visit must be finite, got {reward}; leave out what has no score")
        state = self.states.pop(prompt, State(text=prompt))
        self.states[prompt] = state  # the one visited last comes last
        gain = reward - state.level if state.visits else 0.0
        state.level = state.level + self.alpha * gain if state.visits else reward
        state.visits += 1
        if state.best is None or reward > state.best:
            state.best, state.response = reward, response
        self._waiting.append((prompt, gain if self.prefer == "progress" else reward))
        self._forget()

    def _forget(self) -> None:
        while len(self.states) > self.capacity:
            del self.states[next(iter(self.states))]

    def update(self) -> None:
        """Follow the visits since the last update, in their order, from where the chain stands."""
        # What the first visit leaves with was its reward when the last update took it in.
        visits = [*([] if self.last is None else [(self.last, self._last_reward)]), *self._waiting]
        for (s, reward), (then, next_reward) in pairwise(visits):
            self.chain.follow(s, then, reward, next_reward)
        if visits:
            self.last, self._last_reward = visits[-1]
        self._waiting = []

    def next_state(self, state: str) -> str:
        """The likeliest state after this one; of equal ones the first by name. Raises InputError for an unknown one."""
        names = self._names()
        if state not in names:
            raise unknown_state(state, names)
        row = self.chain.row(state, names)
        return names[max(range(len(names)), key=row.__getitem__)]

    def sample(self, k: int) -> list[str]:
        """A walk of k states from where the chain stands, which stays there."""
        names, at = self._names(), self.last
        chance = self.chance(self.draws)
        self.draws += 1
        walk: list[str] = []
        for _ in range(k):
            at = self.chain.draw(at, names, chance, {})
            walk.append(at)
        return walk

    def transition_probabilities(self, names: Sequence[str] | None = None) -> Tensor:
        """P[s, s'], (N, N) float64, rows sum to 1; over all states in order of name.

        names: the states whose rows are wanted; None: all, which are N^2 numbers. Raises InputError for an unknown one.
        """
        every = self._names()
        wanted, known = every if names is None else names, {*every}
        for state in wanted:
            if state not in known:
                raise unknown_state(state, every)
        rows = [self.chain.row(state, every) for state in wanted]
        return torch.tensor(rows, dtype=torch.float64).view(len(wanted), len(every))

    def _names(self) -> list[str]:
        """The run's states and those that were visited, in order of name. Raises InputError where there is none."""
        names = sorted({*self._prompts, *self.states, *self.chain.states()})
        if not names:
            raise InputError("this memory is empty: add(prompt, response, reward) what was tried before you sample")
        return names

    # In a run

    def pick(self, drawn: Sequence[Encoded], step: int) -> list[Encoded]:
        number, chance = len(drawn), self.chance(step)
        # Of a chain that began in another run: states of which this one has no prompt.
        foreign = [state for state in self.chain.states() if state not in self._prompts]
        states = [*self._prompts, *foreign]
        picked = {example_key(example): example for example in drawn[: round(self.uniform * number)]}
        at = self.last
        full = dict.fromkeys(foreign)  # states none of whose prompts is left
        while len(picked) < min(number, len(self.pool)):
            at = self.chain.draw(at, states, chance, full)
            free = [key for key in self._prompts[at] if key not in picked]
            if free:
                key = free[chance.randrange(len(free))]
                examples = self.pool[key]
                picked[key] = examples[step % len(examples)]
            if len(free) <= 1:
                full[at] = None
        return [*picked.values(), *drawn][:number]

    def knows(self, key: str) -> bool:
        return self._state_of.get(key, key) in self.states

    def visited(self, visits: Sequence[Visit], step: int) -> None:
        for visit in visits:
            state = self._state_of.get(visit.key, visit.key)
            best = max(visit.rows, key=lambda row: row.score)
            self.add(state, best.text, visit.score)
            self.states[state].text = state if self.clusters else visit.text
        self.update()

    def metrics(self) -> dict[str, float]:
        levels = [state.level for state in self.states.values()]
        known = sum(state in self.states for state in self._prompts) / max(len(self._prompts), 1)
        mean = {"memory/level": fmean(levels)} if levels else {}
        return {**super().metrics(), **mean, "memory/unseen": 1 - known, "memory/pairs": float(len(self.chain.worth))}

    def header(self) -> dict[str, Any]:
        own = {"last": self.last, "last_reward": self._last_reward, "draws": self.draws}
        return {**super().header(), **own, "waiting": [list(visit) for visit in self._waiting]}

    def rows(self) -> list[dict[str, Any]]:
        states: list[dict[str, Any]] = [{"state": name, **asdict(state)} for name, state in self.states.items()]
        return states + [{"from": s, "to": then, "worth": worth} for (s, then), worth in self.chain.worth.items()]

    def load_rows(self, rows: Sequence[Mapping[str, Any]], header: Mapping[str, Any]) -> None:
        self.last, self._last_reward, self.draws = header["last"], header["last_reward"], header["draws"]
        self._waiting = [(state, reward) for state, reward in header["waiting"]]
        self.states = {
            row["state"]: State(**{key: x for key, x in row.items() if key != "state"})
            for row in rows
            if "state" in row
        }
        self._forget()
        self.chain.load([(row["from"], row["to"], row["worth"]) for row in rows if "from" in row])
