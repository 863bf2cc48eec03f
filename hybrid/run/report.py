"""A run's folder as one page to read: before and after, curves, samples, configuration."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from hybrid.core import InputError, first_line
from hybrid.run.checkpoint import disk_errors, write_file
from hybrid.run.curves import TRAINING, Rows, curves, finite
from hybrid.run.track import CONFIG, METRICS, REPORT, SAMPLES, read_jsonl

if TYPE_CHECKING:
    from rich.table import Table

__all__ = [
    "BETTER",
    "MEASURES",
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
    rows: the measures that were taken.
    """

    steps: tuple[int, ...]
    num_prompts: int | None
    rows: tuple[SummaryRow, ...]


def summary(folder: str | Path, *, until: int | None = None) -> Summary:
    """A run's first and last evaluation (`until` a step), side by side. Refuses (InputError) what is no run folder."""
    return _summary(rows_of(Path(folder), until=until))


def summary_table(summary: Summary) -> "Table":
    """The summary for the console: `rich.print(summary_table(summary(folder)))`."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    prompts = f", {summary.num_prompts} prompts" if summary.num_prompts else ""
    title = f"Held-out evaluation{prompts}" if summary.steps else "No evaluation was recorded"
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
        html = page.from_string(source).render(
            name=folder.resolve().name,
            facts=facts_of(folder, rows, config),
            summary=_summary(rows),
            phases=[phase for phase in rows if rows[phase]],
            curves=curves(rows),
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


def _difference(format: str, scale: float = 1.0) -> Callable[[float, float], str]:
    return lambda before, after: format.format(scale * (after - before))


def _percent(before: float, after: float) -> str:
    return f"{after / before - 1:+z.1%}" if before else ""


def _ratio(before: float, after: float) -> str:
    return f"\N{MULTIPLICATION SIGN}{after / before:.2f}" if before else ""


# Name of the number, what it is called, its unit, how it is written, how its change is.
MEASURES: tuple[tuple[str, str, str, str, Callable[[float, float], str]], ...] = (
    ("reward", "Mean reward", "± standard error", "{:z.3f}", _difference("{:+z.3f}")),
    ("positive", "Reward above zero", "share of responses", "{:.0%}", _difference("{:+z.0f} points", 100)),
    ("sft_loss", "Validation SFT loss", "nats per token", "{:z.3f}", _percent),
    ("kl", "KL to the reference", "nats per response", "{:z.2f}", _difference("{:+z.2f}")),
    ("distinct_2", "Distinct-2", "share of bigrams that differ", "{:.3f}", _ratio),
    ("response_length", "Response length", "tokens", "{:.1f}", _difference("{:+z.1f}")),
    ("eos_share", "Ended with EOS", "share of responses", "{:.0%}", _difference("{:+z.0f} points", 100)),
    ("bleu", "BLEU", "of the corpus, 0 to 100", "{:.1f}", _difference("{:+z.1f}")),
    ("chrf", "chrF", "of the corpus, 0 to 100", "{:.1f}", _difference("{:+z.1f}")),
    ("rouge_l", "ROUGE-L", "mean F1, 0 to 1", "{:.3f}", _difference("{:+z.3f}")),
    ("token_f1", "Word F1", "mean, 0 to 1", "{:.3f}", _difference("{:+z.3f}")),
    ("exact_match", "Exact match", "share of responses", "{:.0%}", _difference("{:+z.0f} points", 100)),
)
# Which end of a measure is the better, where one is: neither a long response nor a far one is good or bad in itself.
BETTER: Mapping[str, Literal["min", "max"]] = {
    "sft_loss": "min",
    "perplexity": "min",
    **dict.fromkeys(("reward", "positive", "bleu", "chrf", "rouge_l", "token_f1", "exact_match"), "max"),
}


def _summary(rows: Mapping[str, Rows]) -> Summary:
    evals = rows["eval"][:1] + rows["eval"][1:][-1:]
    measured = []
    for key, name, unit, format, change in MEASURES:
        known = [value for row in evals if (value := finite(row, key)) is not None]
        if known:
            values = tuple(shown(row, key, format) for row in evals)
            measured.append(SummaryRow(name, unit, values, change(*known) if len(known) == 2 else ""))
    num_prompts = finite(evals[-1], "num_prompts") if evals else None
    return Summary(
        steps=tuple(row["step"] for row in evals),
        num_prompts=None if num_prompts is None else int(num_prompts),
        rows=tuple(measured),
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
    training = [("SFT", len(rows["sft"])), ("PPO", len(rows["ppo"])), ("joint", len(rows["joint"]))]
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
    except (UndefinedError, TypeError) as error:
        raise InputError(
            f"{str(what)!r}: its {METRICS} or {SAMPLES} holds what no run has written: {first_line(error)}"
        ) from error


def typeset(text: str) -> str:
    """Numbers with a real minus sign, which is as wide as a plus."""
    return text.replace("-", "\N{MINUS SIGN}")
