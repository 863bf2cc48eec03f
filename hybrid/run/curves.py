"""A run's numbers as small figures: one panel a measure, drawn to stand inside a page."""

import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from statistics import fmean
from typing import TYPE_CHECKING, Any

from hybrid.run.panels import TRAINING, Line, Panel, Rows, attributed, panels, phase_names, training_phases

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = [
    "INKS",
    "Curve",
    "Points",
    "colours",
    "curves",
    "drawing",
    "dress",
    "finite",
    "hairlines",
    "labelled",
    "points_of",
]

Points = list[tuple[float, float, float]]  # step, number, standard error (0 where there is none)
Series = tuple[Line, str, Points]  # the numbers of a line in a phase
Span = tuple[str, float, float]  # phase, and the steps between which it went on

# matplotlib wants fixed colours, the page has its own, light or dark: these stand for its CSS variables.
INKS = {
    "sft": "#000001",
    "ppo": "#000002",
    "eval": "#000003",
    "muted": "#000004",
    "rule": "#000005",
    "joint": "#000006",
    "up": "#000007",
    "down": "#000008",
    "paper": "#000009",
    "more-0": "#000010",
    "more-1": "#000011",
    "more-2": "#000012",
}
_NUM_MORE = 3  # colours of kinds of step that only some runs have; a fourth has the first again


@dataclass(frozen=True)
class Curve:
    """One figure. svg: markup that refers to nothing outside it.   description: what it shows, in words."""

    title: str
    unit: str
    description: str
    svg: str


def finite(row: Mapping[str, Any], key: str) -> float | None:
    """The number of that name, None where it is absent or not finite."""
    value = row.get(key)
    return value if isinstance(value, int | float) and math.isfinite(value) else None


def colours(rows: Mapping[str, Rows]) -> dict[str, str]:
    """The name of each phase's colour, which is the page's CSS variable and class."""
    own = training_phases([rows])[len(TRAINING) :]
    more = {phase: f"more-{number % _NUM_MORE}" for number, phase in enumerate(own)}
    return {phase: phase for phase in (*TRAINING, "eval")} | more


def curves(rows: Mapping[str, Rows]) -> list[Curve]:
    """The panels that the rows have numbers for, on one axis of training steps; none before a second step."""
    rows = attributed(rows)
    phases, names, inks = (*training_phases([rows]), "eval"), phase_names(rows), colours(rows)
    steps = [row["step"] for phase in phases for row in rows[phase]]
    if len(set(steps)) < 2:
        return []
    drawn = []
    for panel in panels([rows]):
        series = [
            (line, phase, points)
            for line in panel.lines
            for phase in phases
            if (key := line.key(phase)) is not None and (points := points_of(rows[phase], key))
        ]
        if series:
            ends = [
                f"{line.label and line.label + ', '}{names[phase]} from {p[0][1]:.3g} to {p[-1][1]:.3g}"
                for line, phase, p in series
            ]
            description = f"{panel.title} ({panel.unit}) by training step: {', '.join(ends)}."
            svg = _svg(panel, series, inks, _spans(rows), (min(steps), max(steps)))
            drawn.append(Curve(panel.title, panel.unit, description, svg))
    return drawn


def points_of(rows: Rows, key: str) -> Points:
    numbers = ((row["step"], finite(row, key), finite(row, f"{key}_sem") or 0.0) for row in rows)
    return [(step, value, error) for step, value, error in numbers if value is not None]


def _spans(rows: Mapping[str, Rows]) -> list[Span]:
    """Each stretch of training in one phase, from the step where the one before it ended."""
    steps = sorted((row["step"], phase) for phase in training_phases([rows]) for row in rows[phase])
    spans: list[Span] = []
    for phase, stretch in groupby(steps, key=itemgetter(1)):
        first, *rest = (step for step, _ in stretch)
        spans.append((phase, spans[-1][2] if spans else first - 1, rest[-1] if rest else first))
    return spans


def _svg(
    panel: Panel, series: list[Series], inks: Mapping[str, str], spans: list[Span], steps: tuple[float, float]
) -> str:
    """One panel: training as a thin line, evaluations as dots in a band of one standard error."""

    def draw(axes: "Axes") -> None:
        for line, phase, points in series:
            step, value, _ = zip(*points, strict=True)
            ink = INKS[line.ink or inks[phase]]
            if phase == "eval":
                low, high = zip(*((v - e, v + e) for _, v, e in points), strict=True)
                axes.fill_between(step, low, high, color=ink, alpha=0.15, lw=0)
                # Dots shrink where they would run into each other.
                size = min(3.2, 100 / len(step))
                axes.plot(step, value, "o-", color=ink, ms=size, lw=0.8, zorder=3, clip_on=False)
            else:
                axes.plot(step, value, "o" if len(step) == 1 else "-", color=ink, ms=3.2, lw=1.1)
        labelled(axes, [(line.label, INKS[line.ink or "muted"], points) for line, _, points in series])
        dress(axes, spans, steps, inks, room=0.25 if len(panel.lines) > 1 else 0.12)

    return drawing(panel.title, draw)


def drawing(title: str, draw: Callable[["Axes"], None]) -> str:
    """What `draw` draws, as part of a page. title: of this drawing alone: its ids depend on nothing else."""
    import matplotlib
    from matplotlib.figure import Figure

    # Text stays text.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": title, "font.sans-serif": ["DejaVu Sans"]}):
        figure = Figure(figsize=(3.5, 2.1))
        axes = figure.subplots()
        figure.subplots_adjust(left=0.115, right=0.975, top=0.96, bottom=0.15)
        draw(axes)
        svg = io.StringIO()
        figure.savefig(
            svg,
            format="svg",
            transparent=True,
            metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")),
        )
    return _inlined(svg.getvalue())


def labelled(axes: "Axes", lines: Sequence[tuple[str, str, Points]]) -> None:
    """The labels of two lines at their ends, the upper one's above it and the lower one's below. lines: label, colour.

    A label stands once, clear of the last quarter of all lines that have it; lines without a label get none.
    """
    ends: dict[str, tuple[str, float, list[float]]] = {}
    first = min(points[0][0] for _, _, points in lines)
    for label, ink, points in lines:
        if label:
            last = points[-1][0]
            _, step, values = ends.get(label, (ink, last, []))
            tail = [value for at, value, _ in points if at >= last - (last - first) / 4]
            ends[label] = (ink, max(step, last), values + tail)
    top = max((label for label in ends), key=lambda label: fmean(ends[label][2]), default="")
    for label, (ink, step, values) in ends.items():
        above = label == top
        axes.annotate(
            label, (step, max(values) if above else min(values)), (0, 4 if above else -4),
            textcoords="offset points", color=ink, fontsize=8, ha="right", va="bottom" if above else "top",
        )  # fmt: skip


def dress(
    axes: "Axes", spans: list[Span], steps: tuple[float, float], inks: Mapping[str, str], *, room: float = 0.12
) -> None:
    """Axes that stay behind the data, over the training's steps, and on the floor a ribbon of the phases.

    room: above and below the data, as a share of their range.
    """
    axes.margins(y=room)
    axes.autoscale_view()
    for phase in dict.fromkeys((*TRAINING, *(of for of, _, _ in spans))):
        stretches = [(first, last - first) for of, first, last in spans if of == phase]
        axes.broken_barh(stretches, (0, 0.025), transform=axes.get_xaxis_transform(), color=INKS[inks[phase]], lw=0)
    axes.set_xlim(*steps)
    hairlines(axes)


def hairlines(axes: "Axes") -> None:
    """No frame, few numbers, and lines as thin as can be."""
    from matplotlib.ticker import MaxNLocator

    axes.spines[:].set_visible(False)
    axes.grid(axis="y", color=INKS["rule"], lw=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, labelsize=8, labelcolor=INKS["muted"])
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
        axis.set_major_formatter(lambda x, _: _tick(x))


def _tick(x: float) -> str:
    text = f"{x / 1000:g}k" if abs(x) >= 10_000 else f"{x:g}"
    return text.replace("-", "\N{MINUS SIGN}")


def _inlined(svg: str) -> str:
    """The drawing as part of a page: no prologue, no style or size of its own, the page's colours."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<svg.*?(viewBox=.*?) xmlns=.*?>", r'<svg \1 aria-hidden="true">', svg, count=1)
    svg = re.sub(r"<defs>\s*<style.*?</defs>", "", svg, count=1, flags=re.DOTALL)
    # Names such as axes_1 would be in every panel; what is referred to has a hash for a name.
    svg = re.sub(r' id="[\w.]+_\d+"', "", svg).replace("xlink:href", "href")
    for name, ink in INKS.items():
        svg = svg.replace(ink, f"var(--{name})")
    return svg
