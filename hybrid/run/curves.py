"""A run's numbers as small figures: one panel a measure, drawn to stand inside a page."""

import io
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["PANELS", "TRAINING", "Curve", "Rows", "curves", "dress", "finite", "inlined", "points_of"]

Rows = list[dict[str, Any]]
Points = list[tuple[float, float, float]]  # step, number, standard error (0 where there is none)
Span = tuple[str, float, float]  # phase, and the steps between which it went on

# Title, unit, and which number of which phase is drawn.
PANELS = (
    ("Reward", "mean score", {"ppo": "reward", "joint": "reward", "eval": "reward"}),
    ("KL to the reference", "nats per response", {"ppo": "kl", "joint": "kl", "eval": "kl"}),
    ("SFT loss", "nats per token", {"sft": "loss", "joint": "sft_loss", "eval": "sft_loss"}),
    ("BLEU", "of the corpus, 0 to 100", {"eval": "bleu"}),
    ("chrF", "of the corpus, 0 to 100", {"eval": "chrf"}),
    ("ROUGE-L", "mean F1, 0 to 1", {"eval": "rouge_l"}),
    ("Word F1", "mean, 0 to 1", {"eval": "token_f1"}),
    ("Exact match", "share of responses", {"eval": "exact_match"}),
    ("Entropy", "nats per token", {"ppo": "entropy", "joint": "entropy"}),
    ("Response length", "tokens", {"ppo": "response_length", "joint": "response_length", "eval": "response_length"}),
    ("Throughput", "tokens per second", dict.fromkeys(("sft", "ppo", "joint"), "tokens_per_second")),
)
TRAINING = ("sft", "ppo", "joint")  # the kinds of step
_PHASES = {"sft": "SFT", "ppo": "PPO", "joint": "joint SFT and PPO", "eval": "held-out evaluation"}

# matplotlib wants fixed colours, the page has its own, light or dark: these stand for its CSS variables.
_INKS = {
    "sft": "#000001",
    "ppo": "#000002",
    "eval": "#000003",
    "muted": "#000004",
    "rule": "#000005",
    "joint": "#000006",
}


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


def curves(rows: Mapping[str, Rows]) -> list[Curve]:
    """The panels that the rows have numbers for, on one axis of training steps; none before a second step."""
    steps = [row["step"] for phase in _PHASES for row in rows[phase]]
    if len(set(steps)) < 2:
        return []
    drawn = []
    for title, unit, keys in PANELS:
        series = {phase: points_of(rows[phase], key) for phase, key in keys.items()}
        series = {phase: points for phase, points in series.items() if points}
        if series:
            ends = [f"{_PHASES[phase]} from {p[0][1]:.3g} to {p[-1][1]:.3g}" for phase, p in series.items()]
            description = f"{title} ({unit}) by training step: {', '.join(ends)}."
            svg = _svg(title, series, _spans(rows), (min(steps), max(steps)))
            drawn.append(Curve(title, unit, description, svg))
    return drawn


def points_of(rows: Rows, key: str) -> Points:
    numbers = ((row["step"], finite(row, key), finite(row, f"{key}_sem") or 0.0) for row in rows)
    return [(step, value, error) for step, value, error in numbers if value is not None]


def _spans(rows: Mapping[str, Rows]) -> list[Span]:
    """Each stretch of training in one phase, from the step where the one before it ended."""
    steps = sorted((row["step"], phase) for phase in TRAINING for row in rows[phase])
    spans: list[Span] = []
    for phase, stretch in groupby(steps, key=itemgetter(1)):
        first, *rest = (step for step, _ in stretch)
        spans.append((phase, spans[-1][2] if spans else first - 1, rest[-1] if rest else first))
    return spans


def _svg(title: str, series: Mapping[str, Points], spans: list[Span], steps: tuple[float, float]) -> str:
    """One panel: training as a thin line, evaluations as dots in a band of one standard error."""
    import matplotlib
    from matplotlib.figure import Figure

    # Text stays text, and ids depend on nothing but the panel.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": title, "font.sans-serif": ["DejaVu Sans"]}):
        figure = Figure(figsize=(3.5, 2.1))
        axes = figure.subplots()
        figure.subplots_adjust(left=0.115, right=0.975, top=0.96, bottom=0.15)
        for phase, points in series.items():
            step, value, _ = zip(*points, strict=True)
            ink = _INKS[phase]
            if phase == "eval":
                low, high = zip(*((v - e, v + e) for _, v, e in points), strict=True)
                axes.fill_between(step, low, high, color=ink, alpha=0.15, lw=0)
                # Dots shrink where they would run into each other.
                size = min(3.2, 100 / len(step))
                axes.plot(step, value, "o-", color=ink, ms=size, lw=0.8, zorder=3, clip_on=False)
            else:
                axes.plot(step, value, "o" if len(step) == 1 else "-", color=ink, ms=3.2, lw=1.1)
        dress(axes, spans, steps)
        svg = io.StringIO()
        figure.savefig(
            svg,
            format="svg",
            transparent=True,
            metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")),
        )
    return inlined(svg.getvalue())


def dress(axes: "Axes", spans: list[Span], steps: tuple[float, float]) -> None:
    """Axes that stay behind the data: few numbers, hairlines, and on the floor a ribbon of the phases."""
    from matplotlib.ticker import MaxNLocator

    axes.margins(y=0.12)
    axes.autoscale_view()
    for phase in TRAINING:
        stretches = [(first, last - first) for of, first, last in spans if of == phase]
        axes.broken_barh(stretches, (0, 0.025), transform=axes.get_xaxis_transform(), color=_INKS[phase], lw=0)
    axes.set_xlim(*steps)
    axes.spines[:].set_visible(False)
    axes.grid(axis="y", color=_INKS["rule"], lw=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, labelsize=8, labelcolor=_INKS["muted"])
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
        axis.set_major_formatter(lambda x, _: _tick(x))


def _tick(x: float) -> str:
    text = f"{x / 1000:g}k" if abs(x) >= 10_000 else f"{x:g}"
    return text.replace("-", "\N{MINUS SIGN}")


def inlined(svg: str) -> str:
    """The drawing as part of a page: no prologue, no style or size of its own, the page's colours."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<svg.*?(viewBox=.*?) xmlns=.*?>", r'<svg \1 aria-hidden="true">', svg, count=1)
    svg = re.sub(r"<defs>\s*<style.*?</defs>", "", svg, count=1, flags=re.DOTALL)
    # Names such as axes_1 would be in every panel; what is referred to has a hash for a name.
    svg = re.sub(r' id="[\w.]+_\d+"', "", svg).replace("xlink:href", "href")
    for name, ink in _INKS.items():
        svg = svg.replace(ink, f"var(--{name})")
    return svg
