"""Held-out pairs of answers: how far the rewards tell them apart, how sure of it they are, and some of them in full."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any, NamedTuple

from hybrid.run.curves import INKS, Curve, drawing, finite, hairlines
from hybrid.run.panels import Rows, called

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["PROBABILISTIC", "Bin", "Evaluated", "calibration", "evaluated_pairs", "pair_figures", "pairs_side_by_side"]

NUM_BINS = 10  # as in the expected calibration error of an evaluation (hybrid.objectives.pair_measures)
# Whose rewards say how likely a choice is right, as a sigmoid of their difference.
PROBABILISTIC = ("reward_model",)
NUM_EDGES = 18  # of a histogram, about

# The pairs of an evaluation by objective: its step, and their rows of samples.jsonl.
Evaluated = dict[str, list[tuple[int, Rows]]]


def evaluated_pairs(samples: Rows) -> Evaluated:
    """Of each objective the pairs of its first and of its last evaluation, in order of index; once where it is one."""
    found: dict[str, dict[int, dict[int, dict[str, Any]]]] = {}
    for row in samples:
        if row.get("phase") == "pairs":
            # Where a resumed run repeats a step, the later row.
            found.setdefault(row["objective"], {}).setdefault(row["step"], {})[row["index"]] = row
    return {
        objective: [
            (step, [steps[step][index] for index in sorted(steps[step])]) for step in sorted({min(steps), max(steps)})
        ]
        for objective, steps in found.items()
    }


class Bin(NamedTuple):
    """Pairs of like confidence: how many, its mean, and the share that was chosen right."""

    size: int
    confidence: float
    right: float


def calibration(differences: Iterable[float]) -> dict[int, Bin]:
    """The choices by their confidence sigmoid(|difference|), in ten bins of one width over [1/2, 1].

    differences: score of the chosen answer - that of the rejected one.   A tie is half right. Bins without a pair
    are left out.
    """
    bins: dict[int, list[tuple[float, float]]] = {}
    for difference in differences:
        confidence = 1 / (1 + math.exp(-min(abs(difference), 700.0)))
        number = min(int((confidence - 0.5) * 2 * NUM_BINS), NUM_BINS - 1)
        right = 0.5 if difference == 0 else float(difference > 0)
        bins.setdefault(number, []).append((confidence, right))
    return {
        number: Bin(len(found), *(sum(column) / len(found) for column in zip(*found, strict=True)))
        for number, found in sorted(bins.items())
    }


def pair_figures(evaluated: Evaluated) -> list[Curve]:
    """Of each objective a histogram of the margins, and where a reward means a probability how well that fits."""
    figures = []
    for objective, evaluations in evaluated.items():
        differences = [(step, _differences(rows)) for step, rows in evaluations]
        differences = [(step, found) for step, found in differences if found]
        if not differences:
            continue
        of = f", {called(objective)}" if len(evaluated) > 1 else ""
        if objective in PROBABILISTIC:
            figures.append(_reliability(f"Calibration{of}", differences))
        figures.append(_histogram(f"Margins{of}", differences))
    return figures


def _differences(rows: Rows) -> list[float]:
    sides = [(finite(row, "chosen_reward"), finite(row, "rejected_reward")) for row in rows]
    return [chosen - rejected for chosen, rejected in sides if chosen is not None and rejected is not None]


def _reliability(title: str, evaluations: Sequence[tuple[int, list[float]]]) -> Curve:
    """Share right by confidence; the distance from the diagonal, weighted by the counts, is the calibration error."""
    unit = "share right"
    found = [(step, calibration(differences)) for step, differences in evaluations]
    last_step, last = found[-1]

    def draw(axes: "Axes") -> None:
        axes.plot([0.5, 1], [0.5, 1], "--", color=INKS["muted"], lw=0.8)
        for number, of_bin in last.items():
            axes.plot([of_bin.confidence] * 2, [of_bin.confidence, of_bin.right], color=INKS["muted"], lw=0.8)
            middle = 0.5 + (number + 0.5) / (2 * NUM_BINS)
            axes.text(middle, 0.02, str(of_bin.size), color=INKS["muted"], fontsize=7, ha="center", va="bottom")
        for step, bins in found:
            ink, fill = ("eval", "eval") if step == last_step else ("muted", "paper")
            axes.scatter(
                [b.confidence for b in bins.values()], [b.right for b in bins.values()],
                # By area, from a dot that can still be seen.
                [8 + 42 * b.size / sum(b.size for b in bins.values()) for b in bins.values()],
                edgecolors=INKS[ink], facecolors=INKS[fill], zorder=3 if step == last_step else 2, clip_on=False,
            )  # fmt: skip
        axes.set_xlim(0.49, 1.01)
        axes.set_ylim(0, 1.05)
        hairlines(axes)

    bins = ", ".join(f"of {b.size} pairs at {b.confidence:.2f} {b.right:.2f} right" for b in last.values())
    return Curve(title, unit, f"{title} at step {last_step}: share right by confidence: {bins}.", drawing(title, draw))


def _histogram(title: str, evaluations: Sequence[tuple[int, list[float]]]) -> Curve:
    """How many pairs have which difference between the rewards of their sides; below 0 the wrong one is ahead."""
    from matplotlib.ticker import MaxNLocator

    unit = "pairs by margin"
    every = [difference for _, differences in evaluations for difference in differences]
    low, high = min(every), max(every)
    # Multiples of a round number: 0 is the border of two bins, not inside one.
    locator = MaxNLocator(NUM_EDGES, steps=[1, 2, 2.5, 5, 10])
    edges = [float(edge) for edge in locator.tick_values(low, high if high > low else low + 1.0)]

    def draw(axes: "Axes") -> None:
        axes.axvline(0, color=INKS["muted"], lw=0.8)
        for number, (_, differences) in enumerate(evaluations):
            is_last = number == len(evaluations) - 1
            ink, style = (INKS["eval"], "-") if is_last else (INKS["muted"], "--")
            if not is_last and max(differences) - min(differences) < edges[1] - edges[0]:
                # As before the first step: a bin of all pairs would press the others flat.
                axes.axvline(fmean(differences), color=ink, lw=1.2, ls=style)
                axes.annotate(
                    f"all {len(differences)}", (fmean(differences), 1), (4, -1), xycoords=("data", "axes fraction"),
                    textcoords="offset points", color=ink, fontsize=8, va="top",
                )  # fmt: skip
                continue
            counts = _counts(differences, edges)
            if is_last:
                axes.stairs(counts, edges, fill=True, color=ink, alpha=0.15)
            axes.stairs(counts, edges, color=ink, lw=1.2, ls=style)
        axes.margins(y=0.12)
        axes.set_xlim(edges[0], edges[-1])
        axes.set_ylim(bottom=0)
        hairlines(axes)
        axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))

    said = [
        f"at step {step} from {min(d):.3g} to {max(d):.3g}, {sum(x < 0 for x in d)} of {len(d)} below 0"
        for step, d in evaluations
    ]
    return Curve(title, unit, f"{title}, {unit}: {'; '.join(said)}.", drawing(title, draw))


def _counts(numbers: Iterable[float], edges: Sequence[float]) -> list[int]:
    """How many numbers are in each bin, from its lower edge to below its upper one; the last one's is in it."""
    counts = [0] * (len(edges) - 1)
    for number in numbers:
        bin = sum(edge <= number for edge in edges[1:-1])
        counts[bin] += 1
    return counts


@dataclass(frozen=True)
class Judged:
    """What one objective says of a pair. rewards: (chosen, rejected) at the first and at the last evaluation."""

    objective: str
    rewards: tuple[tuple[float | None, float | None], ...]

    @property
    def verdicts(self) -> tuple[str, ...]:
        """At each evaluation right, wrong or tie; unknown where a reward is no number."""
        return tuple(map(_verdict, self.rewards))


def _verdict(rewards: tuple[float | None, float | None]) -> str:
    chosen, rejected = rewards
    if chosen is None or rejected is None:
        return "unknown"
    return "right" if chosen > rejected else "tie" if chosen == rejected else "wrong"


def pairs_side_by_side(evaluated: Evaluated, limit: int) -> list[dict[str, Any]]:
    """The first pairs by index that both evaluations have: prompt, chosen, rejected, and what each objective says."""
    found: dict[tuple[str, str, str], list[Judged]] = {}
    for objective, evaluations in evaluated.items():
        ends = [{_texts(row): row for row in rows} for _, rows in evaluations]
        for texts in ends[-1]:
            if all(texts in end for end in ends):
                rewards = tuple(
                    (finite(end[texts], "chosen_reward"), finite(end[texts], "rejected_reward")) for end in ends
                )
                found.setdefault(texts, []).append(Judged(called(objective), rewards))
    names = ("prompt", "chosen", "rejected")
    return [{**dict(zip(names, texts, strict=True)), "judged": judged} for texts, judged in [*found.items()][:limit]]


def _texts(row: Mapping[str, Any]) -> tuple[str, str, str]:
    return row["prompt"], row["chosen"], row["rejected"]
