"""A run's folder as one page to read: before and after, curves, samples, configuration."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybrid.core import InputError, first_line
from hybrid.run.checkpoint import disk_errors, write_file
from hybrid.run.curves import colours, curves, finite
from hybrid.run.measures import measures_of
from hybrid.run.memory_figures import memory_figures
from hybrid.run.pair_figures import PROBABILISTIC, evaluated_pairs, pair_figures, pairs_side_by_side
from hybrid.run.panels import TRAINING, Rows, called, phase_names, training_phases
from hybrid.run.track import CONFIG, METRICS, REPORT, SAMPLES, read_jsonl

if TYPE_CHECKING:
    from rich.table import Table

__all__ = [
    "NUM_SAMPLES",
    "Summary",
    "SummaryRow",
    "config_text",
    "facts_of",
    "rows_of",
    "shown",
    "summary",
    "summary_table",
    "typeset",
    "whole_rows",
    "write_report",
]

NUM_SAMPLES = 12  # prompts shown before and after: a few screens


@dataclass(frozen=True)
class SummaryRow:
    """One measure, ready to print: a value for each of the summary's steps, and the change between them."""

    name: str
    unit: str
    values: tuple[str, ...]
    change: str


@dataclass(frozen=True)
class Summary:
    """The first and the last evaluation of a run.

    steps: when they were made; shorter than two where there were fewer evaluations.
    num_prompts, num_pairs: how many held-out ones they were made on; None where that is not known.
    rows: the measures that were taken.
    """

    steps: tuple[int, ...]
    num_prompts: int | None
    rows: tuple[SummaryRow, ...]
    num_pairs: int | None = None

    @property
    def held_out(self) -> str:
        """What the measures are of: "64 held-out prompts and 32 held-out pairs"."""
        counts = (self.num_prompts, "prompts"), (self.num_pairs, "pairs")
        return " and ".join(f"{count} held-out {what}" for count, what in counts if count)


def summary(folder: str | Path, *, until: int | None = None) -> Summary:
    """A run's first and last evaluation (`until` a step), side by side. Refuses (InputError) what is no run folder."""
    return _summary(rows_of(Path(folder), until=until))


def summary_table(summary: Summary) -> "Table":
    """The summary for the console: `rich.print(summary_table(summary(folder)))`."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    counts = (summary.num_prompts, "prompts"), (summary.num_pairs, "pairs")
    made_on = "".join(f", {count} {what}" for count, what in counts if count)
    title = f"Held-out evaluation{made_on}" if summary.steps else "No evaluation was recorded"
    table = Table(title=title, box=SIMPLE_HEAD)
    if summary.steps:
        table.add_column("")
    for step in summary.steps:
        table.add_column(f"step {step}", justify="right")
    if len(summary.steps) == 2:
        table.add_column("change", justify="right")
    for row in summary.rows:
        table.add_row(row.name, *row.values, row.change)
    return table


def write_report(folder: str | Path) -> Path:
    """Write `report.html` into a run's folder: one file that needs no other; same run, same bytes.

    Refuses (InputError) what is no run folder.
    """
    from jinja2 import Environment, StrictUndefined

    folder = Path(folder)
    rows = rows_of(folder)
    samples = read_jsonl(folder / SAMPLES) if (folder / SAMPLES).exists() else []
    config = config_text(folder)

    page = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    page.filters |= {"typeset": typeset, "finite": finite}
    source = resources.files("hybrid.run").joinpath("report.html.jinja").read_text("utf-8")
    with whole_rows(folder):
        pairs = evaluated_pairs(samples)
        html = page.from_string(source).render(
            name=folder.resolve().name,
            facts=facts_of(folder, rows, config),
            summary=_summary(rows),
            key=_key(rows),
            curves=curves(rows),
            memory_figures=memory_figures(folder, rows),
            pair_figures=pair_figures(pairs),
            is_calibrated=any(objective in PROBABILISTIC for objective in pairs),
            pairs=pairs_side_by_side(pairs, NUM_SAMPLES),
            pair_steps=sorted({step for evaluations in pairs.values() for step, _ in evaluations}),
            samples=_before_and_after(samples),
            config=config,
        )
    with disk_errors(f"write the report to {str(folder)!r}"):
        # A lone surrogate in a response is no UTF-8; as a character reference it shows as U+FFFD.
        return write_file(folder / REPORT, html.encode("utf-8", errors="xmlcharrefreplace"))


def rows_of(folder: Path, *, until: int | None = None) -> dict[str, Rows]:
    """Rows of metrics.jsonl by phase, in order of step, all or `until` a step. Of a repeated step the later row."""
    path = folder / METRICS
    if not path.is_file():
        raise InputError(f"{str(folder)!r} is not a run folder: it holds no {METRICS}")
    latest = {}
    for line, row in enumerate(read_jsonl(path), start=1):
        if finite(row, "step") is None or not isinstance(row.get("phase"), str):
            raise InputError(f"{path}, line {line} has no step or no phase")
        latest[row["phase"], row["step"]] = row
    rows: dict[str, Rows] = {phase: [] for phase in (*TRAINING, "eval")}
    for phase, step in sorted(latest, key=lambda key: key[1]):
        if until is not None and step > until:
            break
        rows.setdefault(phase, []).append(latest[phase, step])
    return rows


def _key(rows: Mapping[str, Rows]) -> list[tuple[str, str]]:
    """What the curves' colours mean: the class of each, and its text."""
    inks, names = colours(rows), phase_names(rows)
    texts = []
    for phase in training_phases([rows]):
        # Each step has a rollout, and several updates of it.
        iterates = names[phase] in ("PPO", "joint SFT and PPO") or any("response_length" in row for row in rows[phase])
        texts.append((phase, names[phase] + (", each iteration" if iterates else "")))
    pairs = any(key.count("/") == 1 and key.endswith("_sem") for row in rows["eval"] for key in row)
    texts.append(("eval", f"held-out evaluation, ± standard error{'' if pairs else ' of the reward'}"))
    return [(inks[phase], text) for phase, text in texts if rows[phase]]


def _summary(rows: Mapping[str, Rows]) -> Summary:
    evals = rows["eval"][:1] + rows["eval"][1:][-1:]
    measured = []
    for key, name, unit, format, change in measures_of(evals):
        known = [value for row in evals if (value := finite(row, key)) is not None]
        if known:
            values = tuple(shown(row, key, format) for row in evals)
            measured.append(SummaryRow(name, unit, values, change(*known) if len(known) == 2 else ""))
    last = evals[-1] if evals else {}
    num_prompts = finite(last, "num_prompts")
    num_pairs = [count for key in last if key.endswith("/num_pairs") and (count := finite(last, key)) is not None]
    return Summary(
        steps=tuple(row["step"] for row in evals),
        num_prompts=None if num_prompts is None else int(num_prompts),
        rows=tuple(measured),
        num_pairs=int(max(num_pairs)) if num_pairs else None,
    )


def shown(row: Mapping[str, Any], key: str, format: str) -> str:
    value, error = finite(row, key), finite(row, f"{key}_sem")
    if value is None:
        return "n/a"
    return format.format(value) + (f" ±\N{NO-BREAK SPACE}{format.format(error)}" if error is not None else "")


def facts_of(folder: Path, rows: Mapping[str, Rows], config: str) -> dict[str, str]:
    """What stands under the title."""
    import yaml  # jsonargparse, which wrote the file, depends on it

    try:
        settings = yaml.safe_load(config)
    except yaml.YAMLError as error:
        raise InputError(f"{folder / CONFIG} is not YAML: {' '.join(str(error).split())}") from error
    settings = settings if isinstance(settings, dict) else {}
    model, run = settings.get("model"), settings.get("run")
    training = [("joint" if phase == "joint" else called(phase), len(rows[phase])) for phase in training_phases([rows])]
    elapsed = [finite(row, "elapsed") or 0.0 for phase in rows.values() for row in phase]
    facts = {
        "Model": model.get("name") if isinstance(model, dict) else None,
        "Seed": run.get("seed") if isinstance(run, dict) else None,
        "Steps": " + ".join(f"{count} {phase}" for phase, count in training if count),
        "Time": _duration(max(elapsed, default=0.0)),
        # Of the last row, not of now: the page depends on the run alone.
        "Date": datetime.fromtimestamp((folder / METRICS).stat().st_mtime, UTC).date(),
    }
    return {name: str(fact) for name, fact in facts.items() if fact not in (None, "")}


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s" if seconds else ""
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02} min"


def _before_and_after(samples: Rows) -> list[list[dict[str, Any]]]:
    """Prompts at the first and the last evaluation: those with the lowest index, whatever came of them."""
    evals: dict[int, dict[int, dict[str, Any]]] = {}
    for row in samples:
        if row.get("phase") == "eval":
            evals.setdefault(row["step"], {})[row["index"]] = row
    if not evals:
        return []
    ends = [evals[step] for step in sorted({min(evals), max(evals)})]
    shared = sorted(set(ends[0]).intersection(*ends))[:NUM_SAMPLES]
    return [[end[index] for end in ends] for index in shared]


def config_text(folder: Path) -> str:
    """The run's config.yaml, "" where there is none."""
    try:
        return (folder / CONFIG).read_text("utf-8")
    except FileNotFoundError:
        return ""
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{str(folder / CONFIG)!r} cannot be read: {first_line(error)}") from error


@contextmanager
def whole_rows(what: str | Path) -> Iterator[None]:
    """While a page is made: rows that lack something, or hold what no run writes, are told."""
    from jinja2 import UndefinedError

    try:
        yield
    except (UndefinedError, TypeError, KeyError) as error:
        raise InputError(
            f"{str(what)!r}: its {METRICS} or {SAMPLES} holds what no run has written: {first_line(error)}"
        ) from error


def typeset(text: str) -> str:
    """Numbers with a real minus sign, which is as wide as a plus."""
    return text.replace("-", "\N{MINUS SIGN}")
