"""The runs of `mixing.py` as a table and a picture: means over seeds, with 95 % confidence intervals."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from textwrap import fill
from typing import Any

__all__ = ["by", "draw", "interval", "markdown", "number", "sweep_table", "table"]

BASELINE = "sequential"
# Two-sided 95 % quantiles of Student's t, by degrees of freedom.
T95 = (math.nan, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
# Metric and its title; a task without the metric has no such column.
COLUMNS = {
    "reward": "reward",
    "reward_hard": "reward, hard",
    "sft_loss": "SFT loss",
    "kl": "KL",
    "distinct_2": "distinct-2",
}
Run = Mapping[str, Any]


def interval(numbers: Sequence[float]) -> tuple[float, float]:
    """Mean, and half of its 95 % confidence interval (NaN of a single number)."""
    n = len(numbers)
    if n > len(T95):
        raise ValueError(f"interval: at most {len(T95)} numbers, got {n}; extend T95")
    return fmean(numbers), T95[n - 1] * stdev(numbers) / math.sqrt(n) if n > 1 else math.nan


def table(runs: Sequence[Run]) -> str:
    """Markdown, a table for each task.

    Behind reward and SFT loss: the difference to `sequential`, of runs with the same seed; bold where its interval
    excludes 0.
    """
    return "\n\n".join(_task_table(task, own) for task, own in by(runs, "task").items())


def _task_table(task: str, runs: Sequence[Run]) -> str:
    arms = by(runs, "arm")
    baseline = arms.get(BASELINE, [])
    first = runs[0]["metrics"]
    # Answers of one word have no bigrams, of which any would be distinct.
    columns = {
        name: title for name, title in COLUMNS.items() if name in first and (first[name] or name != "distinct_2")
    }
    compared = ("reward", "sft_loss")
    titles = [task, *columns.values(), *(f"{columns[name]} - {BASELINE}" for name in compared), "kTokens", "seconds"]
    lines = [titles, ["---"] * len(titles)]
    for arm, own in arms.items():
        cells = [number(*interval([run["metrics"][name] for run in own])) for name in columns]
        cells += [_difference(own, baseline, name) for name in compared]
        lines.append([arm, *cells, *_cost(own)])
    return markdown(lines)


def _difference(runs: Sequence[Run], baseline: Sequence[Run], metric: str) -> str:
    theirs = {run["seed"]: run["metrics"][metric] for run in baseline}
    pairs = [run["metrics"][metric] - theirs[run["seed"]] for run in runs if run["seed"] in theirs]
    if runs[0]["arm"] in (BASELINE, "base") or not pairs:
        return ""
    mean, half = interval(pairs)
    text = number(mean, half, sign="+")
    return f"**{text}**" if abs(mean) > half else text


def _cost(runs: Sequence[Run]) -> list[str]:
    """Thousands of tokens, as SFT + PPO + generated, and seconds of one core."""
    if "tokens" not in runs[0]:
        return ["", ""]
    tokens = [fmean(run["tokens"][kind] for run in runs) / 1000 for kind in ("sft", "ppo", "generated")]
    return [" + ".join(f"{count:.0f}" for count in tokens), f"{fmean(run['cpu_seconds'] for run in runs):.0f}"]


def number(mean: float, half: float, sign: str = "") -> str:
    """A mean and half of its interval, which may be NaN."""
    text = f"{mean:{sign}.3f}"
    return text if math.isnan(half) else f"{text} ± {half:.3f}"


def sweep_table(runs: Sequence[Run], sft_goals: Mapping[str, str]) -> str:
    """Markdown: what each learning rate gave, on validation data.

    The best in bold: of sft_only by its task's goal, of rl_only_kl by what PPO maximises there, reward - coef * KL.
    The reward alone would favour a policy that has forgotten the language.
    """
    titles = ["task", "arm", "learning rate", "SFT loss", "reward", "KL", "reward - coef KL"]
    lines = [titles, ["---"] * len(titles)]
    for task, of_task in by(runs, "task").items():
        for arm, own in by(of_task, "arm").items():
            best = max(own, key=_goal(arm, sft_goals[task]))
            for run in sorted(own, key=lambda run: run["lr"]):
                rate = f"**{run['lr']:g}**" if run is best else f"{run['lr']:g}"
                numbers = [*(run["metrics"][name] for name in ("sft_loss", "reward", "kl")), _penalised(run)]
                lines.append([task, arm, rate, *(f"{number:.3f}" for number in numbers)])
    return markdown(lines)


def _goal(arm: str, sft_goal: str) -> Callable[[Run], float]:
    """What a run of the sweep is chosen by: more is better."""
    if arm != "sft_only":
        return _penalised
    return lambda run: run["metrics"][sft_goal] * (-1 if sft_goal == "sft_loss" else 1)


def _penalised(run: Run) -> float:
    return run["metrics"]["reward"] - run["config"]["kl"]["coef"] * run["metrics"]["kl"]


def markdown(lines: Iterable[Sequence[str]]) -> str:
    """The lines' cells as a table."""
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def draw(runs: Sequence[Run], titles: Mapping[str, str], file: Path) -> None:
    """A panel a task: reward over validation loss, an arm a point, with both intervals. Up and left is better."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    tasks = by(runs, "task")
    figure, panels = pyplot.subplots(1, len(tasks), figsize=(6 * len(tasks), 5.5), squeeze=False, layout="constrained")
    # An arm keeps colour and marker in all panels; the number of colours and of markers have no common factor.
    looks = {
        arm: {"color": pyplot.colormaps["tab10"](i % 10), "marker": "XsoD^vP"[i % 7]}
        for i, arm in enumerate(by(runs, "arm"))
    }
    for axes, (task, own) in zip(panels[0], tasks.items(), strict=True):
        for arm, same in by(own, "arm").items():
            (x, x_half), (y, y_half) = (
                interval([run["metrics"][name] for run in same]) for name in ("sft_loss", "reward")
            )
            axes.errorbar(
                x, y, xerr=_drawn(x_half), yerr=_drawn(y_half), **looks[arm], label=arm,
                capsize=2, linewidth=1, markersize=8, linestyle="none",
            )  # fmt: skip
        axes.set(xlabel="held-out SFT loss, nats a token", ylabel="held-out reward")
        axes.set_title(fill(f"{task}: {titles[task]}", 60), fontsize="medium")
        axes.grid(alpha=0.3)
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(7, 3 * len(tasks)), frameon=False)
    figure.savefig(file, dpi=110)
    pyplot.close(figure)


def _drawn(half: float) -> float | None:
    return None if math.isnan(half) else half


def by(runs: Iterable[Run], key: str) -> dict[str, list[Run]]:
    """The runs by what they have under `key`, in order of appearance."""
    grouped: dict[str, list[Run]] = {}
    for run in runs:
        grouped.setdefault(run[key], []).append(run)
    return grouped
