"""A run's numbers and samples for the tracking tools that people use; the JSONL files stay the record."""

import json
import math
import os
import queue
import re
import threading
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

from hybrid.core import InputError, first_line, unknown_name

__all__ = ["Status", "Trackers", "check_trackers", "make_trackers"]

Status = Literal["finished", "failed", "stopped"]

PROJECT = "hybrid-trainer"  # where the library's own environment variable names no other
MAX_WAITING = 10_000  # calls that a tracker may be behind: some MB of numbers
CLOSE_SECONDS = 60.0  # for all trackers together, to send what is still waiting


class Table(NamedTuple):
    columns: list[str]
    rows: list[list[Any]]


class Tracker(Protocol):
    """One library's few calls. Made, used and closed in one thread."""

    def log(self, metrics: dict[str, float], step: int) -> None: ...
    def samples(self, name: str, table: Table, step: int) -> None: ...
    def close(self, status: Status) -> None: ...


class Trackers:
    """A run's trackers, which the trainer owns: `make_trackers` makes them, `close` ends them.

    Each works in a thread of its own, so that a slow network costs the run nothing. One that raises, hangs or
    falls behind is dropped with one warning, which comes with the next call here; it never stops the run.
    """

    def __init__(self, workers: Iterable["_Worker"] = ()):
        self._workers = list(workers)

    def log(self, metrics: Mapping[str, Any], step: int, phase: str) -> None:
        """Log numbers as `phase/name`, nested ones as `phase/name/part`. What is no finite number is left out."""
        if numbers := _numbers(metrics, phase):
            self._give("log", numbers, step)

    def samples(self, rows: Iterable[Mapping[str, Any]], step: int) -> None:
        """Log responses, rows as in samples.jsonl, as the table `phase/samples` (`samples` where none has a phase)."""
        rows = list(rows)
        if rows:
            phase = rows[0].get("phase")
            self._give("samples", f"{phase}/samples" if phase else "samples", _table(rows), step)

    def close(self, status: Status = "finished") -> None:
        """Send what is waiting, for at most `CLOSE_SECONDS`, and end the trackers' runs. A second call does nothing."""
        self._give("close", status)
        deadline = time.monotonic() + CLOSE_SECONDS
        for worker in self._workers:
            worker.thread.join(max(0.0, deadline - time.monotonic()))
            if worker.thread.is_alive():
                worker.error = TimeoutError(f"it was not done {CLOSE_SECONDS:g} seconds after the run")
        self._drop_failed()
        self._workers = []

    def _give(self, call: str, *arguments: Any) -> None:
        for worker in self._workers:
            try:
                worker.calls.put_nowait((call, arguments))
            except queue.Full:
                worker.error = worker.error or TimeoutError(f"it is {MAX_WAITING} calls behind")
        self._drop_failed()

    def _drop_failed(self) -> None:
        failed = [worker for worker in self._workers if worker.error is not None]
        self._workers = [worker for worker in self._workers if worker.error is None]
        for worker in failed:
            worker.dropped = True
            error = worker.error
            if isinstance(error, KeyboardInterrupt):
                raise error
            text = f"{type(error).__name__}: {first_line(error)}"  # type: ignore[arg-type]
            warnings.warn(f"tracker {worker.name!r} is left out from here on: {text}", stacklevel=4)


def make_trackers(
    names: Sequence[str], *, folder: str | Path | None, run_name: str, config: Mapping[str, Any]
) -> Trackers:
    """Trackers by name: tensorboard, wandb, mlflow, trackio.

    folder: the run's, where they keep their files; a folder with an earlier part of the run goes on with it.
    config: the run's settings, nested.
    Where they send to is for their own environment variables to say (WANDB_MODE, WANDB_PROJECT, MLFLOW_TRACKING_URI,
    MLFLOW_EXPERIMENT_NAME, TRACKIO_DIR, TRACKIO_SPACE_ID). wandb without a key stays offline, and never asks for one.
    Refuses (InputError) what `check_trackers` does.
    """
    check_trackers(names, folder)
    # Plain values, and a copy: the threads read it while the run goes on.
    plain = json.loads(json.dumps(config, default=str))
    return Trackers(
        _Worker(name, Path(folder).resolve(), run_name, plain) for name in dict.fromkeys(names) if folder is not None
    )


def check_trackers(names: Sequence[str], folder: str | Path | None) -> None:
    """Refuse (InputError) an unknown name, a library that is not installed, and trackers without a folder."""
    for name in names:
        if name not in _TRACKERS:
            raise unknown_name("tracker", name, _TRACKERS)
    if names and folder is None:
        raise InputError(f"tracker {names[0]!r} needs the run's folder; name one with run.output=FOLDER")
    for name in names:
        try:
            import_module(_TRACKERS[name][0])
        except ImportError as error:
            raise InputError(
                f"tracker {name!r} cannot be used: {first_line(error)}; pip install 'hybrid-trainer[track]'"
            ) from error
        except Exception:  # noqa: BLE001 - a broken installation shows again in the thread, which tells of it
            continue


class _Worker:
    """One tracker in its thread: does the calls that are waiting, until the close or the first error."""

    def __init__(self, name: str, *run: Any):
        self.name = name
        self.calls: queue.Queue[tuple[str, tuple[Any, ...]]] = queue.Queue(MAX_WAITING)
        self.error: BaseException | None = None
        self.dropped = False
        # A daemon: one that hangs does not keep the process alive.
        self.thread = threading.Thread(target=self._work, args=run, name=f"tracker-{name}", daemon=True)
        self.thread.start()

    def _work(self, *run: Any) -> None:
        call = ""
        try:
            tracker = _TRACKERS[self.name][1](*run)
            while call != "close" and not self.dropped:
                call, arguments = self.calls.get()
                getattr(tracker, call)(*arguments)
        except BaseException as error:  # noqa: BLE001 - the run's own thread warns of it, or raises an interrupt
            self.error = error


class _TensorBoard:
    def __init__(self, folder: Path, run_name: str, config: dict[str, Any]):
        # 10 s: what a killed process may lose.
        self.writer = import_module("torch.utils.tensorboard").SummaryWriter(folder / "tensorboard", flush_secs=10)
        self.writer.add_text("config", _verbatim(json.dumps(config, indent=2, ensure_ascii=False)))

    def log(self, metrics: dict[str, float], step: int) -> None:
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, step)

    def samples(self, name: str, table: Table, step: int) -> None:
        """As text: TensorBoard has no table, and reads Markdown in which a model's answer must stay plain."""
        fields = (zip(table.columns, row, strict=True) for row in table.rows)
        text = "\n\n---\n\n".join(
            "\n\n".join(f"{key}\n\n{_verbatim(str(value))}" for key, value in row) for row in fields
        )
        self.writer.add_text(name, text, step)

    def close(self, status: Status) -> None:
        self.writer.add_text("status", status)
        self.writer.close()


class _Wandb:
    def __init__(self, folder: Path, run_name: str, config: dict[str, Any]):
        self.wandb = wandb = import_module("wandb")
        key, known = folder / "wandb" / "run-id.txt", ""
        if key.exists():
            known = key.read_text("utf-8")
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=run_name,
            dir=folder,
            config=config,
            id=known or None,
            resume="allow" if known else None,
            # Where it would ask for a key in the middle of a run, it stays offline: `wandb sync` sends it later.
            mode=None if os.environ.get("WANDB_MODE") or wandb.login(prompt=False) else "offline",
            # The console is RunLog's.
            settings=wandb.Settings(console="off"),
        )
        _keep(key, self.run.id)

    def log(self, metrics: dict[str, float], step: int) -> None:
        self.run.log(metrics, step=step)

    def samples(self, name: str, table: Table, step: int) -> None:
        columns, rows = table
        self.run.log({name: self.wandb.Table(columns=columns, data=rows, allow_mixed_types=True)}, step=step)

    def close(self, status: Status) -> None:
        # 255 is what wandb itself gives a run that was interrupted.
        self.run.finish(exit_code={"finished": 0, "failed": 1, "stopped": 255}[status])


class _MLflow:
    def __init__(self, folder: Path, run_name: str, config: dict[str, Any]):
        self.mlflow = import_module("mlflow")
        local = folder / "mlflow"
        uri = os.environ.get("MLFLOW_TRACKING_URI")
        if not uri:
            local.mkdir(exist_ok=True)
            uri = f"sqlite:///{local / 'mlflow.db'}"
        artifacts = None if os.environ.get("MLFLOW_TRACKING_URI") else (local / "artifacts").as_uri()
        self.client = self.mlflow.MlflowClient(tracking_uri=uri)
        key = local / "run-id.txt"
        if key.exists():
            self.run_id = key.read_text("utf-8")
            self.client.update_run(self.run_id, status="RUNNING")
            return
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        experiment = self.client.get_experiment_by_name(name)
        number = experiment.experiment_id if experiment else self.client.create_experiment(name, artifacts)
        self.run_id = self.client.create_run(number, run_name=run_name).info.run_id
        # 100 a call and 6000 characters: limits of MLflow's store.
        params = [self.mlflow.entities.Param(_mlflow_name(k), str(v)[:6000]) for k, v in _leaves(config)]
        for start in range(0, len(params), 100):
            self.client.log_batch(self.run_id, params=params[start : start + 100])
        _keep(key, self.run_id)

    def log(self, metrics: dict[str, float], step: int) -> None:
        now, metric = time.time_ns() // 1_000_000, self.mlflow.entities.Metric
        self.client.log_batch(self.run_id, [metric(_mlflow_name(k), v, now, step) for k, v in metrics.items()])

    def samples(self, name: str, table: Table, step: int) -> None:
        columns = dict(zip(table.columns, map(list, zip(*table.rows, strict=True)), strict=True))
        self.client.log_table(self.run_id, columns, f"{_mlflow_name(name)}/step-{step:06}.json")

    def close(self, status: Status) -> None:
        done = {"finished": "FINISHED", "failed": "FAILED", "stopped": "KILLED"}[status]
        self.client.set_terminated(self.run_id, done)


class _Trackio:
    """Keeps its files in its own place (TRACKIO_DIR), where `trackio show` finds every run."""

    def __init__(self, folder: Path, run_name: str, config: dict[str, Any]):
        self.trackio = import_module("trackio")
        key = folder / "trackio" / "run-id.txt"
        resume = "allow" if key.exists() else "never"
        name = key.read_text("utf-8") if key.exists() else run_name
        self.run = self.trackio.init(project=PROJECT, name=name, config=config, resume=resume)
        _keep(key, self.run.name)

    def log(self, metrics: dict[str, float], step: int) -> None:
        self.run.log(metrics, step=step)

    def samples(self, name: str, table: Table, step: int) -> None:
        frame = import_module("pandas").DataFrame(table.rows, columns=table.columns)
        self.run.log({name: self.trackio.Table(dataframe=frame)}, step=step)

    def close(self, status: Status) -> None:
        self.run.finish()


# What must be importable, and what is then made, in the tracker's thread.
_TRACKERS: dict[str, tuple[str, type[Tracker]]] = {
    "tensorboard": ("torch.utils.tensorboard", _TensorBoard),
    "wandb": ("wandb", _Wandb),
    "mlflow": ("mlflow", _MLflow),
    "trackio": ("trackio", _Trackio),
}


def _numbers(metrics: Mapping[str, Any], prefix: str) -> dict[str, float]:
    """The finite numbers of nested metrics, by their path."""
    numbers: dict[str, float] = {}
    for key, value in metrics.items():
        name = f"{prefix}/{key}"
        if isinstance(value, Mapping):
            numbers |= _numbers(value, name)
        elif (number := _number(value)) is not None:
            numbers[name] = number
    return numbers


def _number(value: Any) -> float | None:
    """A scalar (torch's and numpy's too) as a float; None for anything else, and for what is not finite."""
    try:
        value = value.item() if hasattr(value, "item") else value
        return float(value) if isinstance(value, int | float) and math.isfinite(value) else None
    except (ValueError, RuntimeError, OverflowError):  # an array of several numbers; an int beyond floats
        return None


def _table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Rows of samples.jsonl as a table: a column for each of a row's parts that any row has."""
    texts = [name for name in ("prompt", "target", "response") if any(row.get(name) is not None for row in rows)]
    parts = list(dict.fromkeys(name for row in rows for name in row.get("components") or {}))
    return Table(
        ["index", *texts, "reward", *(f"components/{name}" for name in parts)],
        [
            [
                row.get("index", number),
                *(_text(row.get(name)) for name in texts),
                _number(row.get("reward")),
                *(_number((row.get("components") or {}).get(name)) for name in parts),
            ]
            for number, row in enumerate(rows)
        ],
    )


def _text(value: Any) -> str | None:
    """The text as UTF-8 can carry it: a lone surrogate, which a model may write, becomes a question mark."""
    return None if value is None else str(value).encode("utf-8", "replace").decode("utf-8")


def _verbatim(text: str) -> str:
    """A Markdown block that shows the text as it is."""
    return "\n".join(f"    {line}" for line in text.splitlines() or [""])


def _leaves(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _mlflow_name(name: str) -> str:
    """MLflow refuses other characters, and with them the whole call."""
    return re.sub(r"[^\w\-. /]", "_", name)[:250]


def _keep(path: Path, key: str) -> None:
    """Remember what the library calls this run: a resumed one goes on with it."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(key, "utf-8")
