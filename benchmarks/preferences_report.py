"""The runs of `preferences.py` as tables and a picture: means over seeds, with 95 % confidence intervals."""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.mixing_report import by, interval, markdown, number
from benchmarks.mixing_tasks import TASKS

__all__ = ["draw", "gold_at", "hh_table", "judge_table", "mean_curve", "sweep_table", "table", "wilson"]

Z95 = 1.959964
KL_COEF = TASKS["reviews"].kl_coef  # of the sweep: gold reward that a nat of KL costs, as in the mixing study
COLUMNS = {
    "gold": "gold reward",
    "judge": "judge's reward",
    "kl": "KL",
    "response_length": "tokens an answer",
    "distinct_2": "distinct-2",
    "sft_loss": "SFT loss",
}
KLS = (0.5, 1, 2)  # at which the arms are compared
Run = Mapping[str, Any]


def wilson(right: float, count: int) -> dict[str, float]:
    """The share `right` / `count`, with its 95 % score interval.

    Source: Wilson 1927, Journal of the American Statistical Association 22, pages 209-212.
    """
    share, z2 = right / count, Z95**2
    middle = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = Z95 / (1 + z2 / count) * math.sqrt(share * (1 - share) / count + z2 / (4 * count**2))
    return {"mean": share, "low": middle - half, "high": middle + half}


def table(runs: Sequence[Run]) -> str:
    """Markdown: the base model and every arm at the end of its budget.

    judge: the first of the reward models that the arm learns from, the seed's first where it learns from none.
    gold at KL: see `gold_at`.   best gold: the highest mean over seeds on the way, and the tokens by then.
    """
    at = [f"gold at KL {kl}" for kl in KLS]
    titles = ["arm", "lr", *COLUMNS.values(), *at, "best gold", "kTokens trained + sampled", "seconds"]
    lines = [titles, ["---"] * len(titles)]
    starts = {run["seed"]: run["curve"][0] for run in runs}
    lines.append(["base", "", *_cells(list(starts.values())), *[""] * (3 + len(KLS))])
    for arm, own in by(runs, "arm").items():
        best = max(mean_curve(own), key=lambda point: point["gold"])
        tokens = [fmean(run["tokens"][kind] for run in own) / 1000 for kind in ("trained", "generated")]
        lines.append(
            [
                arm,
                f"{own[0]['lr']:g}",
                *_cells([run["curve"][-1] for run in own]),
                *(_reached([gold_at(run["curve"], kl) for run in own]) for kl in KLS),
                f"{best['gold']:.3f} at {best['trained'] / 1000:.0f}k",
                f"{tokens[0]:.0f} + {tokens[1]:.0f}",
                f"{fmean(run['cpu_seconds'] for run in own):.0f}",
            ]
        )
    return markdown(lines)


def _cells(points: Sequence[Mapping[str, float]]) -> list[str]:
    return [number(*interval([point[name] for point in points])) for name in COLUMNS]


def gold_at(curve: Sequence[Mapping[str, float]], kl: float) -> float | None:
    """The gold reward where a curve first comes to that KL, on the line between two points over sqrt(KL)."""
    line = list(zip(*_line(curve, "gold"), strict=True))
    for (x, gold), (next_x, next_gold) in pairwise(line):
        if x <= math.sqrt(kl) <= next_x and x < next_x:
            return gold + (next_gold - gold) * (math.sqrt(kl) - x) / (next_x - x)
    return None


def _reached(golds: Sequence[float | None]) -> str:
    """Their mean with its interval; nothing where a seed has not come so far."""
    known = [gold for gold in golds if gold is not None]
    return number(*interval(known)) if len(known) == len(golds) else ""


def mean_curve(runs: Sequence[Run]) -> list[dict[str, float]]:
    """The points of the seeds' curves, each measured after as many tokens, as means."""
    return [
        {name: fmean(point[name] for point in points) for name in points[0]}
        for points in zip(*(run["curve"] for run in runs), strict=True)
    ]


def judge_table(judges: Sequence[Run]) -> str:
    """Markdown: how well the reward models tell held-out pairs apart, by the labels as they are and by right ones."""
    names = {
        "clean_accuracy": "accuracy, right labels",
        "accuracy": "accuracy, labels as they are",
        "clean_ece": "ECE, right labels",
        "ece": "ECE, labels as they are",
    }
    titles = ["reward models", "", *names.values(), "held-out pairs", "kTokens", "seconds"]
    lines = [titles, ["---"] * len(titles)]
    for kind, own in by(judges, "arm").items():
        counts = [
            fmean(judge["metrics"]["num_pairs"] for judge in own),
            fmean(judge["tokens"]["trained"] for judge in own) / 1000,
            fmean(judge["cpu_seconds"] for judge in own),
        ]
        numbers = [number(*_over_seeds(own, name)) for name in names]
        lines.append([kind, str(len(own)), *numbers, *(f"{count:.0f}" for count in counts)])
    return markdown(lines)


def _over_seeds(judges: Sequence[Run], name: str) -> tuple[float, float]:
    """Of the seeds' means: the members of a seed have their pairs in common."""
    return interval([fmean(judge["metrics"][name] for judge in own) for own in by(judges, "seed").values()])


def hh_table(hh: Mapping[str, Any]) -> str:
    """Markdown: the reward model of SmolLM2 beside the rule of length, with Wilson's intervals."""
    rule = hh["length_rule"]
    lines = [
        [f"hh-rlhf harmless, {hh['accuracy']['pairs']} held-out pairs", "accuracy", "95 % interval"],
        ["---"] * 3,
        [f"SmolLM2-135M, {hh['train_pairs']} training pairs", *_wilson_cells(hh["accuracy"])],
        [f"prefer the {rule['prefers']} answer", *_wilson_cells(rule)],
    ]
    return markdown(lines)


def _wilson_cells(found: Mapping[str, float]) -> list[str]:
    return [f"{found['mean']:.3f}", f"{found['low']:.3f} to {found['high']:.3f}"]


def sweep_table(runs: Sequence[Run]) -> str:
    """Markdown: what each learning rate gave at the end, on validation data; the best in bold.

    Of an arm by gold reward - KL_COEF * KL: the reward alone would favour a policy that has forgotten the language.
    """
    titles = ["arm", "learning rate", "accuracy", "gold reward", "judge's reward", "KL", "SFT loss", "chosen by"]
    lines = [titles, ["---"] * len(titles)]
    for arm, own in by(runs, "arm").items():
        best = max(own, key=_goal)
        for run in own:
            end = run["metrics"] if "metrics" in run else run["curve"][-1]
            rate = f"**{run['lr']:g}**" if run is best else f"{run['lr']:g}"
            names = ("accuracy", "gold", "judge", "kl", "sft_loss")
            cells = [f"{end[name]:.3f}" if name in end else "" for name in names]
            lines.append([arm, rate, *cells, f"{_goal(run):.3f}"])
    return markdown(lines)


def _goal(run: Run) -> float:
    """What a run of the sweep is chosen by: of a reward model its accuracy by the labels as they are."""
    if "metrics" in run:
        return float(run["metrics"]["accuracy"])
    return float(run["curve"][-1]["gold"] - KL_COEF * run["curve"][-1]["kl"])


def draw(runs: Sequence[Run], file: Path) -> None:
    """The gold reward, and the judge's, over the square root of the KL: a line an arm, thin ones its seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from PIL import Image

    figure, panels = pyplot.subplots(1, 2, figsize=(12, 5.2), layout="constrained", sharex=True)
    titles = {
        "gold": "gold reward: VADER, -1 to 1",
        "judge": "the judge's reward: deviations of its held-out scores",
    }
    for axes, (name, title) in zip(panels, titles.items(), strict=True):
        for i, (arm, own) in enumerate(by(runs, "arm").items()):
            look = {"color": pyplot.colormaps["tab10"](i % 10), "linestyle": ("-", "--")[i // 10]}
            for run in own:
                axes.plot(*_line(run["curve"], name), **look, alpha=0.45, linewidth=0.7)
            axes.plot(*_line(mean_curve(own), name), **look, label=arm, marker="osX^vDP*<>"[i % 10], markersize=5)
        axes.set(xlabel="sqrt(KL to the base model), nats an answer", ylabel=title)
        axes.grid(alpha=0.3)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=6, frameon=False)
    figure.savefig(file, dpi=100)
    pyplot.close(figure)
    # A palette is enough for lines.
    Image.open(file).convert("RGB").quantize(64).save(file, optimize=True)


def _line(curve: Sequence[Mapping[str, float]], name: str) -> tuple[list[float], list[float]]:
    # An estimate of a KL near 0 may lie below it.
    return [math.sqrt(max(point["kl"], 0.0)) for point in curve], [point[name] for point in curve]
