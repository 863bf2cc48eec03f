"""What a reward is: texts in, one finite number each out; and the names rewards are known by."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeVar

import torch

from hybrid.core import InputError, Registry
from hybrid.rewards.fit import counted_cuts
from hybrid.rewards.host import Hooks
from hybrid.rewards.output import Part, RewardOutput
from hybrid.rewards.postprocess import Postprocess
from hybrid.rewards.samples import Samples, Target, has_text, shortened

__all__ = [
    "AllSkipped",
    "Handling",
    "Reward",
    "RewardError",
    "RewardTimeout",
    "Row",
    "Unjudged",
    "canonical",
    "register_reward",
    "rewards",
]

F = TypeVar("F", bound=Callable[..., Any])

# A batch's scores are whitened in float32: the squares of a million such scores still have a sum there (3e38).
LARGEST = 1e16

rewards: Registry[Callable[..., Any]] = Registry("reward")
canonical: dict[str, str] = {}  # every registered name and alias, lower case -> the name it was registered by


class RewardError(RuntimeError):
    """A reward raised, or returned what is no score. A failed reward never becomes 0."""


class AllSkipped(RewardError):
    """A reward skipped every response of a batch."""


class RewardTimeout(RewardError):
    """A reward did not answer in its time."""


# What a reward has for a sample: a score; what went wrong; or None, where it is skipped.
Row = float | RewardError | None


@dataclass(frozen=True)
class Handling:
    """What a spec may say of any reward, whatever its type."""

    on_error: Literal["raise", "value", "skip"] = "raise"  # skip: the neighbours' weights count alone for that sample
    error_value: float | None = None  # with on_error "value": the score of a sample that failed
    empty_value: float | None = None  # the score of an empty response, which the reward is then not asked about
    max_chars: int | None = None  # texts are cut to so many characters before they are scored
    postprocess: tuple[Postprocess, ...] = ()  # applied in order; not to error_value and empty_value

    def __post_init__(self) -> None:
        for name in ("error_value", "empty_value"):
            value = getattr(self, name)
            if value is not None:
                if not math.isfinite(value):
                    raise InputError(f"{name} must be finite, got {value}")
                object.__setattr__(self, name, float(value))
        if (self.on_error == "value") != (self.error_value is not None):
            raise InputError(
                f"error_value must be given with on_error 'value' and only then; on_error is {self.on_error!r}"
            )
        if self.max_chars is not None and self.max_chars < 1:
            raise InputError(f"max_chars must be at least 1, got {self.max_chars}")


class Answers(NamedTuple):
    """What came of asking a reward, before its own postprocessing: a row for each sample, and the parts inside it."""

    rows: list[Row]
    parts: dict[str, Part]
    counts: dict[str, float]


class Reward(Hooks):
    """Scores responses. A leaf implements one of two hooks, and nothing else:

        _score_one(response, target, prompt, item) -> float
        _score(responses, targets, prompts, items) -> one number each   # where a batch is cheaper

    Its parameters are the fields of its dataclass, or what its `__init__` takes; bad ones raise InputError
    with a message that starts with the parameter's name. The hooks' results are checked here, once, for all;
    `_score` may put an exception in the place of a number. Samples that agree in what the reward `reads` are asked
    about once, and of several references the best counts. A reward that remembers implements `_state` and
    `_load_state` too; one that needs the run, or is to hear of it, what it wants of `Hooks`.
    """

    # In logs and errors: the registered name, unless the spec gives another. Not `name`: a parameter may be.
    component_name = "reward"
    handling = Handling()
    spec: Any = None  # what `make_reward` made it from
    needs_batch: bool = False  # the score depends on the other samples, or on earlier ones
    needs_target: bool = False  # without any target its scores mean nothing
    takes_none: bool = (
        False  # None in a number's place says that the reward does not apply to the sample: it is skipped
    )
    takes_references: bool = False  # the target is handed on as it came, be it a list
    reads: tuple[str, ...] = ("response", "target", "prompt", "item")  # what makes two samples different
    char_limit: int | None = None  # the `max_chars` of this type, where the spec gives none

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "component_name" not in vars(cls):
            cls.component_name = cls.__name__

    def __call__(
        self, response: str | None, target: Target | None = "", *, prompt: str | None = "", item: Any = None
    ) -> float:
        """The score of one sample. None is a legal text, the empty one."""
        return self.score([response], [target or ""], [prompt], [item])[0]

    def score(
        self,
        responses: Sequence[str | None] | Samples,
        targets: Sequence[Target | None] | None = None,
        prompts: Sequence[str | None] | None = None,
        items: Sequence[Any] | None = None,
    ) -> RewardOutput:
        """The score of each sample of a batch: a list of floats, with the parts that they are made of.

        responses: B texts, None being ""; or the whole batch, as `Samples`.   targets: a text each, or a list of
        references, of which the best counts.   items: whatever else the reward is to know of each sample.
        Raises RewardError where there is no score, ValueError if the lengths differ. A reward that needs a target has
        no score in a batch without any: no `targets`, or None for all. Among others a None is "".
        """
        columns = responses if isinstance(responses, Samples) else (responses, targets, prompts, items)
        rows, part, inner = self._run(Samples.checked(*columns), outermost=True)
        for index, row in enumerate(rows):
            if isinstance(row, RewardError):
                row.add_note(f"It is sample {index} of the batch.")
                raise row
        scores = [math.nan if row is None else float(row) for row in rows]  # type: ignore[arg-type]
        return RewardOutput(scores, part.raw, inner or {self.component_name: part})

    def setup(self, device: str | torch.device | None = None) -> None:
        """Load what scoring needs, onto `device`. Without it that happens at the first score."""

    def check_data(self, targets: Sequence[Any], items: Sequence[Any], *, what: str, hint: str) -> None:
        """Raises InputError where data lack what the reward needs. Nothing has been loaded by then.

        what: the samples' name in the message ("training examples").   hint: how to give them what is missing.
        """
        if self.needs_target and targets and not any(map(has_text, targets)):
            raise InputError(
                f"reward {self.component_name!r} compares with a target, and none of the {len(targets)} {what} "
                f"has one: {hint}, or take another reward"
            )

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to score alike; most rewards keep nothing between batches."""
        return {"reward": self._state(), "postprocess": [step.state_dict() for step in self.handling.postprocess]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what `state_dict` gave. Raises ValueError if it is another reward's."""
        self._check_state(state)
        self._load_state(state["reward"])
        for step, saved in zip(self.handling.postprocess, state["postprocess"], strict=True):
            step.load_state_dict(saved)

    def drain_counters(self) -> dict[str, float]:
        """What the reward has counted since it was last asked this, for the log."""
        return {}

    def _prepare(self) -> None:
        """Load what is not loaded yet: what fails here is no sample's fault."""

    def _score_one(self, response: str, target: Any, prompt: str, item: Any) -> float:
        raise NotImplementedError(f"{type(self).__name__} must implement _score_one or _score")

    def _score(self, responses: list[str], targets: list[Any], prompts: list[str], items: list[Any]) -> Sequence[Any]:
        scores: list[Any] = []
        for sample in zip(responses, targets, prompts, items, strict=True):
            try:
                scores.append(self._score_one(*sample))
            except InputError:
                raise
            except Exception as error:  # noqa: BLE001 - it stands in the sample's place until `handling` decides
                scores.append(error)
        return scores

    def _state(self) -> dict[str, Any]:
        return {}

    def _load_state(self, state: dict[str, Any]) -> None:
        """Take up what `_state` gave."""

    def _check_state(self, state: dict[str, Any]) -> None:
        """Raises ValueError where `state` is not of a reward like this one. Nothing has been loaded by then."""
        own, other = _names(self.state_dict()), _names(state)
        if own != other:
            raise ValueError(
                f"reward {self.component_name!r} has the state {own}, got {other}: "
                "the checkpoint is from a run with another reward"
            )

    def _run(self, samples: Samples, *, outermost: bool = False) -> tuple[list[Row], Part, dict[str, Part]]:
        """All that happens to a batch of checked samples, whatever the reward: limits, the reward, its `handling`.

        outermost: whether the scores are what training sees, which may be LARGEST at most.
        Returns a row for each sample, this reward's part in it and those of its components.
        """
        began = time.perf_counter()
        handling, num_rows = self.handling, len(samples.responses)
        counts: dict[str, float] = {}
        if limit := handling.max_chars or self.char_limit:
            samples, counts["truncated"] = samples.cut(limit)
        asked = [i for i, text in enumerate(samples.responses) if handling.empty_value is None or text.strip()]
        with counted_cuts() as cuts:
            answers = self._ask(samples.of(asked)) if asked else Answers([], {}, {})
        if cuts:
            counts["truncated"] = counts.get("truncated", 0) + sum(cuts)
        processed = self._postprocessed(answers.rows, samples.of(asked), outermost)
        failures = [row for row in processed if isinstance(row, RewardError)]
        counts["invalid"] = len(failures)
        if skipped := sum(row is None for row in answers.rows):
            counts["skipped"] = skipped
        counts["timeouts"] = sum(isinstance(failure, RewardTimeout) for failure in failures)
        for name, count in (*answers.counts.items(), *self.drain_counters().items()):
            counts[name] = counts.get(name, 0) + count
        rows: list[Row] = [handling.empty_value] * num_rows
        raw: list[float | None] = [None] * num_rows
        for i, answer, row in zip(asked, answers.rows, processed, strict=True):
            replaced = isinstance(row, RewardError) and handling.on_error != "raise"
            raw[i], rows[i] = _number_in(answer), handling.error_value if replaced else row
        score = [_number_in(row) for row in rows]
        part = Part(raw, score, list(score), counts, time.perf_counter() - began)
        return rows, part, {name: inner.spread_over(asked, num_rows) for name, inner in answers.parts.items()}

    def _ask(self, samples: Samples) -> Answers:
        """Ask the hook about each different sample once, and about one reference at a time."""
        if samples.responses and samples.targets[0] is None:
            if self.needs_target:
                said = f"reward {self.component_name!r} compares with a target, and no sample of the batch has one"
                return Answers([RewardError(said)] * len(samples.responses), {}, {})
            samples = samples._replace(targets=[""] * len(samples.responses))
        if self.needs_batch:
            return Answers(self._answers(samples), {}, {})
        places: dict[Any, int] = {}
        distinct: list[tuple[Any, ...]] = []
        asked_for: list[list[int]] = []  # of each sample, the places in `distinct`: one for each reference
        for response, target, prompt, item in zip(*samples, strict=True):
            several = isinstance(target, list) and not self.takes_references
            asked_for.append([])
            for reference in target if several else [target]:
                sample = {"response": response, "target": reference, "prompt": prompt, "item": id(item)}
                key = tuple(tuple(x) if isinstance(x, list) else x for x in map(sample.get, self.reads))
                if key not in places:
                    places[key] = len(distinct)
                    distinct.append((response, reference, prompt, item))
                asked_for[-1].append(places[key])
        answers = self._answers(Samples(*map(list, zip(*distinct, strict=True))))
        rows = [_best([answers[place] for place in of_sample]) for of_sample in asked_for]
        return Answers(rows, {}, {"cache_hits": sum(map(len, asked_for)) - len(distinct)})

    def _answers(self, samples: Samples) -> list[Row]:
        """The hook's word on each sample, checked. A batch that fails is asked one by one, to fail where it must."""
        responses = samples.responses
        self._prepare()
        try:
            values = self._score(*samples.copied(items="item" in self.reads))
        except InputError:  # what the reward needs cannot be loaded: no sample's fault
            raise
        except Exception as error:  # noqa: BLE001 - it stands in the sample's place until `handling` decides
            if len(responses) > 1 and not self.needs_batch:
                return [row for i in range(len(responses)) for row in self._answers(samples.of([i]))]
            where = f"a batch of {len(responses)}, the first response" if len(responses) > 1 else "response"
            return [self._failure(f"{where} {shortened(responses[0])}", error)] * len(responses)
        return self._checked(values, responses)

    def _postprocessed(self, rows: Sequence[Row], samples: Samples, outermost: bool) -> list[Row]:
        """The rows after the postprocessing. One that is too large fails before a step that would remember it."""
        for step in self.handling.postprocess:
            rows = self._bounded(rows, samples) if step.remembers else list(rows)
            valid = [i for i, row in enumerate(rows) if isinstance(row, float)]
            scores = step([rows[i] for i in valid])  # type: ignore[misc]
            for i, score in zip(valid, scores, strict=True):
                rows[i] = self._number(score, samples.responses[i])
        return self._bounded(rows, samples) if outermost else list(rows)

    def _bounded(self, rows: Sequence[Row], samples: Samples) -> list[Row]:
        return [
            self._number(row, text, LARGEST) if isinstance(row, float) else row
            for row, text in zip(rows, samples.responses, strict=True)
        ]

    def _checked(self, values: Any, responses: Sequence[str]) -> list[Row]:
        """`values` as rows: exactly one for each response, each a finite number or an error in its place."""
        try:
            count = None if isinstance(values, (str, bytes, bytearray, dict, set)) else len(values)
        except TypeError:  # a scalar
            count = None
        if count != len(responses):
            got = f"the one value {values!r}" if count is None else f"{count} values"
            return [
                RewardError(
                    f"reward {self.component_name!r} must return a list of one number per response; "
                    f"got {got} for {len(responses)} responses"
                )
            ] * len(responses)
        return [self._number(value, text) for value, text in zip(values, responses, strict=True)]

    def _number(self, value: Any, response: str, largest: float = torch.finfo(torch.float32).max) -> Row:
        if isinstance(value, Exception):
            return self._failure(f"response {shortened(response)}", value)
        if value is None and self.takes_none:
            return None
        try:
            # float("0.5") would pass.
            number = math.nan if isinstance(value, (str, bytes)) else float(value)
        except (TypeError, ValueError, OverflowError, RuntimeError):  # torch raises RuntimeError
            number = math.nan
        # A score is a float32 in the end.
        if abs(number) <= largest:
            return number
        wanted = f"at most {largest:g} either way (see clip)" if largest == LARGEST else "a finite number"
        return RewardError(
            f"reward {self.component_name!r} returned {_shown(value)} for response {shortened(response)}; "
            f"a score must be {wanted}"
        )

    def _failure(self, where: str, error: Exception) -> RewardError:
        kind = RewardTimeout if isinstance(error, RewardTimeout) else RewardError
        said = str(error) if isinstance(error, RewardError) else f"{type(error).__name__}: {error}"
        failure = kind(f"reward {self.component_name!r} failed on {where}: {said}")
        failure.__cause__ = error
        return failure


class Unjudged(Reward):
    """Stands in where responses are wanted and nobody asks what they are worth: every score is 0."""

    def _score_one(self, response: str, target: Any, prompt: str, item: Any) -> float:
        return 0.0


def register_reward(name: str, *aliases: str) -> Callable[[F], F]:
    """Decorator: make a Reward class, or a function that `python` takes, a type that specs can name."""

    def add(reward: F) -> F:
        if isinstance(reward, type):
            if not issubclass(reward, Reward):
                raise TypeError(f"@register_reward({name!r}) takes a Reward class or a function, got {reward!r}")
            reward.component_name = name
        rewards.register(name, *aliases)(reward)
        canonical.update({key.lower(): name for key in (name, *aliases)})
        return reward

    return add


def _best(rows: list[Row]) -> Row:
    failed = [row for row in rows if isinstance(row, RewardError)]
    return failed[0] if failed else max(rows)  # type: ignore[type-var]


def _shown(value: Any) -> str:
    """A user's value in one short line, whatever its repr does."""
    try:
        shown = " ".join(repr(value).split())
    except Exception:  # noqa: BLE001 - it is the user's code, and Python writes no int of over 4,300 digits
        shown = f"a {type(value).__name__}"
    return shown if len(shown) <= 200 else f"{shown[:199]}…"


def _number_in(row: Row) -> float | None:
    return row if isinstance(row, float) else None


def _names(state: dict[str, Any]) -> list[list[str]]:
    """What tells one reward's state from another's: the names in it, and those of each of its steps."""
    if state.keys() != {"reward", "postprocess"}:
        return [sorted(state)]
    return [sorted(part) for part in (state["reward"], *state["postprocess"])]
