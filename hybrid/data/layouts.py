"""Which columns are what. A new layout is one more entry in `LAYOUTS`."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from hybrid.core import IGNORE, Example, InputError, unknown_name
from hybrid.data.cells import cell, is_bool, is_missing, text_of
from hybrid.data.config import DataConfig
from hybrid.data.messages import last_content, messages_of, num_untrained, tools_of

__all__ = ["LAYOUTS", "Layout", "columns_of", "layout_of", "listed"]

Row = Mapping[str, Any]

LEAVE_OUT = "leave such rows out with data.filter"
# In the name of a column of lists beside token ids: it may say what is trained.
WEIGHING = ("loss", "weight", "assistant", "completion", "response", "prompt_mask")
NUM_LISTED = 12  # columns that a line names
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
        prompt = _text(row, self.prompt, where)
        # An example without a prompt is plain text, which this one was not meant to be.
        if not prompt.strip():
            raise InputError(f"{where}: column {self.prompt!r} is empty; {LEAVE_OUT}")
        if self.input is not None and not is_missing(row.get(self.input)):
            more = _text(row, self.input, where)
            prompt += f"\n\n{more}" if more.strip() else ""
        return Example(prompt, "" if self.target is None else _text(row, self.target, where, NO_TARGET), item=row)


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
        if _is_list(cell(row, column, where, way_out)):
            return messages_of(row[column], f"{where}: column {column!r}")
        text = _text(row, column, where, way_out)
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
            system = _text(row, self.system, where)
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
        return Example("", _text(row, self.column, where), item=row)


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


# The first whose columns are all there is taken; docs/data.md shows a row of each.
LAYOUTS: tuple[Layout, ...] = (
    Tokens(),
    Pair("prompt", "target"),
    Pair("prompt", "completion"),
    Pair("prompt", "response"),
    Pair("instruction", "output", input="input"),
    Pair("instruction", "response", input="context"),
    Pair("question", "answer"),
    Pair("query", "response"),
    Dialogue("messages"),
    Dialogue("conversations"),
    Text("text"),
    Pair("prompt"),
)


def columns_of(rows: Sequence[Row]) -> list[str]:
    """The columns of all the rows, in the order of their first appearance."""
    return list(dict.fromkeys(column for row in rows for column in row))


def listed(columns: Iterable[str]) -> str:
    """The names in one line, however many, long or strange they are."""
    names = [name if name.isprintable() else ascii(name) for name in columns]
    shown = [name if len(name) <= 40 else f"{name[:39]}…" for name in names[:NUM_LISTED]]
    return ", ".join(shown) + (f" and {len(names) - NUM_LISTED} more" if len(names) > NUM_LISTED else "")


def layout_of(rows: Sequence[Row], config: DataConfig, name: str) -> Layout:
    """The layout that the config names, else the first of `LAYOUTS` whose columns are among those of all the rows.

    Raises InputError where there is none, and for preferences: their rejected answers must not be trained.
    """
    columns = columns_of(rows)
    if not columns:
        raise InputError(f"{name}: the rows have no columns")
    layout = _named(config)
    if layout is not None:
        for column in layout.needs:
            if column not in columns:
                raise InputError(f"{name}: {unknown_name('column', column, columns)}")
    else:
        _refuse_preferences(rows, columns, name)
        layout = next((layout for layout in LAYOUTS if set(layout.needs) <= set(columns)), None)
    if layout is None:
        raise InputError(
            f"{name}: found no columns that belong together (docs/data.md) among {listed(map(repr, columns))}; "
            "name yours with data.prompt and data.target, data.messages or data.text"
        )
    if isinstance(layout, Pair) and any(_is_list(row.get(column)) for row in rows for column in layout.needs):
        layout = Turns(layout.prompt, layout.target)
    if isinstance(layout, Tokens):
        _refuse_unread(rows, [column for column in columns if column not in layout.takes], name)
    return layout.among(columns)


def _named(config: DataConfig) -> Layout | None:
    if config.prompt is not None:
        return Pair(config.prompt, config.target)
    if config.messages is not None:
        return Dialogue(config.messages)
    return None if config.text is None else Text(config.text)


def _refuse_preferences(rows: Sequence[Row], columns: Sequence[str], name: str) -> None:
    judged = [column for column in ("label", "labels") if any(_is_verdict(row.get(column)) for row in rows)]
    pairs = {layout.target for layout in LAYOUTS if isinstance(layout, Pair)}
    answers = (pairs | {layout.column for layout in LAYOUTS if isinstance(layout, Dialogue)}) & set(columns)
    if {"chosen", "rejected"} <= set(columns):
        what = "'chosen' and 'rejected'"
    elif judged and answers:
        what = f"{judged[0]!r} of true and false beside {sorted(map(str, answers))[0]!r}"
    else:
        return
    raise InputError(
        f"{name}: the columns {what} are preferences, which no step learns from yet; to train on the good answers "
        "alone, choose the rows with data.filter and name their columns: data.prompt and data.target, or data.messages"
    )


def _refuse_unread(rows: Sequence[Row], columns: Sequence[str], name: str) -> None:
    """Refuse what stands beside token ids and says more of them than `Tokens` reads."""
    if packed := [column for column in ("seq_lengths", "position_ids") if column in columns]:
        raise InputError(
            f"{name}: the column {packed[0]!r} beside 'input_ids' says that rows hold several examples; give one "
            "example a row (sft.packing packs them), or drop the column"
        )
    weighing = [column for column in columns if any(word in column.lower() for word in WEIGHING)]
    if weighing and any(_is_list(row.get(weighing[0])) for row in rows):
        raise InputError(
            f"{name}: the column {weighing[0]!r} beside 'input_ids' may say what is trained, and is not read; call it "
            "'completion_mask' (1 on what is trained), or drop it"
        )


def _is_verdict(value: Any) -> bool:
    """True or false, also as a CSV file has it."""
    return is_bool(value) or (isinstance(value, str) and value.strip().lower() in ("true", "false"))


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


def _text(row: Row, column: str, where: str, way_out: str = LEAVE_OUT) -> str:
    return text_of(cell(row, column, where, way_out), column, where, way_out)


def _is_list(value: Any) -> bool:
    return isinstance(value, (list, tuple)) or (hasattr(value, "tolist") and getattr(value, "ndim", 0) > 0)


def _integers(row: Row, column: str, where: str) -> list[int]:
    value = cell(row, column, where, LEAVE_OUT)
    value = value.tolist() if hasattr(value, "tolist") else value
    if not isinstance(value, (list, tuple)) or not all(isinstance(number, int) for number in value):
        raise InputError(f"{where}: column {column!r} must hold a list of integers, got {value!r:.60}")
    return [int(number) for number in value]
