"""A file of responses through a reward: what `hybrid reward SPEC FILE` does."""

import csv
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

from hybrid.core import InputError, unknown_name
from hybrid.rewards import Reward, RewardOutput
from hybrid.run import disk_errors, filled_folder

__all__ = [
    "COLUMNS",
    "check_columns",
    "component_table",
    "output_file",
    "sample_table",
    "score_rows",
    "scored_rows",
    "write_rows",
]

# What a spreadsheet runs, full-width signs too: https://owasp.org/www-community/attacks/CSV_Injection
FORMULA = re.compile("'*[=+\\-@\t\r\n\uff1d\uff0b\uff0d\uff20]")
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)
# What a reward reads, and the column that it is in unless the user names another.
COLUMNS = {"response": "response", "target": "target", "prompt": "prompt"}


def score_rows(reward: Reward, rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str] = COLUMNS) -> RewardOutput:
    """The reward's word on each row, all of them as one batch; the row itself is the item.

    columns: the column of response, target and prompt. Only the response must be there.
    """
    known = sorted({name for row in rows for name in row})
    for role, column in columns.items():
        if column not in known and (role == "response" or column != COLUMNS[role]):
            raise unknown_name("column", column, known, hint=f"Name it with --{role}.")
    response, target, prompt = ([row.get(columns[role]) for row in rows] for role in COLUMNS)
    reward.check_data(target, rows, what="rows", hint="name its column with --target")
    if reward.needs_target and (missing := [number for number, text in enumerate(target, start=1) if text is None]):
        raise InputError(
            f"reward {reward.component_name!r} compares with a target, and row {missing[0]} has no "
            f"{columns['target']!r} ({len(missing)} of {len(rows)} rows have none): leave such rows out, or give them "
            "a text, which may be empty"
        )
    try:
        return reward.score(response, target, prompt, list(rows))
    except ValueError as error:
        raise InputError(str(error)) from error


def scored_rows(rows: Sequence[Mapping[str, Any]], output: RewardOutput) -> list[dict[str, Any]]:
    """Each row with its `reward` and the raw score of each component, as "reward/name"; None where there is none.

    Raises InputError where a row has such a column.
    """
    check_columns(rows)
    components = {f"reward/{name}": column for name, column in output.components.items()}
    return [
        {**row, "reward": score if valid else None, **{name: column[i] for name, column in components.items()}}
        for i, (row, score, valid) in enumerate(zip(rows, output, output.valid.tolist(), strict=True))
    ]


def sample_table(
    rows: Sequence[Mapping[str, Any]], output: RewardOutput, response: str, *, num_rows: int
) -> tuple[list[str], list[list[str]]]:
    """Header and lines: the first rows' response, score and the raw scores of what the reward is made of."""
    outermost = {name: column for name, column in output.components.items() if "/" not in name}
    components = outermost if list(outermost.values()) != [output.raw] else {}
    lines = [
        [str(i), _shown(row.get(response)), _number(score), *(_number(column[i]) for column in components.values())]
        for i, (row, score) in enumerate(zip(rows[:num_rows], output, strict=False))
    ]
    return ["row", "response", "reward", *components], lines


def component_table(output: RewardOutput) -> tuple[list[str], list[list[str]]]:
    """Header and lines: each part's mean ± standard deviation over the file, failures and seconds."""
    lines = []
    for name, part in output.parts.items():
        metrics = part.metrics()
        spreads = [
            _spread(metrics.get(f"{kind}_mean"), metrics.get(f"{kind}_std")) for kind in ("raw", "score", "weighted")
        ]
        failed = f"{metrics['invalid']:g}" + (f" ({metrics['timeouts']:g} late)" if metrics["timeouts"] else "")
        *outer, own_name = name.split("/")
        lines.append(["  " * len(outer) + own_name, *spreads, failed, f"{part.seconds:.2f}"])
    if valid := [score for score in output if not math.isnan(score)]:
        lines.append(["= reward", "", _spread(fmean(valid), pstdev(valid)), "", f"{len(output) - len(valid)}", ""])
    return ["part", "raw", "postprocessed", "weighted", "failed", "s"], lines


def output_file(file: str | Path) -> Path:
    """The path, if its name says a format that can be written and nothing is there yet. Raises InputError."""
    if Path(file).suffix not in (".jsonl", ".csv"):
        raise InputError(f"output must be a .jsonl or .csv file, got {str(file)!r}")
    if os.path.lexists(file):
        raise InputError(
            f"output {str(file)!r} is there already, and nothing is overwritten: give another name, or move it"
        )
    return Path(file)


def check_columns(rows: Sequence[Mapping[str, Any]]) -> None:
    """Raises InputError where `scored_rows` would overwrite a column of the user's."""
    for name in dict.fromkeys(str(name) for row in rows for name in row):
        if name == "reward" or name.startswith("reward/"):
            raise InputError(f"column {name!r} is there already, and the scores are written by that name: rename it")


def write_rows(file: str | Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows as .jsonl or .csv; the file is there whole or not at all.

    In a .csv a text that a spreadsheet would run gets an apostrophe in front, and so does such a text with apostrophes
    there already: to read it back, take one off.
    """
    file = output_file(file)
    # A lone surrogate is no UTF-8, but its backslash form is the right JSON escape.
    options: dict[str, Any] = {"encoding": "utf-8", "errors": "backslashreplace", "newline": ""}
    saving = disk_errors(f"write {str(file)!r}")
    with saving, filled_folder(file.parent) as folder, (folder / file.name).open("w", **options) as stream:
        if file.suffix == ".jsonl":
            stream.writelines(json.dumps(_json(row), ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
        else:
            columns = list(dict.fromkeys(name for row in rows for name in row))
            writer = csv.writer(stream)
            writer.writerow(map(_inert, columns))
            writer.writerows([_inert(row.get(name)) for name in columns] for row in rows)


def _json(value: Any) -> Any:
    """The value as JSON has it; what JSON has not (a date, bytes, nan, inf) is its text."""
    if isinstance(value, Mapping):
        return {str(key): _json(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json(inner) for inner in value]
    is_plain = value is None or isinstance(value, (str, int)) or (isinstance(value, float) and math.isfinite(value))
    return value if is_plain else str(value)


def _inert(cell: Any) -> Any:
    """The cell, with an apostrophe in front of a text that a spreadsheet would run."""
    if not isinstance(cell, str) or not FORMULA.match(cell) or NUMBER.fullmatch(cell):
        return cell
    return "'" + cell


def _shown(text: Any, width: int = 36) -> str:
    text = " ".join(str(text or "").split())
    # A response may hold what a terminal obeys.
    text = "".join(c if c.isprintable() else "\ufffd" for c in text)
    return text if len(text) <= width else text[: width - 1] + "…"


def _spread(mean: float | None, std: float | None) -> str:
    return "n/a" if mean is None or std is None else f"{mean:.3g} ± {std:.2g}"


def _number(value: float | None) -> str:
    return "n/a" if value is None or math.isnan(value) else f"{value:.3g}"
