"""What an objective is: it says where its rows come from, and what their loss is."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Generic, NamedTuple, Protocol, cast

from hybrid.core import (
    Batch,
    Encoded,
    InputError,
    Labelled,
    Pairs,
    Record,
    Registry,
    Rollout,
    build,
    check_settings,
    parameters_of,
    unknown_name,
)
from hybrid.data import AnswerLoader, Loader, PairLoader
from hybrid.distributed import World
from hybrid.functional import AdaptiveKL, FixedKL
from hybrid.memory import Memory
from hybrid.models import Policy, Reference
from hybrid.objectives.accumulate import Loss, Term

__all__ = [
    "Measures",
    "Objective",
    "Objectives",
    "Parts",
    "check_objectives",
    "log_names",
    "make_objective",
    "objective_class",
    "objective_names",
    "register_objective",
]


class Parts(Protocol):
    """What an objective may use of the Learner that owns it."""

    policy: Policy
    references: list[Reference]
    kl: FixedKL | AdaptiveKL
    tokenizer: Any
    folder: Path | None  # the run's, where what was computed once may be kept
    world: World  # the run's processes, which go through the same steps

    @property
    def memory(self) -> Memory | None:
        """Which prompts come again, and the responses that it has kept; None where the run has none."""

    @property
    def loader(self) -> Loader:
        """Endless batches of the training data."""

    @property
    def ptx_loader(self) -> Loader:
        """Endless batches of the second data set."""

    @property
    def pair_loader(self) -> PairLoader:
        """Endless batches of pairs of answers."""

    @property
    def answer_loader(self) -> AnswerLoader:
        """Endless batches of good and bad answers."""

    def batch(self, rows: Batch | Iterable[Any]) -> Batch:
        """A batch, on the policy's device, of whatever the user calls rows."""

    def pairs(self, rows: Pairs | Iterable[Any]) -> Pairs:
        """The same, of pairs."""

    def answers(self, rows: Labelled | Iterable[Any]) -> Labelled:
        """The same, of good and bad answers."""

    def batches_of(self, examples: Sequence[Encoded]) -> list[Batch]:
        """These examples in batches of a supervised step's size."""

    def autocast(self) -> AbstractContextManager[Any]:
        """Computation in `model.precision`."""


class Measures(NamedTuple):
    """What an objective finds on held-out examples: numbers by name, and a row each for `samples.jsonl`."""

    metrics: dict[str, float]
    rows: list[dict[str, Any]]


class Objective(ABC, Generic[Record]):
    """One summand of a step's loss.

        @register_objective("calm")
        class Calm(Objective[Batch]):
            def rows(self): return self.parts.loader
            def loss_of(self, whole): return lambda part: (..., {})

    and `Plan(cycle, {"ppo": 1.0, "calm": 0.1})` adds it to PPO's. The Learner makes it at its first use; parameters of
    its constructor after `parts` that are called like a section of the config (`sft`, `ppo`, `kl`) are given that
    section, the others are its own, from the config's `objectives.NAME`, which may also give it its `TermSettings`.
    """

    label: ClassVar[str] = ""  # the name in logs; "": the one it is registered by
    rolls_out: ClassVar[bool] = False  # whether its rows are minibatches of the step's rollout
    needs_reward: ClassVar[bool] = True  # of one that rolls out, whether the responses have to be scored
    imitates: ClassVar[bool] = False  # of one that rolls out, whether any decoder may have found the responses
    windowed: ClassVar[bool] = False  # of one that rolls out, whether its loss sees what the decoder's `window` lets it
    needs_reward_head: ClassVar[bool] = False  # whether the policy has to have one
    needs_memory: ClassVar[bool] = False  # whether it learns from what a memory has kept
    dropout: ClassVar[bool] = True  # whether the policy is in training mode
    lr_factor: float = 1.0  # see `Term`
    microbatch_size: int | None = None  # see `Term`

    def __init__(self, parts: Parts):
        self.parts = parts
        # What `make_objective` knows: the name that it is registered by, and where the config has its settings.
        self.name = self.section = ""

    def rows(self) -> Iterator[Record]:
        """Its own rows, an update's worth each, without end.

        In one update objectives that return the same iterator, `parts.loader` say, share what it gives.
        """
        raise InputError(f"objective {self.name!r} has no rows of its own: it needs a rollout")

    def rows_of(self, given: Any) -> Record:
        """An update's rows on the policy's device, of whatever the user calls rows."""
        rows: Any = self.parts.batch(given)
        return cast(Record, rows)

    def learnt(self, rollout: Rollout) -> Record:
        """What it learns from of the step's rollout, which has advantages; its minibatches are parts of that."""
        rows: Any = rollout
        return cast(Record, rows)

    @classmethod
    def check_settings(cls, **settings: Any) -> None:
        """Refuse (InputError, ValueError) values in the config's `objectives.NAME`, before a model is loaded."""

    def check(self) -> None:
        """Refuse (InputError), before a run's first step, what it could not learn from: examples without a target."""
        source = None if self.rolls_out else self.rows()
        if isinstance(source, Loader) and not any(example.has_target for example in source.examples):
            raise InputError(
                f"this mixture learns from targets, and none of the {len(source.examples)} examples of objective "
                f"{self.name!r} has one; name their column, or leave the objective out of mixing"
            )

    def evaluate(self, examples: Sequence[Encoded], batch_size: int) -> Measures:
        """Its own measures of held-out examples; of most objectives there are none."""
        return Measures({}, [])

    def state_dict(self) -> dict[str, Any]:
        """What its next rows and losses depend on beside the learner's own state; of most objectives nothing."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict`, which was not empty, was taken."""
        raise InputError(f"objective {self.name!r} keeps no state, and the checkpoint has one, of another version")

    @abstractmethod
    def loss_of(self, whole: Record) -> Callable[[Record], Loss]:
        """The loss of an update's rows, as a function of any part of them: part -> (loss, metrics).

        The loss is a sum over the part, divided by the count of the WHOLE: the losses of the parts add up. So do
        metrics whose name ends in `loss`; of `_max` the maximum is taken, of the others a mean weighted by
        `Rows.mean_over`: by tokens, or by pairs.
        """

    def term(self, rows: Record, coef: float = 1.0) -> Term[Record]:
        """coef * the loss of these rows, as a summand of an update. Raises InputError where no token is trained."""
        if not rows.num_tokens:
            raise InputError(
                f"objective {self.name!r}: none of the {len(rows)} rows has a target to train on; give it rows with one"
            )
        loss_of = self.loss_of(rows)

        def loss(part: Record) -> Loss:
            self.parts.policy.train(self.dropout)
            with self.parts.autocast():
                return loss_of(part.trimmed())

        return Term(self.label or self.name, rows, loss, coef, self.microbatch_size, self.lr_factor, self.section)


@dataclass(frozen=True)
class TermSettings:
    """What the config's `objectives.NAME` may say of every objective that has no section of its own; see `Term`."""

    lr_factor: float = 1.0
    microbatch_size: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.lr_factor < math.inf:
            raise InputError(f"lr_factor must be >= 0 and finite, got {self.lr_factor}")
        if self.microbatch_size is not None and self.microbatch_size < 1:
            raise InputError(f"microbatch_size must be >= 1, got {self.microbatch_size}")


_objectives: Registry[type[Objective[Any]]] = Registry("objective")
register_objective = _objectives.register


def objective_names() -> list[str]:
    """The names that a Plan may hold."""
    return list(_objectives)


def objective_class(name: str) -> type[Objective[Any]]:
    """The class that a name is registered for. Raises InputError with the nearest name."""
    return _objectives[name]


def log_names(names: Iterable[str]) -> dict[str, str]:
    """What the objectives of a step are called in logs: by their labels, or their own names where a label is taken."""
    called: dict[str, str] = {}
    for name in names:
        label = objective_class(name).label or name
        called[name] = name if label in called.values() else label
    return called


def make_objective(
    name: str, parts: Parts, sections: Mapping[str, Any], settings: Mapping[str, Any] | None = None
) -> Objective[Any]:
    """The objective of that name. sections: of the config, by name.   settings: its own, from `objectives.NAME`."""
    factory = _objectives[name]
    settings = dict(settings or {})
    of_term = _term_settings(name, settings)
    taken = list(parameters_of(factory))[1:]
    given = {key: sections[key] for key in taken if key in sections}
    given |= {key: value for key, value in settings.items() if key not in of_term}
    made: Objective[Any] = build(partial(factory, parts), given, what=f"objective {name!r}", path=f"objectives.{name}")
    made.name, made.section = name, name if name in sections else f"objectives.{name}"
    for key, value in of_term.items():
        setattr(made, key, value)
    return made


def _term_settings(name: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Those of an objective's settings that are `TermSettings`, checked."""
    given = {f.name: settings[f.name] for f in fields(TermSettings) if f.name in settings}
    build(TermSettings, given, what=f"objective {name!r}", path=f"objectives.{name}")
    return given


class Objectives(dict[str, Objective[Any]]):
    """A learner's objectives by name, each made when it is first asked for.

    sections: gives the sections of the config by name.
    """

    def __init__(self, parts: Parts, sections: Callable[[], Mapping[str, Any]]):
        super().__init__()
        self._parts, self._sections = parts, sections
        self._rows: dict[str, Iterator[Any]] = {}

    def __missing__(self, name: str) -> Objective[Any]:
        sections = self._sections()
        self[name] = made = make_objective(name, self._parts, sections, sections["objectives"].get(name))
        return made

    def next_rows(self, names: Iterable[str], batches: Mapping[str, Iterator[Any]] | None = None) -> dict[str, Any]:
        """What these learn from in one update, by name: the next of batches[name], else of the objective's own rows.

        Those that draw from one iterator, as from the training data, share what it gives. One whose `batches` have come
        to their end is left out. Raises InputError where an objective's own rows have.
        """
        given = batches or {}
        sources = {name: given[name] if name in given else self._own_rows(name) for name in names}
        distinct = {id(source): source for source in sources.values()}
        drawn = {key: next(source, None) for key, source in distinct.items()}
        rows = {name: drawn[id(source)] for name, source in sources.items() if drawn[id(source)] is not None}
        for name in sources.keys() - rows.keys() - given.keys():
            raise InputError(f"objective {name!r}: its rows have come to an end; rows() must go on without one")
        return rows

    def _own_rows(self, name: str) -> Iterator[Any]:
        if name not in self._rows:
            self._rows[name] = iter(self[name].rows())
        return self._rows[name]


def check_objectives(settings: Mapping[str, Any], sections: Collection[str]) -> None:
    """Refuse the config's `objectives` where a name or a key in it is none. sections: names of the config's others."""
    for name, own in settings.items():
        if not isinstance(own, Mapping):
            raise InputError(f"config: objectives.{name} must be a mapping of its settings, got {own!r:.60}")
        if name in sections:
            raise InputError(
                f"config: objective {name!r} has its settings in the section {name!r}, not in objectives.{name}"
            )
        own_names = list(parameters_of(_objectives[name]))[1:]
        known = {*own_names, *parameters_of(TermSettings)}.difference(sections)
        for key in own:
            if key not in known:
                raise unknown_name(f"setting of objective {name!r}: objectives.{name}.", str(key), known)
        _term_settings(name, own)
        factory, path = _objectives[name], f"objectives.{name}"
        values = {key: value for key, value in own.items() if key in own_names}
        check_settings(factory, values, what=f"objective {name!r}", path=path)
        try:
            factory.check_settings(**values)
        except ValueError as error:
            raise InputError(f"config: {path}: {error}") from error
