"""What a run's memory did, as figures: the classes of its prompts over time, and its chain as a heat map."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybrid.run.curves import INKS, Curve, drawing, finite, hairlines
from hybrid.run.panels import Rows, training_phases
from hybrid.run.track import read_jsonl

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["memory_figures"]

MEMORY = "memory.jsonl"  # as hybrid.memory writes it
# Of the classes, from the floor up, with their colours.
CLASSES = {"easy": "up", "medium": "sft", "hard": "down", "unseen": "rule"}
NUM_STATES = 16  # of a heat map: those with the most pairs


def memory_figures(folder: Path, rows: Mapping[str, Rows]) -> list[Curve]:
    """The figures that the run has numbers for; of a run without a memory none."""
    found = [_classes(rows)]
    if (folder / MEMORY).is_file():
        _, *held = read_jsonl(folder / MEMORY)
        found.append(_heat_map([row for row in held if "from" in row], [row for row in held if "state" in row]))
    return [curve for curve in found if curve is not None]


def _classes(rows: Mapping[str, Rows]) -> Curve | None:
    """The shares of easy, medium, hard and never seen prompts, one upon the other, by step."""
    steps = sorted((row for phase in training_phases([rows]) for row in rows[phase]), key=lambda row: row["step"])
    table = [
        (row["step"], [share for name in CLASSES if (share := finite(row, f"memory/{name}")) is not None])
        for row in steps
    ]
    table = [(step, shares) for step, shares in table if len(shares) == len(CLASSES)]
    if len(table) < 2:
        return None
    title, unit, at = "Class shares over time", "share of prompts", [step for step, _ in table]

    def draw(axes: "Axes") -> None:
        layers = [[shares[number] for _, shares in table] for number in range(len(CLASSES))]
        axes.stackplot(at, layers, colors=[INKS[ink] for ink in CLASSES.values()], alpha=0.55, lw=0)
        floor = 0.0
        for name, share in zip(CLASSES, table[-1][1], strict=True):
            if share >= 0.08:
                axes.annotate(
                    name, (at[-1], floor + share / 2), (-4, 0), textcoords="offset points", fontsize=8,
                    color=INKS["eval"], ha="right", va="center",
                )  # fmt: skip
            floor += share
        axes.set_xlim(at[0], at[-1])
        axes.set_ylim(0, 1)
        hairlines(axes)

    ends = ", ".join(f"{name} {share:.0%}" for name, share in zip(CLASSES, table[-1][1], strict=True))
    return Curve(title, unit, f"{title} ({unit}): at step {at[-1]} {ends}.", drawing(title, draw))


def _heat_map(pairs: Sequence[Mapping[str, Any]], states: Sequence[Mapping[str, Any]]) -> Curve | None:
    """The worth of going from one state (row) to another (column); white where a pair was never followed."""
    counts: dict[str, int] = {}
    for row in pairs:
        for state in (row["from"], row["to"]):
            counts[state] = counts.get(state, 0) + 1
    names = sorted(counts, key=lambda name: (-counts[name], name))[:NUM_STATES]
    if not names:
        return None
    title, unit = "The chain", f"worth of row to column, {len(names)} states"
    place = {name: number for number, name in enumerate(names)}
    cells = [[math.nan] * len(names) for _ in names]
    for row in pairs:
        if row["from"] in place and row["to"] in place:
            cells[place[row["from"]]][place[row["to"]]] = row["worth"]
    texts = {row["state"]: " ".join(str(row["text"]).split())[:10] for row in states}

    def draw(axes: "Axes") -> None:
        worths = [value for line in cells for value in line if not math.isnan(value)]
        low, high = min(worths, default=0.0), max(worths, default=1.0)
        for i, line in enumerate(cells):
            for j, value in enumerate(line):
                if not math.isnan(value):
                    depth = 0.15 + 0.85 * (value - low) / (high - low or 1.0)
                    axes.fill([j, j + 1, j + 1, j], [i, i, i + 1, i + 1], color=INKS["ppo"], alpha=depth, lw=0)
        hairlines(axes)
        axes.grid(False)
        axes.set_xlim(0, len(names))
        axes.set_ylim(len(names), 0)
        axes.set_xticks([])
        axes.set_yticks([i + 0.5 for i in range(len(names))], [texts.get(name, name[:10]) for name in names])
        axes.tick_params(labelsize=5)

    known = sum(not math.isnan(value) for line in cells for value in line)
    said = f"{title} ({unit}): {known} of {len(names) ** 2} pairs were followed, {len(pairs)} in all."
    return Curve(title, unit, said, drawing(title, draw))
