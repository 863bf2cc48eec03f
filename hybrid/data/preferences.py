"""Columns that say which answers are better: pairs, rankings, and answers that are called good or bad."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from numbers import Real
from typing import Any

from hybrid.core import Example, InputError, parse_json
from hybrid.data.cells import LEAVE_OUT, cell, is_bool, is_list, is_missing, text_in
from hybrid.data.layouts import Layout, Pair, Row, Turns
from hybrid.data.messages import messages_of

__all__ = ["Flawed", "Judged", "Preferred", "Ranked", "is_verdict"]

# Anthropic's transcripts of dialogues (hh-rlhf).
HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"


class Flawed(InputError):
    """A row from which no preference can be learnt. reason: why, in the words of a count of such rows."""

    def __init__(self, where: str, reason: str):
        super().__init__(f"{where}: a pair {reason}; {LEAVE_OUT}")
        self.reason = reason


@dataclass(frozen=True)
class Preferred:
    """Two answers to one prompt, of which `chosen` was preferred: texts, or lists of messages.

    prompt: None where both sides are whole dialogues: their longest common beginning, up to a turn's border, is the
        prompt then, be they lists of messages or transcripts ("\\n\\nHuman: … \\n\\nAssistant: …").
        A prompt that both sides repeat is not taken twice; of dialogues the beginning that ends with it is the prompt.
    margin: a number, by how much the chosen one is better.   weight: one above 0, what the pair counts.
    """

    prompt: str | None = "prompt"
    chosen: str = "chosen"
    rejected: str = "rejected"
    margin: str | None = "margin"
    weight: str | None = "weight"
    tools: str | None = "tools"

    @property
    def needs(self) -> tuple[str, ...]:
        return (*(() if self.prompt is None else (self.prompt,)), self.chosen, self.rejected)

    @property
    def takes(self) -> tuple[str, ...]:
        return tuple(column for column in (self.margin, self.weight, self.tools) if column is not None)

    def among(self, columns: Sequence[str]) -> "Preferred":
        found = (column if column in columns else None for column in (self.margin, self.weight, self.tools))
        margin, weight, tools = found
        return replace(self, margin=margin, weight=weight, tools=tools)

    def says(self) -> str:
        prompt = "the common beginning" if self.prompt is None else repr(self.prompt)
        more = "".join(f", {name} = {column!r}" for name in ("margin", "weight") if (column := getattr(self, name)))
        return f"prompt = {prompt}, chosen = {self.chosen!r}, rejected = {self.rejected!r}{more}"

    def example(self, row: Row, where: str) -> Example:
        """Raises Flawed where the sides are equal or one is empty."""
        prompt, chosen, rejected = self._sides(row, where)
        named = self.prompt or "prompt"
        texts = {named: prompt, self.chosen: chosen, self.rejected: rejected}
        tools = {} if self.tools is None else {self.tools: row.get(self.tools)}
        made = []
        for side in (self.chosen, self.rejected):
            as_list = any(not isinstance(text, str) for text in (prompt, texts[side]))
            layout: Layout = Turns(named, side, self.tools) if as_list else Pair(named, side)
            made.append(replace(layout.example({**texts, **tools}, where), item=row))
        best, other = made
        _check_sides(best, other, where)
        margin, weight = (self._number(row, column, where) for column in (self.margin, self.weight))
        if weight is not None and weight <= 0:
            raise InputError(f"{where}: column {self.weight!r} must be above 0, got {weight:g}; {LEAVE_OUT}")
        return replace(best, rejected=other, margin=margin or 0.0, weight=1.0 if weight is None else weight)

    def _number(self, row: Row, column: str | None, where: str) -> float | None:
        value = None if column is None else row.get(column)
        # A CSV file has an empty text where there is no number.
        if is_missing(value) or (isinstance(value, str) and not value.strip()):
            return None
        return _number(value, f"{where}: column {column!r}")

    def _sides(self, row: Row, where: str) -> tuple[Any, Any, Any]:
        """(prompt, chosen, rejected), each a text or a list of messages."""
        sides = [self._side(row, column, where) for column in (self.chosen, self.rejected)]
        if self.prompt is None:
            return _parted(sides[0], sides[1], where)
        prompt = self._side(row, self.prompt, where)
        start = _messages(prompt)
        if all(not isinstance(side, str) and side and side[0]["role"] != "assistant" for side in sides):
            common, *answers = _parted(sides[0], sides[1], where)
            if _without_space(common[-len(start) :]) == _without_space(start):
                return (common, *answers)
        if all(isinstance(side, str) for side in sides):
            repeats = isinstance(prompt, str) and all(prompt and side.startswith(prompt) for side in sides)
        else:
            repeats = all(_messages(side)[: len(start)] == start for side in sides)
        cut = len(prompt) if isinstance(prompt, str) and isinstance(sides[0], str) else len(start)
        return (prompt, *(side[cut:] if repeats else side for side in sides))

    def _side(self, row: Row, column: str, where: str) -> Any:
        value = cell(row, column, where, LEAVE_OUT)
        # An answer that is one message may stand alone.
        value = [value] if isinstance(value, Mapping) and column != self.prompt else value
        if is_list(value) and not len(value) and column != self.prompt:
            raise Flawed(where, "with an empty side")
        # CSV files have messages as JSON.
        if is_list(value) or (isinstance(value, str) and value.startswith('[{"') and _holds_messages(value)):
            return messages_of(value, f"{where}: column {column!r}")
        return text_in(row, column, where)


@dataclass(frozen=True)
class Ranked:
    """Several answers to one prompt with a number each: all pairs of different numbers, which count as one together.

    responses: a list of texts.   scores: a list of numbers, higher is better; with `is_rank` 1 is the best.
    """

    prompt: str = "prompt"
    responses: str = "responses"
    scores: str = "scores"
    is_rank: bool = False

    @property
    def needs(self) -> tuple[str, ...]:
        return (self.prompt, self.responses, self.scores)

    @property
    def takes(self) -> tuple[str, ...]:
        return ()

    def among(self, columns: Sequence[str]) -> "Ranked":
        return self

    def says(self) -> str:
        return f"prompt = {self.prompt!r}, rankings = {self.responses!r} by {self.scores!r}"

    def example(self, row: Row, where: str) -> Example:
        """The first of `examples`."""
        return self.examples(row, where)[0][0]

    def examples(self, row: Row, where: str) -> tuple[list[Example], list[Flawed]]:
        """A pair each, and what is wrong with those that are none. Raises Flawed where there is no sound one."""
        texts, numbers = (self._listed(row, column, where) for column in (self.responses, self.scores))
        place = f"{where}: column {self.scores!r}"
        if len(texts) != len(numbers):
            raise InputError(f"{place} has {len(numbers)} entries, and {self.responses!r} has {len(texts)}")
        scores = [_number(number, place) * (-1 if self.is_rank else 1) for number in numbers]
        order = sorted(range(len(texts)), key=lambda i: -scores[i])
        pairs = [(i, j) for i, j in combinations(order, 2) if scores[i] > scores[j]]
        if not pairs:
            raise Flawed(where, "without an answer that is better than another")
        layout = Preferred(self.prompt, margin=None, weight=None, tools=None)
        sides = [{self.prompt: row.get(self.prompt), "chosen": texts[i], "rejected": texts[j]} for i, j in pairs]
        made: list[Example] = []
        flaws: list[Flawed] = []
        for side in sides:
            try:
                made.append(layout.example(side, where))
            except Flawed as flaw:
                flaws.append(flaw)
        if not made:
            raise flaws[0]
        return [replace(example, item=row, weight=1 / len(made)) for example in made], flaws

    def _listed(self, row: Row, column: str, where: str) -> list[Any]:
        value = cell(row, column, where, LEAVE_OUT)
        if not is_list(value):
            raise InputError(f"{where}: column {column!r} must hold a list, got {value!r:.60}")
        return list(value.tolist() if hasattr(value, "tolist") else value)


@dataclass(frozen=True)
class Judged:
    """Rows of another layout, whose answers a column calls good (true) or bad (false).

    A bad answer is the `rejected` one of a prompt without a target: it is never imitated.
    """

    inner: Layout
    label: str = "label"

    @property
    def needs(self) -> tuple[str, ...]:
        return (*self.inner.needs, self.label)

    @property
    def takes(self) -> tuple[str, ...]:
        return self.inner.takes

    def among(self, columns: Sequence[str]) -> "Judged":
        return replace(self, inner=self.inner.among(columns))

    def says(self) -> str:
        return f"{self.inner.says()}, good or bad = {self.label!r}"

    def example(self, row: Row, where: str) -> Example:
        """Raises Flawed for a row without an answer."""
        is_good = _verdict(cell(row, self.label, where, LEAVE_OUT), f"{where}: column {self.label!r}")
        example = self.inner.example(row, where)
        if example.messages:
            # Only the last answer was judged.
            example = replace(example, num_prompt_messages=len(example.messages) - 1)
        if not example.target.strip():
            raise Flawed(where, "with an empty side")
        if is_good:
            return example
        return replace(example, target="", messages=example.messages[:-1], rejected=example)


def _holds_messages(text: str) -> bool:
    """Whether a text is the JSON of messages: what a model was to say may be JSON too."""
    try:
        listed = parse_json(text)
    except ValueError:
        return False
    return all(
        isinstance(m, Mapping) and ({"role", "content"} <= m.keys() or {"from", "value"} <= m.keys()) for m in listed
    )


def is_verdict(value: Any) -> bool:
    """True or false, also as a CSV file has it."""
    return is_bool(value) or (isinstance(value, str) and value.strip().lower() in ("true", "false"))


def _verdict(value: Any, place: str) -> bool:
    if isinstance(value, str) and value.strip().lower() in ("true", "false", "1", "0"):
        return value.strip().lower() in ("true", "1")
    if is_bool(value) or (isinstance(value, Real) and value in (0, 1)):
        return bool(value)
    raise InputError(f"{place} must be true or false, got {value!r:.60}")


def _number(value: Any, place: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number) or is_bool(value):
        raise InputError(f"{place} must hold a finite number, got {value!r:.60}; {LEAVE_OUT}")
    return number


def _check_sides(best: Example, other: Example, where: str) -> None:
    said = [_answer(side) for side in (best, other)]
    if not all(said):
        raise Flawed(where, "with an empty side")
    if said[0] == said[1]:
        raise Flawed(where, "of equal sides")


def _answer(example: Example) -> Any:
    """What tells one answer from another, but for the white space around it; nothing where nothing is said."""
    if not example.messages:
        return example.target.strip()
    turns = [dict(turn) for turn in example.messages[example.num_prompt_messages :]]
    for turn in turns:
        if isinstance(turn.get("content"), str):
            turn["content"] = turn["content"].strip()
    return turns if any(turn.get("content") or turn.get("tool_calls") for turn in turns) else None


def _messages(side: Any) -> tuple[Mapping[str, Any], ...]:
    """The messages of a side; a prompt's text is the user's turn."""
    return ({"role": "user", "content": side},) if isinstance(side, str) else side


def _without_space(messages: Sequence[Mapping[str, Any]]) -> list[Any]:
    """What tells turns apart but for the white space around what is said."""
    said = [(message["role"], message.get("content")) for message in messages]
    return [(role, content.strip() if isinstance(content, str) else content) for role, content in said]


def _parted(chosen: Any, rejected: Any, where: str) -> tuple[Any, Any, Any]:
    """(their common beginning, the rest of each)."""
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise InputError(f"{where}: one side is a text and the other a list of messages; {LEAVE_OUT}")
    if isinstance(chosen, str):
        common = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), None)
        end = chosen[:common].rfind(ASSISTANT) + len(ASSISTANT)
        if end < len(ASSISTANT):
            raise InputError(
                f"{where}: there is no prompt column, and the sides have no beginning in common that ends with "
                f"{ASSISTANT!r}; name the prompt's column with data.prompt, or {LEAVE_OUT}"
            )
        if HUMAN in chosen[end:] or HUMAN in rejected[end:]:
            raise Flawed(where, "whose sides part before the last answer")
        return chosen[:end], chosen[end:], rejected[end:]
    count = 0
    while count < min(len(chosen), len(rejected)) and chosen[count] == rejected[count]:
        count += 1
    # A prompt ends where the assistant has to speak.
    while count and chosen[count - 1]["role"] == "assistant":
        count -= 1
    if not count:
        raise InputError(f"{where}: the sides differ in their prompt: they begin with no turn in common; {LEAVE_OUT}")
    return chosen[:count], chosen[count:], rejected[count:]
