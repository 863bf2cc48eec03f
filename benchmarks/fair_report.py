"""What the runs of `fair.py` come to: a result, the page that is made of it, and its picture."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from textwrap import fill
from typing import Any

from benchmarks.fair_run import POINTS
from benchmarks.fair_statistics import bootstrap_difference, front, holm, hypervolume, probability_of_improvement
from benchmarks.fair_tasks import ABILITIES, QUESTIONS
from benchmarks.mixing_report import by, markdown
from benchmarks.stamp import stamp

__all__ = ["BASELINES", "ENDS", "measure", "page", "retention", "table", "task_result", "write"]

Result = dict[str, Any]
BASELINES, BASELINE = ("sft_only", "rl_only", "sequential"), "sequential"
ENDS = ("tokens", "seconds")
Row = Mapping[str, float]


def retention(row: Row, start: Row) -> float:
    """What is left of the abilities that the run began with, at most 1; of none, all."""
    began = sum(start[name] for name in ABILITIES)
    return min(1.0, sum(row[name] for name in ABILITIES) / began) if began else 1.0


def measure(task: str, row: Row, start: Row) -> float:
    """What a task is judged by, of a row of a curve that begins with `start`: the reward, and where forgetting is asked
    about, reward times retention: the hypervolume of the one point."""
    return row["reward"] * (retention(row, start) if QUESTIONS[task].forgets else 1.0)


def task_result(task: str, tried: Sequence[Result], runs: Sequence[Result]) -> Result:
    """Of all runs of a task: those that the configurations were chosen by, and those of the seeds."""
    arms = {arm: _arm(task, sorted(own, key=lambda run: run["seed"])) for arm, own in by(runs, "arm").items()}
    tuning: dict[str, list[float]] = {}
    for run in sorted(tried, key=lambda run: run["trial"]):
        ends = [measure(task, run["curve"][run["at"][end]], run["curve"][0]) for end in ENDS]
        tuning.setdefault(run["arm"], []).append(fmean(ends))
    return {
        "about": QUESTIONS[task].about,
        "base": runs[0]["curve"][0],
        "tuning": {arm: tuning[arm] for arm in arms},
        "arms": arms,
        "against_sequential": {end: _comparisons(arms, end) for end in ENDS},
        "fronts": {end: _fronts(arms, end) for end in ENDS},
    }


def _arm(task: str, runs: Sequence[Result]) -> Result:
    """Of an arm's seeds: what each had at the end of each budget, and the mean curve."""

    def at(end: str) -> list[dict[str, float]]:
        rows = [(run["curve"][run["at"][end]], run["curve"][0]) for run in runs]
        return [
            {**row, "retention": retention(row, start), "measure": measure(task, row, start)} for row, start in rows
        ]

    def reached(run: Result, goal: float) -> dict[str, float]:
        return next(row for row in run["curve"] if row["tokens"] >= goal)

    goals = [runs[0]["tokens"] * i / POINTS for i in range(POINTS + 1)]
    curve = [
        [fmean(reached(run, goal)[name] for run in runs) for name in ("tokens", "seconds", "reward")] for goal in goals
    ]
    named = {name: runs[0][name] for name in ("trial", "drawn", "settings")}
    return {**named, "seeds": [run["seed"] for run in runs], "curve": curve, **{end: at(end) for end in ENDS}}


def _comparisons(arms: Mapping[str, Result], end: str) -> dict[str, Result]:
    """Each arm against sequential; p_holm is p for all of these comparisons together."""
    values = {arm: [row["measure"] for row in found[end]] for arm, found in arms.items()}
    theirs = values.pop(BASELINE)
    found = {arm: bootstrap_difference(ours, theirs) for arm, ours in values.items()}
    corrected = holm({arm: difference.p for arm, difference in found.items()})
    return {
        arm: {
            **asdict(difference),
            "p_holm": corrected[arm],
            "improvement": probability_of_improvement(values[arm], theirs),
        }
        for arm, difference in found.items()
    }


def _fronts(arms: Mapping[str, Result], end: str) -> Result:
    """Of the arms' mean points (reward, retention): which are on the front, and the area below it."""
    points = {arm: mean_point(found[end]) for arm, found in arms.items()}
    best = front(list(points.values()))
    return {
        "arms": [arm for arm, point in points.items() if point in best],
        "hypervolume": hypervolume(list(points.values())),
        "hypervolume_baselines": hypervolume([points[arm] for arm in points if arm in BASELINES]),
    }


def mean_point(rows: Sequence[Row]) -> tuple[float, float]:
    """Mean reward and retention of the seeds."""
    return fmean(row["reward"] for row in rows), fmean(row["retention"] for row in rows)


def table(found: Result) -> str:
    """Markdown: a line for each arm, at the end of both budgets."""
    titles = ["arm", *(f"{what}, equal {end}" for end in ENDS for what in ("measure", "retention", "over sequential"))]
    lines = [[*titles, "P(better)", "trial"], ["---"] * (len(titles) + 2)]
    for arm, own in found["arms"].items():
        cells = [arm]
        for end in ENDS:
            cells += [f"{fmean(row[name] for row in own[end]):.3f}" for name in ("measure", "retention")]
            cells.append("" if arm == BASELINE else said(found["against_sequential"][end][arm]))
        better = "" if arm == BASELINE else f"{found['against_sequential']['tokens'][arm]['improvement']:.2f}"
        lines.append([*cells, better, str(own["trial"])])
    return markdown(lines)


def said(difference: Row) -> str:
    """A difference with its interval; bold where it stands the correction."""
    text = f"{difference['mean']:+.3f} ({difference['low']:+.3f} to {difference['high']:+.3f})"
    return f"**{text}**" if difference["p_holm"] < 0.05 else text


def write(tasks: Mapping[str, Result], about: Mapping[str, Any], file: Path, docs: Path) -> None:
    """The result's file, the page and its picture."""
    result = {"benchmark": "fair", **stamp(device="cpu"), "device": "cpu, 1 thread a run", **about, "tasks": tasks}
    file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    docs.write_text(page(result), encoding="utf-8")
    if tasks:
        draw(tasks, docs.with_suffix(".png"))


INTRODUCTION = (
    "{done} of {all} tasks are answered: ten arms, each tuned over {trials} configurations on validation data, then "
    "five new seeds on test data, with {tokens:,} tokens or {seconds:g} s of one core a run. The "
    "[plan](../benchmarks/NOTES.md#does-mixing-help-asked-again-fairpy) was committed before the runs. Differences are "
    "to SFT then RL with its own best split, with 95 % bootstrap intervals; **bold** where p < .05 corrected for nine "
    "comparisons. Tiny models and made-up tasks: which way a result goes may carry over, its size does not."
)


def page(result: Result) -> str:
    """docs/does-mixing-help.md."""
    tasks = result["tasks"]
    counts = {"done": len(tasks), "all": len(QUESTIONS)}
    lines = ["# Does mixing SFT and RL help?", "", INTRODUCTION.format(**counts, **result)]
    for task, found in tasks.items():
        lines += ["", f"## {_title(task)}", "", _answer(task, found)]
    if tasks:
        lines += ["", "![Learning curves, and reward against what is left of the abilities](does-mixing-help.png)"]
    missing = [f"{_title(task)} ({count} runs to go)" for task, count in result["missing"].items() if count]
    if missing:
        lines += ["", f"**Not answered yet**, and nothing is claimed of them: {'; '.join(missing)}."]
        lines.append("`nice python benchmarks/fair.py` goes on.")
    lines += ["", "All figures: [fair-cpu-1-thread.json](../benchmarks/results/fair-cpu-1-thread.json)."]
    return "\n".join(lines) + "\n"


def _title(task: str) -> str:
    about = QUESTIONS[task].about
    return about[0].upper() + about[1:]


def _answer(task: str, found: Result) -> str:
    """What to use, with the figures."""
    mixtures = [arm for arm in found["arms"] if arm not in BASELINES]
    tokens, seconds = (found["against_sequential"][end] for end in ENDS)

    def stands(arm: str, sign: int) -> bool:
        return all(of[arm]["p_holm"] < 0.05 and sign * of[arm]["mean"] > 0 for of in (tokens, seconds))

    won = [arm for arm in mixtures if stands(arm, 1)]
    lost = [arm for arm in mixtures if stands(arm, -1)]
    below = [arm for arm in mixtures if arm not in lost and all(of[arm]["high"] < 0 for of in (tokens, seconds))]
    means = {arm: fmean(row["measure"] for row in own["tokens"]) for arm, own in found["arms"].items()}
    best = max(mixtures, key=lambda arm: means[arm])
    best_of = found["fronts"]["tokens"]
    verdict = (
        f"Mix: {_listed(won)}"
        if won
        else "No mixture is shown to be better than SFT then RL at equal tokens and equal seconds"
    )
    return (
        f"**{verdict}.** At equal tokens the {'reward x retention' if QUESTIONS[task].forgets else 'reward'} is "
        f"{means[BASELINE]:.3f} with SFT then RL, {means['sft_only']:.3f} with SFT alone, {means['rl_only']:.3f} "
        f"with RL alone, and {means[best]:.3f} with the best mixture, `{best}`: {said(tokens[best])}; at equal seconds "
        f"{said(seconds[best])}. Worse at both: {_listed(lost) or 'none'}; by the intervals alone, uncorrected: "
        f"{_listed(below) or 'none'}. On the front of reward and retention: {_listed(best_of['arms'])}; "
        f"the area below it is {best_of['hypervolume']:.3f}, and "
        f"{best_of['hypervolume_baselines']:.3f} without mixtures."
    )


def _listed(names: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def draw(tasks: Mapping[str, Result], file: Path) -> None:
    """A column a task: the arms' mean learning curves, and below their reward against retention with the front."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(
        2, len(tasks), figsize=(4.2 * len(tasks) + 1, 7), squeeze=False, layout="constrained"
    )
    for (above, below), (task, found) in zip(panels.T, tasks.items(), strict=True):
        for i, (arm, own) in enumerate(found["arms"].items()):
            look = {"color": f"C{i}", "marker": "XsoD^vPd<>"[i % 10], "label": arm}
            # Baselines are dashed.
            style = "--" if arm in BASELINES else "-"
            above.plot([x[0] / 1000 for x in own["curve"]], [x[2] for x in own["curve"]], style, **look)
            below.plot(*mean_point(own["tokens"]), linestyle="none", markersize=9, **look)
        best = front([mean_point(own["tokens"]) for own in found["arms"].values()])
        below.plot(*zip(*best, strict=True), color="0.6", zorder=0, drawstyle="steps-pre")
        above.set_title(fill(_title(task), 44), fontsize="medium")
        above.set(xlabel="1000 tokens", ylabel="reward on test prompts")
        below.set(xlabel="reward", ylabel="retention", ylim=(-0.03, 1.05))
        for axes in (above, below):
            axes.grid(alpha=0.3)
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(10, 3 * len(tasks)), frameon=False)
    figure.savefig(file, dpi=100)
    pyplot.close(figure)
