"""Which columns are what. A new layout is one more entry in `LAYOUTS`."""

from collections.abc import Iterable, Sequence

from hybrid.core import InputError, unknown_name
from hybrid.data.cells import is_list
from hybrid.data.config import DataConfig
from hybrid.data.layouts import Dialogue, Layout, Pair, Row, Text, Tokens, Turns
from hybrid.data.preferences import Judged, Preferred, Ranked, is_verdict

__all__ = ["LAYOUTS", "columns_of", "layout_of", "listed"]

# In the name of a column of lists beside token ids: it may say what is trained.
WEIGHING = ("loss", "weight", "assistant", "completion", "response", "prompt_mask")
NUM_LISTED = 12  # columns that a line names
# The first whose columns are all there is taken; docs/data.md shows a row of each.
LAYOUTS: tuple[Layout, ...] = (
    Tokens(),
    Preferred("prompt"),
    Preferred("question"),
    Preferred(None),
    Ranked("prompt", "responses", "scores"),
    Ranked("prompt", "responses", "ranks", is_rank=True),
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

    A column `label` of true and false beside answers says which of them are good.   Raises InputError where there is
    no layout.
    """
    columns = columns_of(rows)
    if not columns:
        raise InputError(f"{name}: the rows have no columns")
    layout = _named(config, columns)
    if layout is not None:
        for column in (*layout.needs, *([config.label] if config.label else [])):
            if column not in columns:
                raise InputError(f"{name}: {unknown_name('column', column, columns)}")
    elif len(half := [column for column in ("chosen", "rejected") if column in columns]) == 1:
        raise InputError(
            f"{name}: the column {half[0]!r} of preferences has no other beside it: name them with data.chosen and "
            "data.rejected, or a column to imitate with data.prompt and data.target"
        )
    else:
        layout = next((layout for layout in LAYOUTS if set(layout.needs) <= set(columns)), None)
    if layout is None:
        raise InputError(
            f"{name}: found no columns that belong together (docs/data.md) among {listed(map(repr, columns))}; "
            "name yours with data.prompt and data.target, data.messages or data.text"
        )
    if isinstance(layout, Pair) and any(is_list(row.get(column)) for row in rows for column in layout.needs):
        layout = Turns(layout.prompt, layout.target)
    if isinstance(layout, Tokens):
        _refuse_unread(rows, [column for column in columns if column not in layout.takes], name)
    label = config.label or _label(rows, columns, layout)
    if label is not None and isinstance(layout, (Preferred, Ranked)):
        raise InputError(f"{name}: data.label = {label!r} calls single answers good or bad, and these rows compare two")
    return layout.among(columns) if label is None else Judged(layout, label).among(columns)


def _named(config: DataConfig, columns: Sequence[str]) -> Layout | None:
    if config.chosen is not None or config.rejected is not None:
        prompt = config.prompt or ("prompt" if "prompt" in columns else None)
        return Preferred(prompt, config.chosen or "chosen", config.rejected or "rejected")
    if config.prompt is not None:
        return Pair(config.prompt, config.target)
    if config.messages is not None:
        return Dialogue(config.messages)
    return None if config.text is None else Text(config.text)


def _label(rows: Sequence[Row], columns: Sequence[str], layout: Layout) -> str | None:
    """The column that calls the answers good or bad, where one of true and false stands beside them."""
    has_answers = isinstance(layout, Dialogue) or (isinstance(layout, (Pair, Turns)) and layout.target is not None)
    judged = (column for column in ("label", "labels") if column in columns and has_answers)
    return next((column for column in judged if any(is_verdict(row.get(column)) for row in rows)), None)


def _refuse_unread(rows: Sequence[Row], columns: Sequence[str], name: str) -> None:
    """Refuse what stands beside token ids and says more of them than `Tokens` reads."""
    if packed := [column for column in ("seq_lengths", "position_ids") if column in columns]:
        raise InputError(
            f"{name}: the column {packed[0]!r} beside 'input_ids' says that rows hold several examples; give one "
            "example a row (sft.packing packs them), or drop the column"
        )
    weighing = [column for column in columns if any(word in column.lower() for word in WEIGHING)]
    if weighing and any(is_list(row.get(weighing[0])) for row in rows):
        raise InputError(
            f"{name}: the column {weighing[0]!r} beside 'input_ids' may say what is trained, and is not read; call it "
            "'completion_mask' (1 on what is trained), or drop it"
        )
