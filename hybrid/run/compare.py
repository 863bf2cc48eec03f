"""Several runs on one page: curves overlaid, last evaluations, settings and samples side by side."""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybrid.core import InputError
from hybrid.run.checkpoint import disk_errors, write_file
from hybrid.run.curves import INKS, Curve, Points, drawing, dress, finite, labelled, points_of
from hybrid.run.measures import better_end, measures_of
from hybrid.run.panels import TRAINING, Line, Rows, attributed, panels, training_phases
from hybrid.run.report import (
    NUM_SAMPLES,
    config_text,
    facts_of,
    rows_of,
    shown,
    typeset,
    whole_rows,
)
from hybrid.run.track import SAMPLES, read_jsonl

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from rich.table import Table

__all__ = ["comparison_table", "write_comparison"]

# As many as the page has colours that can be told apart (comparison.html.jinja, --run-0 to --run-7).
MAX_RUNS = 8

# What else an evaluation may hold: its name and its unit. Any other number stands under its own name.
_MORE = {"perplexity": ("Perplexity", "of the targets")}
# Numbers of an evaluation that measure nothing, or stand with another.
_ASIDE = {"step", "cycle", "num_prompts", "num_targets", "seconds", "elapsed", "reward_std"}

# The samples of one evaluation by prompt, and by how often that prompt has come before.
Answers = dict[tuple[str, int], dict[str, Any]]
# In the title of every page of ours.
PAGE_MARK = " · HybridTrainer</title>".encode()


@dataclass(frozen=True)
class _Run:
    """What one folder holds. rows: by phase, in order of step.   settings: text by dotted path."""

    name: str
    facts: dict[str, str]
    rows: dict[str, Rows]
    settings: dict[str, str]
    answers: Answers

    @property
    def evaluation(self) -> dict[str, Any]:
        """The last one; empty where there was none."""
        return self.rows["eval"][-1] if self.rows["eval"] else {}


@dataclass(frozen=True)
class _Measure:
    """One measure at each run's last evaluation, ready to print. best: whether that run's is the best."""

    name: str
    unit: str
    values: tuple[str, ...]
    best: tuple[bool, ...]


def comparison_table(folders: Sequence[str | Path]) -> "Table":
    """The runs' last evaluations for the console, the best in bold. Refuses what `write_comparison` does."""
    from rich.box import SIMPLE_HEAD
    from rich.markup import escape
    from rich.table import Table
    from rich.text import Text

    runs = _read(folders)
    table = Table(title="Last held-out evaluation", box=SIMPLE_HEAD)
    table.add_column("")
    for run in runs:
        table.add_column(escape(f"{run.name}\n{_when(run)}"), justify="right", overflow="fold")
    for measure in _measures(runs):
        values = zip(measure.values, measure.best, strict=True)
        table.add_row(Text(measure.name), *(Text(value, "bold" if best else "") for value, best in values))
    return table


def write_comparison(folders: Sequence[str | Path], output: str | Path) -> Path:
    """Write the runs' comparison: one file of HTML that needs no other; same runs, same bytes.

    Refuses (InputError) fewer than two runs, more than eight, one given twice, what is no run folder, and an output
    that cannot be written, or is there and no page of ours.
    """
    from jinja2 import DictLoader, Environment, StrictUndefined
    from markupsafe import Markup

    runs, output = _read(folders), Path(os.path.expanduser(output))
    if output.is_file() and output.stat().st_size and PAGE_MARK not in output.read_bytes():
        raise InputError(f"the output {str(output)!r} is there already, and no comparison of ours: give another name")
    # The report's own looks: the macros before its first tag, and its style.
    macros, _, report = _source("report.html.jinja").partition("<!doctype html>")
    style = report.partition("<style>")[2].partition("</style>")[0]
    page = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        loader=DictLoader({"macros": macros, "page": _source("compare.html.jinja")}),
    )
    page.filters |= {"typeset": typeset, "finite": finite}
    with whole_rows(", ".join(run.name for run in runs)):
        html = page.get_template("page").render(
            style=Markup(style),
            runs=runs,
            facts=list(dict.fromkeys(fact for run in runs for fact in run.facts)),
            when=[_when(run) for run in runs],
            measures=_measures(runs),
            curves=_curves(runs),
            settings=_differences(runs),
            samples=_side_by_side(runs),
        )
    with disk_errors(f"write the comparison to {str(output)!r}"):
        output.parent.mkdir(parents=True, exist_ok=True)
        # A lone surrogate in a response is no UTF-8; as a character reference it shows as U+FFFD.
        return write_file(output, html.encode("utf-8", errors="xmlcharrefreplace"))


def _source(name: str) -> str:
    return resources.files("hybrid.run").joinpath(name).read_text("utf-8")


def _read(folders: Sequence[str | Path]) -> list[_Run]:
    """The runs in the folders, named by them. Refuses what `write_comparison` does."""
    if not 2 <= len(folders) <= MAX_RUNS:
        raise InputError(f"a comparison takes 2 to {MAX_RUNS} run folders, got {len(folders)}")
    paths = [Path(os.path.expanduser(folder)).resolve() for folder in folders]
    for path in paths:
        if paths.count(path) > 1:
            raise InputError(f"the run {str(path)!r} is given twice; a comparison takes each run once")
    runs = []
    for path in paths:
        rows = rows_of(path)
        config = config_text(path)
        samples = read_jsonl(path / SAMPLES) if (path / SAMPLES).exists() else []
        facts = facts_of(path, rows, config)
        runs.append(_Run(_name(path, paths), facts, rows, _settings(config), _answers(samples)))
    return runs


def _name(path: Path, paths: Sequence[Path]) -> str:
    """The folder's name, with as many of those above it as tell it from the other runs."""
    for depth in range(1, len(path.parts)):
        tail = path.parts[-depth:]
        if sum(other.parts[-depth:] == tail for other in paths) == 1:
            return "/".join(tail)
    return str(path)


def _when(run: _Run) -> str:
    """When a run's last evaluation was made, and on how many prompts."""
    if not run.evaluation:
        return "no evaluation"
    prompts = finite(run.evaluation, "num_prompts")
    pairs = max((finite(run.evaluation, key) or 0.0 for key in run.evaluation if key.endswith("/num_pairs")), default=0)
    counts = (prompts is not None, f", {prompts or 0:.0f} prompts"), (pairs > 0, f", {pairs:.0f} pairs")
    return f"step {run.evaluation['step']}" + "".join(text for is_known, text in counts if is_known)


def _measures(runs: Sequence[_Run]) -> list[_Measure]:
    """What any of the last evaluations has measured: the report's measures first, then the others."""
    known = {
        key: (name, unit, format)
        for key, name, unit, format, _ in measures_of((run.evaluation for run in runs), every=True)
    }
    others = {key: (*_MORE.get(key, (key, "")), "{:z.4g}") for run in runs for key in run.evaluation}
    measures = []
    for key, (name, unit, format) in (
        known | {key: other for key, other in others.items() if key not in known}
    ).items():
        numbers = [finite(run.evaluation, key) for run in runs]
        if key in _ASIDE or key.endswith(("_sem", "/num_pairs")) or all(number is None for number in numbers):
            continue
        texts = [format.format(number) if number is not None else None for number in numbers]
        best, better = None, better_end(key)
        if better is not None:
            best = (max if better == "max" else min)(number for number in numbers if number is not None)
        # What reads the same is as good; where all runs are the best, none is.
        marked = tuple(text is not None and best is not None and text == format.format(best) for text in texts)
        if all(mark or text is None for mark, text in zip(marked, texts, strict=True)):
            marked = (False,) * len(runs)
        measures.append(_Measure(name, unit, tuple(shown(run.evaluation, key, format) for run in runs), marked))
    return measures


def _settings(config: str) -> dict[str, str]:
    """Every setting of a config as YAML would write it, by its dotted path."""
    import yaml

    loaded = yaml.safe_load(config)
    return {
        path: yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10**6)
        .strip()
        .removesuffix("...")
        .strip()
        for path, value in _leaves(loaded if isinstance(loaded, dict) else {})
    }


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """The values of nested mappings, and of lists of mappings, by their dotted path."""
    nested: Mapping[Any, Any] = {}
    if isinstance(value, dict):
        nested = value
    elif isinstance(value, list) and all(isinstance(item, dict) for item in value):
        nested = dict(enumerate(value))
    if not nested and value != {}:
        yield path, value
    for key, inner in nested.items():
        yield from _leaves(inner, f"{path}.{key}" if path else str(key))


def _differences(runs: Sequence[_Run]) -> list[tuple[str, list[str | None]]]:
    """Settings that are not the same in every run that has any, and what they are; None where a run lacks one."""
    kept = [run for run in runs if run.settings]
    paths = dict.fromkeys(path for run in kept for path in run.settings)
    differ = [path for path in paths if len({run.settings.get(path) for run in kept}) > 1]
    return [(path, [run.settings.get(path) for run in runs]) for path in differ]


def _answers(samples: Rows) -> Answers:
    """The samples of the last evaluation, in order of index."""
    rows = [row for row in samples if row.get("phase") == "eval" and finite(row, "step") is not None]
    last = max((row["step"] for row in rows), default=None)
    # Where a resumed run repeats a step, the later row.
    by_index = {row.get("index", 0): row for row in rows if row["step"] == last}
    answers: Answers = {}
    for index in sorted(by_index):
        row, before = by_index[index], 0
        while (key := (str(row.get("prompt") or ""), before)) in answers:
            before += 1
        answers[key] = row
    return answers


def _side_by_side(runs: Sequence[_Run]) -> list[list[dict[str, Any] | None]]:
    """Prompts that two runs or more have answered, those of most runs first, else as they come."""
    asked = dict.fromkeys(key for run in runs for key in run.answers)
    count = {key: sum(key in run.answers for run in runs) for key in asked}
    shared = sorted((key for key in asked if count[key] > 1), key=lambda key: -count[key])
    return [[run.answers.get(key) for run in runs] for key in shared[:NUM_SAMPLES]]


def _curves(runs: Sequence[_Run]) -> list[Curve]:
    """The report's panels with every run that has numbers for them; none before a second step."""
    rows = [attributed(run.rows) for run in runs]
    phases = (*training_phases(rows), "eval")
    steps = [row["step"] for of_run in rows for phase in phases for row in of_run.get(phase, [])]
    if len(set(steps)) < 2:
        return []
    drawn = []
    for panel in panels(rows):
        series = [
            (number, line, phase, points)
            for number, of_run in enumerate(rows)
            for line in panel.lines
            for phase in phases
            if (key := line.key(phase)) is not None and (points := points_of(of_run.get(phase, []), key))
        ]
        if series:
            ends = [
                f"{runs[n].name} ({line.label and line.label + ', '}{phase}) from {p[0][1]:.3g} to {p[-1][1]:.3g}"
                for n, line, phase, p in series
            ]
            description = f"{panel.title} ({panel.unit}) by training step: {', '.join(ends)}."
            svg = _svg(panel.title, series, (min(steps), max(steps)))
            drawn.append(Curve(panel.title, panel.unit, description, svg))
    return drawn


def _svg(title: str, series: Sequence[tuple[int, Line, str, Points]], steps: tuple[float, float]) -> str:
    """One panel, each run in its colour: training as a thin line, evaluations as dots on a strong one.

    Of a panel with two lines the second is dashed, and its dots are hollow.
    """
    # As in curves.py a colour stands for a CSS variable.
    inks = {number: f"#0001{number:02}" for number, *_ in series}
    evaluated = {number for number, _, phase, _ in series if phase == "eval"}
    first = series[0][1]

    def draw(axes: "Axes") -> None:
        for number, line, phase, points in series:
            step, value, _ = zip(*points, strict=True)
            ink, style = inks[number], "-" if line is first else "--"
            if phase == "eval":
                size = min(3.2, 100 / len(step))
                fill = ink if line is first else INKS["paper"]
                axes.plot(step, value, f"o{style}", color=ink, mfc=fill, ms=size, lw=1.1, zorder=3, clip_on=False)
            else:
                width, alpha = (0.8, 0.4) if number in evaluated else (1.1, 1)
                kind = "o" if len(step) == 1 else style
                axes.plot(step, value, kind, color=ink, ms=3.2, lw=width, alpha=alpha)
        labelled(axes, [(line.label, INKS["muted"], points) for _, line, _, points in series])
        dress(axes, [], steps, {phase: phase for phase in TRAINING}, room=0.25 if first.label else 0.12)

    svg = drawing(title, draw)
    for number, ink in inks.items():
        svg = svg.replace(ink, f"var(--run-{number})")
    return svg
