"""Rewards made of rewards."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from hybrid.core import InputError
from hybrid.rewards.base import Answers, Reward, RewardError, Row, register_reward
from hybrid.rewards.output import Part
from hybrid.rewards.samples import Samples, shortened

__all__ = ["Component", "Composite", "Gated", "Max", "Min", "Product", "WeightedSum"]


@dataclass(frozen=True)
class Component:
    """A reward and how much it counts among its neighbours."""

    reward: Reward
    weight: float = 1.0


class Composite(Reward):
    """A reward made of others, by name. A kind of it implements `_combine`, for one sample.

    Two components of one name become "name" and "name#2". A sample that a component fails on fails here too; a
    component that skips a sample takes no part in it, and one that all of them skip is skipped.
    """

    takes_weights: ClassVar[bool] = False
    # Its parameters, besides `components`, that are a spec each, with the words that may stand there instead.
    inner_specs: ClassVar[Mapping[str, tuple[str, ...]]] = {}

    def __init__(self, components: list[Component]):
        if not components:
            raise InputError("components must hold at least one reward, got none")
        for index, component in enumerate(components):
            if component.weight != 1 and not self.takes_weights:
                raise InputError(
                    f"components[{index}].weight means nothing here; only weighted_sum, gated and mixture weigh, "
                    f"got {component.weight}"
                )
        if not math.isfinite(sum(abs(component.weight) for component in components)):
            raise InputError("components must have weights with a finite sum")
        names = _distinct([component.reward.component_name for component in components])
        self.components: dict[str, Component] = dict(zip(names, components, strict=True))

    def inner_rewards(self) -> Iterator[Reward]:
        return (component.reward for component in self.components.values())

    def setup(self, device: str | torch.device | None = None) -> None:
        for inner in self.inner_rewards():
            inner.setup(device)

    @property
    def needs_target(self) -> bool:  # type: ignore[override]
        return any(inner.needs_target for inner in self.inner_rewards())

    def check_data(self, targets: Sequence[Any], items: Sequence[Any], *, what: str, hint: str) -> None:
        for inner in self.inner_rewards():
            inner.check_data(targets, items, what=what, hint=hint)

    def _combine(self, scores: Sequence[float], weights: Sequence[float]) -> float:
        raise NotImplementedError(f"{type(self).__name__} must implement _combine")

    def _ask(self, samples: Samples) -> Answers:
        return self._combined(samples, self.components)

    def _combined(self, samples: Samples, components: dict[str, Component]) -> Answers:
        columns, parts = self._run_each(samples, components)
        weights = [component.weight for component in components.values()]
        return Answers(self._rows_of(columns, weights, samples.responses), parts, {})

    def _rows_of(
        self, columns: Sequence[Sequence[Row]], weights: Sequence[float], responses: Sequence[str]
    ) -> list[Row]:
        """What the components' columns come to, a row each."""
        rows: list[Row] = []
        for row, text in zip(zip(*columns, strict=True), responses, strict=True):
            failed = [entry for entry in row if isinstance(entry, RewardError)]
            present = [i for i, entry in enumerate(row) if entry is not None]
            if failed:
                rows.append(failed[0])
            elif not present:
                rows.append(None)
            else:
                rows.append(self._combined_row([row[i] for i in present], [weights[i] for i in present], text))
        return rows

    def _combined_row(self, scores: Sequence[float], weights: Sequence[float], response: str) -> Row:
        try:
            return self._number(self._combine(scores, weights), response)
        except (OverflowError, ValueError) as error:  # of fsum: too large, or inf - inf
            return self._failure(f"response {shortened(response)}", error)

    def _run_each(self, samples: Samples, components: dict[str, Component]) -> tuple[list[list[Row]], dict[str, Part]]:
        """The rows of each component, and the parts of them and of what they are made of."""
        columns: list[list[Row]] = []
        parts: dict[str, Part] = {}
        for name, component in components.items():
            rows, parts[name], inner = component.reward._run(samples)
            parts |= {f"{name}/{inner_name}": part for inner_name, part in inner.items()}
            for error in {id(row): row for row in rows if isinstance(row, RewardError)}.values():
                error.add_note(f"It is the component {name!r} of the reward {self.component_name!r}.")
            columns.append(rows)
        return columns, parts

    def _state(self) -> dict[str, Any]:
        return {name: component.reward.state_dict() for name, component in self.components.items()}

    def _check_state(self, state: dict[str, Any]) -> None:
        super()._check_state(state)
        states = self._states_of_components(state["reward"])
        for name, component in self.components.items():
            if name not in states:
                raise ValueError(
                    f"reward {self.component_name!r} has a component {name!r}, got a state of {', '.join(states)}: "
                    "the checkpoint is from a run with another reward"
                )
            component.reward._check_state(states[name])

    def _load_state(self, state: dict[str, Any]) -> None:
        states = self._states_of_components(state)
        for name, component in self.components.items():
            component.reward.load_state_dict(states[name])

    def _states_of_components(self, state: dict[str, Any]) -> dict[str, Any]:
        """Of what `_state` gives the states of the components, by name: all of it, where a kind keeps no more."""
        return state


@register_reward("weighted_sum")
class WeightedSum(Composite):
    """The weighted mean of the components, Σ w r / Σ w; Σ w r where Σ w = 0. A weight may be negative."""

    takes_weights = True

    def _combine(self, scores: Sequence[float], weights: Sequence[float]) -> float:
        return math.fsum(w * r for w, r in zip(weights, scores, strict=True)) / _divisor(weights)

    def _run_each(self, samples: Samples, components: dict[str, Component]) -> tuple[list[list[Row]], dict[str, Part]]:
        columns, parts = super()._run_each(samples, components)
        for i in range(len(samples.responses)):
            scores = {name: parts[name].score[i] for name in components}
            present = {name: score for name, score in scores.items() if score is not None}
            divisor = _divisor([components[name].weight for name in present])
            for name, score in present.items():
                parts[name].weighted[i] = components[name].weight * score / divisor
        return columns, parts


@register_reward("product")
class Product(Composite):
    """The product of the components."""

    def _combine(self, scores: Sequence[float], weights: Sequence[float]) -> float:
        return math.prod(scores)


@register_reward("min")
class Min(Composite):
    """The smallest of the components."""

    def _combine(self, scores: Sequence[float], weights: Sequence[float]) -> float:
        return min(scores)


@register_reward("max")
class Max(Composite):
    """The largest of the components."""

    def _combine(self, scores: Sequence[float], weights: Sequence[float]) -> float:
        return max(scores)


@register_reward("gated")
class Gated(WeightedSum):
    """The weighted mean of the other components where the first, the gate, is at least `threshold`; else `otherwise`.

    The others are asked only about the samples that pass: a gate saves what they cost.
    """

    def __init__(self, components: list[Component], threshold: float = 0.5, otherwise: float = 0.0):
        if len(components) < 2:
            raise InputError(f"components must be the gate and at least one more, got {len(components)}")
        super().__init__(components)
        for name, value in (("threshold", threshold), ("otherwise", otherwise)):
            if not math.isfinite(value):
                raise InputError(f"{name} must be finite, got {value}")
        if components[0].weight != 1:
            raise InputError(f"components[0].weight means nothing: it is the gate's, got {components[0].weight}")
        self.threshold, self.otherwise = threshold, float(otherwise)

    def _ask(self, samples: Samples) -> Answers:
        (gate_name, gate), *others = self.components.items()
        gates = self._combined(samples, {gate_name: Component(gate.reward)})
        passing = [i for i, row in enumerate(gates.rows) if isinstance(row, float) and row >= self.threshold]
        rows: list[Row] = [self.otherwise if isinstance(row, float) else row for row in gates.rows]
        if not passing:
            return Answers(rows, gates.parts, {})
        answers = self._combined(samples.of(passing), dict(others))
        for i, row in zip(passing, answers.rows, strict=True):
            rows[i] = row
        inner = {name: part.spread_over(passing, len(rows)) for name, part in answers.parts.items()}
        return Answers(rows, gates.parts | inner, {})


def _divisor(weights: Sequence[float]) -> float:
    total = math.fsum(weights)
    # 0.1 + 0.2 - 0.3 is not quite 0 in floating point, and must not multiply the reward by 1e16.
    return 1.0 if abs(total) <= 1e-12 * math.fsum(map(abs, weights)) else total


def _distinct(names: list[str]) -> list[str]:
    taken: list[str] = []
    for name in names:
        candidate, count = name, 1
        while candidate in taken:
            count += 1
            candidate = f"{name}#{count}"
        taken.append(candidate)
    return taken
