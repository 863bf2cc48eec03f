"""What a run leaves behind while it goes: two JSONL files, and a line on the console."""

import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Self

from hybrid.core import InputError
from hybrid.run.checkpoint import PART, disk_errors

if TYPE_CHECKING:
    from rich.progress import Progress

    from hybrid.run.trackers import Status, Trackers

__all__ = [
    "CHECKPOINTS",
    "CONFIG",
    "EXPORT",
    "FINISHED",
    "METRICS",
    "REPORT",
    "SAMPLES",
    "RunLog",
    "check_unlocked",
    "finished_step",
    "open_run_folder",
    "read_jsonl",
]

CONFIG = "config.yaml"
EXPORT = "export"
CHECKPOINTS = "checkpoints"
METRICS = "metrics.jsonl"
SAMPLES = "samples.jsonl"
REPORT = "report.html"
FINISHED = "finished.json"  # there while the run has nothing left to do
# What the console shows of an evaluation; of a step the same names come first.
SHOWN = ("reward", "kl", "sft_loss", "bleu", "chrf", "rouge_l", "token_f1", "exact_match")
SHOWN_OF_OBJECTIVES = ("loss", "accuracy", "ece")  # as OBJECTIVE/NAME


def open_run_folder(path: str | Path, *, beside: Sequence[str] = ()) -> Path:
    """The folder for a new run, created where it is missing.

    beside: names of what else will be written there.

    Refuses (InputError) one that already holds a run or anything that a run would overwrite, and one that cannot be
    written: that is found by writing, since permission bits say nothing to root.
    """
    # Not Path's own, which raises for a user that there is not.
    folder = Path(os.path.expanduser(path))
    if "\0" in str(path):
        raise InputError(f"the output folder {str(path)!r} cannot be: a path has no NUL in it")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".", suffix=PART):
            pass
    except OSError as error:
        raise InputError(
            f"cannot write to the output folder {str(folder)!r}: {error.strerror}; name another one"
        ) from error
    for name in (METRICS, CONFIG):
        if _is_filled(folder / name):
            raise InputError(
                f"the output folder {str(folder)!r} already holds a run ({name}); "
                f"name another one with run.output=FOLDER, or go on with it: hybrid train --resume {folder}"
            )
    for name in (SAMPLES, REPORT, FINISHED, EXPORT, CHECKPOINTS, *beside):
        if _is_filled(folder / name):
            raise InputError(
                f"the output folder {str(folder)!r} holds {name!r}, which a run would overwrite; name another one with "
                "run.output=FOLDER"
            )
    return folder


def _is_filled(path: Path) -> bool:
    """Whether there is something that could be lost. An empty file is of a run that was killed before it began."""
    if path.is_dir():
        return any(path.iterdir())
    return path.exists() and path.stat().st_size > 0


def finished_step(folder: Path) -> int | None:
    """The last step of the run in `folder`, where it has taken all of them; None while some are left."""
    try:
        return int(json.loads((folder / FINISHED).read_bytes())["step"])
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, TypeError, LookupError) as error:
        raise InputError(
            f"{str(folder / FINISHED)!r} is broken ({error}); delete it where the run is to go on"
        ) from error


def check_unlocked(folder: Path) -> None:
    """Raise InputError while a process writes to the run in `folder`."""
    with _locked(folder):
        pass


def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """The objects in a JSONL file. A last line that a crash cut off is left out.

    Refuses (InputError) any other line that is not a JSON object, by number.
    """
    # Split at b"\n" alone: str.splitlines would also cut at U+2028 inside a text.
    *lines, rest = Path(path).read_bytes().split(b"\n")
    rows = []
    for number, line in enumerate([*lines, rest], start=1):
        cut_off = number > len(lines)
        try:
            row = json.loads(line.decode("utf-8"))
        except ValueError as error:
            if cut_off:
                break
            raise InputError(f"{path}, line {number} is not JSON: {error}") from error
        if not isinstance(row, dict):
            if cut_off:
                break
            raise InputError(f"{path}, line {number} must hold a JSON object, got {type(row).__name__}")
        rows.append(row)
    return rows


class RunLog:
    """Appends a run's rows to its folder, and shows them on the console. The trainer owns it.

        with RunLog(folder, total_steps=400) as log:
            log.step({"step": 1, "phase": "sft", "loss": 3.2})
            log.samples([{"step": 1, "phase": "ppo", "index": 0, "prompt": "…", …}])

    Every row is with the operating system before the call returns: a process that is killed loses none.
    A folder that holds rows is continued, without the half line that a crash may have left. Refused (InputError)
    are two logs of one folder at a time, and a disk that takes no more.

    folder: None writes no files.   total_steps: None where the end is not known.
    new: whether the run is; a folder that has got one meanwhile is refused.
    kept: the bytes of each file that stay, from `sizes`: a resumed run writes the rest anew. None: all.
    live: False keeps the console silent, as on all processes but the first.
    trackers: get the numbers of every step and the samples of evaluations; they are closed with the log.
    """

    def __init__(
        self,
        folder: str | Path | None,
        *,
        total_steps: int | None,
        live: bool = True,
        new: bool = False,
        kept: Mapping[str, int] | None = None,
        trackers: "Trackers | None" = None,
    ):
        self.folder = None if folder is None else Path(folder)
        self.total_steps = total_steps
        self.live, self.new, self.kept = live, new, kept
        self.trackers = trackers
        self._files: dict[str, BinaryIO] = {}
        self._console: _Console | None = None
        self._closing = ExitStack()

    def __enter__(self) -> Self:
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._closing.enter_context(_locked(self.folder))
            if self.new:
                # Another one may have begun while this one loaded its model.
                open_run_folder(self.folder)
            for name in (METRICS, SAMPLES):
                size = None if self.kept is None else self.kept.get(name, 0)
                self._files[name] = self._closing.enter_context(_appended(self.folder / name, size))
        if self.live:
            self._console = self._closing.enter_context(_Console(self.total_steps))
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        self._closing.close()
        if self.trackers is not None:
            failed: Status = "stopped" if kind is KeyboardInterrupt else "failed"
            self.trackers.close("finished" if kind is None else failed)

    def step(self, record: Mapping[str, Any], losses: Mapping[str, str] | None = None) -> None:
        """One training or evaluation row: {"step", "phase", ...numbers}.

        losses: the losses that the console shows, by the names that it gives them, as keys of the record.
        """
        row = _plain(record)
        self._write(METRICS, [row])
        if self.trackers is not None:
            numbers = {name: value for name, value in row.items() if name not in ("step", "phase", "cycle")}
            self.trackers.log(numbers, row["step"], row["phase"])
        if self._console is not None:
            self._console.show(row, losses or {})

    def samples(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Responses: {"step", "phase", "index", "prompt", "response", "target", "reward", "components"}."""
        plain = [_plain(row) for row in rows]
        self._write(SAMPLES, plain)
        if self.trackers is not None and plain and plain[0]["phase"] == "eval":
            self.trackers.samples(plain, plain[0]["step"])

    def sizes(self) -> dict[str, int]:
        """The bytes of each file by now, all of them on the disk: where a resumed run goes on."""
        for file in self._files.values():
            with disk_errors(f"write to {str(file.name)!r}"):
                os.fsync(file.fileno())
        return {name: file.tell() for name, file in self._files.items()}

    def say(self, line: str) -> None:
        """A line for whoever watches; not part of the record."""
        if self.live:
            print(line, file=sys.stderr)

    def _write(self, name: str, rows: list[dict[str, Any]]) -> None:
        if self.folder is not None:
            file = self._files[name]
            with disk_errors(f"write to {str(self.folder / name)!r}"):
                file.writelines(map(_line, rows))
                file.flush()


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """The folder is this process's until the block ends, however the process ends. Where there is no flock: nothing."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(f"another run is writing to the folder {str(folder)!r}") from error
        yield
    finally:
        os.close(handle)


def _line(row: Mapping[str, Any]) -> bytes:
    # A lone surrogate is no UTF-8, but its backslash form is the right JSON escape.
    text = json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"
    return text.encode("utf-8", errors="backslashreplace")


@contextmanager
def _appended(path: Path, size: int | None) -> Iterator[BinaryIO]:
    """The file, open at the end of the last whole line of its first `size` bytes (None: of all)."""
    with disk_errors(f"write to {str(path)!r}"):
        if path.exists():
            os.truncate(path, path.read_bytes()[:size].rfind(b"\n") + 1)
        file = path.open("ab")
    try:
        yield file
    finally:
        # What a full disk has not taken was told when it was written; closing tries once more.
        with suppress(OSError):
            file.close()


def _plain(value: Any) -> Any:
    """The value as JSON knows it: scalars of torch and numpy as numbers, what is not finite as null."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, str | int):
        return value
    number = value.item() if hasattr(value, "item") else value
    if isinstance(number, int):
        return number
    return float(number) if math.isfinite(number) else None


class _Console:
    """A progress line on a terminal; elsewhere some twenty plain lines, and one for each evaluation."""

    def __init__(self, total_steps: int | None):
        self.total_steps = total_steps
        self.every = max(1, total_steps // 20) if total_steps else 10
        self.last: dict[str, float | None] = {}
        self.first_step: int | None = None
        self.progress: Progress | None = None

    def __enter__(self) -> Self:
        self.start = time.monotonic()
        if sys.stdout.isatty():
            from rich.progress import BarColumn, Progress, TextColumn

            text = TextColumn("{task.description}", markup=False)
            self.progress = Progress(BarColumn(bar_width=20), text)
            self.progress.add_task("starting", total=self.total_steps)
            self.progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self.progress is not None:
            self.progress.stop()

    def show(self, row: Mapping[str, Any], losses: Mapping[str, str]) -> None:
        step, phase = row["step"], row["phase"]
        if phase == "eval":
            names = [name for name in row if name in SHOWN or _is_shown_of_objective(name)]
            # While a progress line is up, rich prints this above it.
            print(self._line(step, phase, {name: row[name] for name in names} | _of_decoder(row)), flush=True)
            return
        if self.first_step is None:
            self.first_step = step
        keys = {"reward": "reward", "kl": "kl", **losses, "accuracy": "accuracy"}
        self.last |= {name: row[key] for name, key in keys.items() if key in row} | _of_decoder(row)
        line = self._line(step, phase, self.last)
        if self.progress is not None:
            self.progress.update(self.progress.task_ids[0], completed=step, description=line)
        elif step % self.every == 0 or step == self.total_steps:
            print(line, flush=True)

    def _line(self, step: int, phase: str, numbers: Mapping[str, float | None]) -> str:
        parts = [f"{phase:<4} step {step}"]
        if self.total_steps:
            parts[0] += f"/{self.total_steps}"
            if phase != "eval":
                parts.append(f"eta {_clock(self._seconds_left(step, self.total_steps))}")
        for name in dict.fromkeys((*SHOWN, *numbers)):
            if name in numbers:
                number = numbers[name]
                parts.append(f"{name} {'nan' if number is None else format(number, '.4g')}")
        return "  ".join(parts)

    def _seconds_left(self, step: int, total_steps: int) -> float:
        done = step - (self.first_step or step) + 1
        return (time.monotonic() - self.start) / done * max(0, total_steps - step)


def _of_decoder(row: Mapping[str, Any]) -> dict[str, float]:
    """What the decoder says of itself, by its own names: "acceptance_rate" of "decoder/acceptance_rate"."""
    return {name.removeprefix("decoder/"): x for name, x in row.items() if name.startswith("decoder/")}


def _is_shown_of_objective(name: str) -> bool:
    objective, slash, measure = name.partition("/")
    return bool(objective and slash) and measure in SHOWN_OF_OBJECTIVES


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
