"""A memory as tables to read: classes of prompts, the hardest, the best answers; or the ways of a chain."""

from collections.abc import Mapping
from statistics import fmean
from typing import Any, NamedTuple

from hybrid.memory.record import CLASSES, Record, class_of

__all__ = ["Table", "memory_tables"]


class Table(NamedTuple):
    """title: what it shows.   header: its columns.   rows: texts."""

    title: str
    header: tuple[str, ...]
    rows: list[tuple[str, ...]]


def memory_tables(state: Mapping[str, Any], number: int) -> list[Table]:
    """Of what `read_memory` read, `number` lines in each list; of a type from elsewhere its rows as they are."""
    if state["memory"] == "experience":
        return _of_experience(state, number)
    if state["memory"] == "markov":
        return _of_chain(state, number)
    rows: list[tuple[str, ...]] = [(str(row),) for row in state["rows"][:number]]
    return [Table(f"memory {state['memory']}, {len(state['rows'])} rows", ("row",), rows)]


def _of_experience(state: Mapping[str, Any], number: int) -> list[Table]:
    records = [record for record in map(Record.of, state["rows"]) if record.visits]
    low, high = state["limits"]
    attempts = sum(record.attempts for record in records)
    classes = []
    for name in CLASSES:
        found = [record for record in records if class_of(record.success, (low, high)) == name]
        means = [_number(fmean(x)) if (x := [getattr(r, key) for r in found]) else "" for key in ("success", "score")]
        share = f"{len(found) / len(records):.0%}" if records else ""
        classes.append((name, str(len(found)), share, *means))
    title = (
        f"Experience after step {state['step']}: {len(records)} prompts, {attempts} responses; hard below a success "
        f"rate of {low:.2g}, easy above {high:.2g}"
    )
    hardest = sorted(records, key=lambda record: (record.success, record.score, -record.attempts, record.key))
    answered = sorted((r for r in records if r.best), key=lambda r: (-r.best[0].score, r.best[0].entropy, r.key))
    return [
        Table(title, ("class", "prompts", "share", "success", "mean score"), classes),
        Table(
            "The hardest prompts",
            ("success", "mean score", "attempts", "last step", "KL", "SFT loss", "prompt"),
            [
                (_number(r.success), _number(r.score), str(r.attempts), str(r.last_step), _number(r.kl),
                 "" if r.sft_loss is None else _number(r.sft_loss), _short(r.text))
                for r in hardest[:number]
            ],
        ),
        Table(
            "The best answers, the surest first",
            ("score", "entropy", "step", "prompt", "response"),
            [
                (_number(r.best[0].score), _number(r.best[0].entropy), str(r.best[0].step), _short(r.text),
                 _short(r.best[0].text))
                for r in answered[:number]
            ],
        ),
    ]  # fmt: skip


def _of_chain(state: Mapping[str, Any], number: int) -> list[Table]:
    states = {row["state"]: row for row in state["rows"] if "state" in row}
    pairs = [row for row in state["rows"] if "from" in row]
    texts = {name: _short(row["text"]) for name, row in states.items()}
    ways = sorted(pairs, key=lambda row: (-row["worth"], row["from"], row["to"]))[:number]
    best = sorted(states.values(), key=lambda row: (-row["level"], row["state"]))
    return [
        Table(
            f"Chain after step {state['step']}: {len(states)} states, {len(pairs)} pairs; those of the highest worth",
            ("worth", "from", "to"),
            [
                (_number(row["worth"]), texts.get(row["from"], row["from"]), texts.get(row["to"], row["to"]))
                for row in ways
            ],
        ),
        Table(
            "States by their mean reward, the highest and the lowest",
            ("mean reward", "visits", "best", "state", "best response"),
            [
                (_number(row["level"]), str(row["visits"]), _number(row["best"]), _short(row["text"]),
                 _short(row["response"]))
                for row in {row["state"]: row for row in [*best[:number], *best[-number:]]}.values()
            ],
        ),
    ]  # fmt: skip


def _number(value: float) -> str:
    return f"{value:.3g}"


def _short(text: str, length: int = 60) -> str:
    line = " ".join(text.split())
    return line if len(line) <= length else line[: length - 1] + "…"
