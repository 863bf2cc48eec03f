"""Columns that belong together, and the example that a row of them is."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from hybrid.core import IGNORE, Example, InputError
from hybrid.data.cells import LEAVE_OUT, cell, is_list, is_missing, text_in
from hybrid.data.messages import last_content, messages_of, num_untrained, tools_of

__all__ = ["Dialogue", "Layout", "Pair", "Row", "Text", "Tokens", "Turns"]

Row = Mapping[str, Any]

NO_TARGET = f'{LEAVE_OUT}, or write "" where there is no target'


class Layout(Protocol):
    """Columns that belong together, and the example that a row of them is."""

    @property
    def needs(self) -> tuple[str, ...]:
        """The columns that there must be."""

    @property
    def takes(self) -> tuple[str, ...]:
        """Those that it reads too, where they are there."""

    def among(self, columns: Sequence[str]) -> "Layout":
        """The same, which takes no column but these."""

    def says(self) -> str:
        """What is taken from which column."""

    def example(self, row: Row, where: str) -> Example:
        """Raises InputError, with where, for a row that cannot be one."""


@dataclass(frozen=True)
class Pair:
    """A prompt and its answer, which alone is trained.

    target: None for prompts alone, which serve rollouts.   input: more of the prompt, behind it where not empty.
    """

    prompt: str
    target: str | None = None
    input: str | None = None

    @property
    def needs(self) -> tuple[str, ...]:
        return (self.prompt,) if self.target is None else (self.prompt, self.target)

    @property
    def takes(self) -> tuple[str, ...]:
        return () if self.input is None else (self.input,)

    def among(self, columns: Sequence[str]) -> "Pair":
        return self if self.input in columns else replace(self, input=None)

    def says(self) -> str:
        more = "" if self.input is None else f" + {self.input!r}"
        return f"prompt = {self.prompt!r}{more}{_says('target', self.target)}"

    def example(self, row: Row, where: str) -> Example:
        prompt = text_in(row, self.prompt, where)
        # An example without a prompt is plain text, which this one was not meant to be.
        if not prompt.strip():
            raise InputError(f"{where}: column {self.prompt!r} is empty; {LEAVE_OUT}")
        if self.input is not None and not is_missing(row.get(self.input)):
            more = text_in(row, self.input, where)
            prompt += f"\n\n{more}" if more.strip() else ""
        return Example(prompt, "" if self.target is None else text_in(row, self.target, where, NO_TARGET), item=row)


@dataclass(frozen=True)
class Turns:
    """A pair of which the prompt or the target is a list of messages; a text in its place is one message."""

    prompt: str
    target: str | None = None
    tools: str | None = "tools"

    @property
    def needs(self) -> tuple[str, ...]:
        return (self.prompt,) if self.target is None else (self.prompt, self.target)

    @property
    def takes(self) -> tuple[str, ...]:
        return () if self.tools is None else (self.tools,)

    def among(self, columns: Sequence[str]) -> "Turns":
        return self if self.tools in columns else replace(self, tools=None)

    def says(self) -> str:
        return f"messages = {self.prompt!r}{_says('target', self.target)}{_says('tools', self.tools)}"

    def example(self, row: Row, where: str) -> Example:
        place = f"{where}: column {self.prompt!r}"
        prompt = self._messages(row, self.prompt, where, "user", LEAVE_OUT)
        if not prompt or prompt[-1]["role"] == "assistant":
            raise InputError(f"{place} must end with a turn that the assistant is to answer; {LEAVE_OUT}")
        target = () if self.target is None else self._messages(row, self.target, where, "assistant", NO_TARGET)
        if target and not target[0]["role"] == target[-1]["role"] == "assistant":
            raise InputError(f"{where}: column {self.target!r} must begin and end with the assistant's turn")
        example = _dialogue((*prompt, *target), row, self.tools, place)
        return replace(example, num_prompt_messages=max(len(prompt), example.num_prompt_messages))

    def _messages(self, row: Row, column: str, where: str, role: str, way_out: str) -> tuple[Mapping[str, Any], ...]:
        if is_list(cell(row, column, where, way_out)):
            return messages_of(row[column], f"{where}: column {column!r}")
        text = text_in(row, column, where, way_out)
        return ({"role": role, "content": text},) if text.strip() else ()


@dataclass(frozen=True)
class Dialogue:
    """A list of messages, {"role", "content"} or ShareGPT's {"from", "value"}; the assistant's turns are trained.

    system: the column of a text that stands before them.
    """

    column: str
    tools: str | None = "tools"
    system: str | None = "system"

    @property
    def needs(self) -> tuple[str, ...]:
        return (self.column,)

    @property
    def takes(self) -> tuple[str, ...]:
        return tuple(column for column in (self.tools, self.system) if column is not None)

    def among(self, columns: Sequence[str]) -> "Dialogue":
        tools, system = (column if column in columns else None for column in (self.tools, self.system))
        return replace(self, tools=tools, system=system)

    def says(self) -> str:
        return f"dialogues = {self.column!r}{_says('tools', self.tools)}{_says('system', self.system)}"

    def example(self, row: Row, where: str) -> Example:
        place = f"{where}: column {self.column!r}"
        messages = messages_of(cell(row, self.column, where, LEAVE_OUT), place)
        if self.system is not None and not is_missing(row.get(self.system)):
            system = text_in(row, self.system, where)
            if system.strip() and messages[0]["role"] == "system":
                raise InputError(f"{place} begins with the system's turn, and column {self.system!r} has one too")
            messages = ({"role": "system", "content": system}, *messages) if system.strip() else messages
        return _dialogue(messages, row, self.tools, place)


@dataclass(frozen=True)
class Text:
    """Plain text, all of it trained."""

    column: str

    @property
    def needs(self) -> tuple[str, ...]:
        return (self.column,)

    @property
    def takes(self) -> tuple[str, ...]:
        return ()

    def among(self, columns: Sequence[str]) -> "Text":
        return self

    def says(self) -> str:
        return f"text = {self.column!r}"

    def example(self, row: Row, where: str) -> Example:
        return Example("", text_in(row, self.column, where), item=row)


@dataclass(frozen=True)
class Tokens:
    """Token ids. Trained are those that every column of `chosen` says; padding is taken off."""

    ids: str = "input_ids"
    chosen: tuple[str, ...] = ("labels", "completion_mask", "assistant_masks")
    real: str | None = "attention_mask"

    @property
    def needs(self) -> tuple[str, ...]:
        return (self.ids,)

    @property
    def takes(self) -> tuple[str, ...]:
        return self.chosen if self.real is None else (*self.chosen, self.real)

    def among(self, columns: Sequence[str]) -> "Tokens":
        chosen = tuple(column for column in self.chosen if column in columns)
        return replace(self, chosen=chosen, real=self.real if self.real in columns else None)

    def says(self) -> str:
        trained = f"trained by {' and '.join(map(repr, self.chosen))}" if self.chosen else "all trained"
        return f"token ids = {self.ids!r}, {trained}"

    def example(self, row: Row, where: str) -> Example:
        ids = _integers(row, self.ids, where)
        keep = [True] * len(ids) if self.real is None else self._mask(row, self.real, ids, where)
        if not any(keep):
            raise InputError(f"{where}: column {self.ids!r} is empty; {LEAVE_OUT}")
        masks = [self._mask(row, column, ids, where) for column in self.chosen]
        labels = [id if all(mask[i] for mask in masks) else IGNORE for i, id in enumerate(ids)]
        kept = [i for i, is_kept in enumerate(keep) if is_kept]
        return Example("", input_ids=tuple(ids[i] for i in kept), labels=tuple(labels[i] for i in kept), item=row)

    def _mask(self, row: Row, column: str, ids: Sequence[int], where: str) -> list[bool]:
        values = _integers(row, column, where)
        if len(values) != len(ids):
            raise InputError(f"{where}: column {column!r} has {len(values)} entries, and {self.ids!r} has {len(ids)}")
        if column == "labels":
            if wrong := [(label, id) for label, id in zip(values, ids, strict=True) if label not in (id, IGNORE)]:
                raise InputError(
                    f"{where}: column 'labels' has {wrong[0][0]} where the id is {wrong[0][1]}: a label is the id of "
                    f"its own place (nothing is shifted), or {IGNORE} where it is not trained"
                )
            return [label != IGNORE for label in values]
        if wrong_values := set(values) - {0, 1}:
            raise InputError(f"{where}: column {column!r} must hold 0 and 1, got {wrong_values.pop()}")
        return [value == 1 for value in values]


def _dialogue(messages: tuple[Mapping[str, Any], ...], row: Row, tools: str | None, where: str) -> Example:
    last = messages[-1]
    if last["role"] == "system":
        raise InputError(f"{where} must not end with the system's turn: there is nothing to answer")
    if messages[0]["role"] == "assistant":
        raise InputError(f"{where} must not begin with the assistant's turn: nothing prompts it; {LEAVE_OUT}")
    prompt = last_content(messages, "user")
    if not prompt.strip():
        raise InputError(f"{where} has no user turn with text in it; {LEAVE_OUT}")
    target = last.get("content", "") if last["role"] == "assistant" else ""
    given = () if tools is None else tools_of(row.get(tools), f"{where}, column {tools!r}")
    return Example(prompt, target, messages, row, given, num_untrained(messages, where))


def _says(what: str, column: str | None) -> str:
    return "" if column is None else f", {what} = {column!r}"


def _integers(row: Row, column: str, where: str) -> list[int]:
    value = cell(row, column, where, LEAVE_OUT)
    value = value.tolist() if hasattr(value, "tolist") else value
    if not isinstance(value, (list, tuple)) or not all(isinstance(number, int) for number in value):
        raise InputError(f"{where}: column {column!r} must hold a list of integers, got {value!r:.60}")
    return [int(number) for number in value]
