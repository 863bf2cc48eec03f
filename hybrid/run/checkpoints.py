"""A run's checkpoints: whole or not there, told from broken ones by their manifest, the old ones rotated out."""

import hashlib
import json
import math
import re
import shutil
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from hybrid.core import InputError, first_line
from hybrid.run.checkpoint import disk_errors, filled_folder

__all__ = ["MANIFEST", "CheckpointConfig", "Checkpoints"]

FORMAT = 1
MANIFEST = "manifest.json"
PACKAGES = ("torch", "transformers", "hybrid-trainer")

# What file managers leave in folders that they show, beside hidden files.
LITTER = {"Thumbs.db", "desktop.ini", "Icon\r", "__MACOSX"}

# A hidden file that belongs to a checkpoint: torch's table of what is in which shard.
SHARDED = ".metadata"

# step-40 is a checkpoint; .step-40-WORD is on its way in or out, and no other name is ours.
_NAME = re.compile(r"step-(0|[1-9]\d*)")
_HIDDEN = re.compile(r"\.step-(0|[1-9]\d*)-(.+)")
_BEFORE = "before"  # what stood in the place of a checkpoint that is being saved again
_DELETED = "deleted"


@dataclass(frozen=True)
class CheckpointConfig:
    """When a run saves all that it needs to go on, and what it keeps of that. A stopped run saves always."""

    every: int = 100  # steps of the loop, and where an evaluation makes progress; 0: only when it is stopped
    keep_last: int | None = 2  # None: all
    keep_best: int = 1  # by `eval.metric`, of those that were evaluated at their step
    export_every: int = 0  # steps between exports of the model, each in the place of the one before; 0: at the end

    def __post_init__(self) -> None:
        for name in ("every", "export_every"):
            if getattr(self, name) < 0:
                raise InputError(f"CheckpointConfig.{name} must be >= 0, got {getattr(self, name)}")
        for name in ("keep_last", "keep_best"):
            number = getattr(self, name)
            if number is not None and number < 1:
                raise InputError(f"CheckpointConfig.{name} must be at least 1, got {number}")


class NewerFormat(InputError):
    """A checkpoint that is whole, and of a version that this one cannot read: never skipped, never replaced."""


class Checkpoints:
    """The folders step-N of one run. One process writes them; any may read.

        checkpoints = Checkpoints(run / "checkpoints", keep_last=2, best=("reward", "max"))
        checkpoints.save(40, lambda folder: save_state(folder / "state", state), {"reward": 0.3})
        checkpoints.newest()

    folder: created by the first save.
    keep_last: how many of the highest steps stay; None keeps all.
    best: a metric and whether less or more of it is better; the `keep_best` best stay too.
    On the disk are at most keep_last + keep_best checkpoints, and one more while one is being saved.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        keep_last: int | None = 2,
        best: tuple[str, Literal["min", "max"]] | None = None,
        keep_best: int = 1,
    ):
        if keep_last is not None and keep_last < 1:
            raise InputError(f"keep_last must be at least 1, or None for all, got {keep_last}")
        if keep_best < 1:
            raise InputError(f"keep_best must be at least 1, got {keep_best}; best=None keeps none for its metric")
        if best is not None and best[1] not in ("min", "max"):
            raise InputError(f"best must name a metric and 'min' or 'max', got {best!r}")
        self.folder = Path(folder)
        self.keep_last = keep_last
        self.best_metric = best
        self.keep_best = keep_best

    def save(self, step: int, write: Callable[[Path], object], metrics: Mapping[str, float] | None = None) -> Path:
        """Save a checkpoint and delete those that are no longer to be kept. Returns its folder.

        write: fills the folder it is given. When it raises, nothing has changed.
        metrics: numbers of this step, for `best`; what is not finite is never the best.
        A checkpoint of the same step is replaced. Raises InputError where the disk is full or refuses.
        """
        if step < 0:
            raise ValueError(f"step must be at least 0, got {step}")
        folder = self.folder / f"step-{step:d}"
        saving = disk_errors(f"save the checkpoint {str(folder)!r}", "; those before it are as they were")
        try:
            self.clear()
            with saving, filled_folder(folder) as temporary:
                write(temporary)
                _write_manifest(temporary, step, metrics or {})
                if folder.exists():
                    # filled_folder would mix the old files with the new ones.
                    folder.rename(self._hidden(step, _BEFORE))
        finally:
            # An old one whose place stayed empty goes back, one that was replaced goes.
            self.clear()
        self._rotate(step)
        return folder

    def newest(self) -> Path | None:
        """The folder of the whole checkpoint with the highest step; warns of each broken one on the way."""
        folders = self._folders()
        return self._first_whole(folders[step] for step in sorted(folders, reverse=True))

    def best(self) -> Path | None:
        """The folder of the best whole checkpoint by the metric; None where none has it."""
        folders = self._folders()
        return self._first_whole(folders[step] for step in self._ranked(self._outlines(folders)))

    @staticmethod
    def verify(folder: str | Path) -> dict[str, Any]:
        """The manifest of a checkpoint whose files are all there, with the sizes and hashes they had.

        Refuses (InputError), by name, a file that is missing, cut off, changed or not of the checkpoint.
        """
        folder = Path(folder)
        manifest = _outline(folder)
        for name, facts in manifest["files"].items():
            if _sha256(folder / name) != facts["sha256"]:
                raise InputError(f"{str(folder / name)!r} is broken: its bytes have changed since it was saved")
        return manifest

    def _first_whole(self, folders: Iterable[Path]) -> Path | None:
        for folder in folders:
            try:
                _check_step(folder, self.verify(folder))
            except NewerFormat:
                raise
            except InputError as error:
                warnings.warn(f"skipped a broken checkpoint: {error}", stacklevel=3)
            else:
                return folder
        return None

    def _folders(self) -> dict[int, Path]:
        """By step. One that was moved aside for a new one counts while the new one is not there."""
        folders: dict[int, Path] = {}
        for path in sorted(self.folder.iterdir()) if self.folder.is_dir() else ():
            if found := _HIDDEN.fullmatch(path.name):
                if found[2] == _BEFORE:
                    folders.setdefault(int(found[1]), path)
            elif (found := _NAME.fullmatch(path.name)) and path.is_dir():
                folders[int(found[1])] = path
        return folders

    def _outlines(self, folders: Mapping[int, Path]) -> dict[int, dict[str, Any]]:
        """Manifests by step of the checkpoints that look whole: names and sizes fit, no hash is taken."""
        outlines = {}
        for step, folder in folders.items():
            with suppress(InputError):
                manifest = _outline(folder)
                _check_step(folder, manifest)
                outlines[step] = manifest
        return outlines

    def _ranked(self, outlines: Mapping[int, dict[str, Any]]) -> list[int]:
        """Steps that have the metric, the best first; of equals the first."""
        if self.best_metric is None:
            return []
        name, mode = self.best_metric
        sign = 1 if mode == "min" else -1
        numbers = {step: manifest["metrics"].get(name) for step, manifest in outlines.items()}
        return sorted((step for step in numbers if numbers[step] is not None), key=lambda s: (sign * numbers[s], s))

    def _rotate(self, saved: int) -> None:
        """Delete what is to go. A broken checkpoint stays, and takes no place of a whole one."""
        if self.keep_last is None:
            return
        outlines = self._outlines(self._folders())
        kept = {saved, *sorted(outlines)[-self.keep_last :], *self._ranked(outlines)[: self.keep_best]}
        for step in sorted(outlines.keys() - kept):
            hidden = self._hidden(step, _DELETED)
            try:
                # A new name first: killed in the middle, this leaves no half of a step-N.
                (self.folder / f"step-{step}").rename(hidden)
                shutil.rmtree(hidden)
            except OSError as error:
                warnings.warn(f"cannot delete the old checkpoint of step {step}: {error}", stacklevel=3)

    def clear(self) -> None:
        """Remove what a save that was killed has left, and put back what it had moved aside. `save` does so first."""
        for path in sorted(self.folder.iterdir()) if self.folder.is_dir() else ():
            if found := _HIDDEN.fullmatch(path.name):
                place = self.folder / f"step-{found[1]}"
                if found[2] == _BEFORE and not place.exists():
                    # Where this fails it stays a candidate under the name it has.
                    with suppress(OSError):
                        path.rename(place)
                else:
                    shutil.rmtree(path, ignore_errors=True)

    def _hidden(self, step: int, word: str) -> Path:
        return self.folder / f".step-{step}-{word}"


def _write_manifest(folder: Path, step: int, metrics: Mapping[str, float]) -> None:
    files = {name: {"size": path.stat().st_size, "sha256": _sha256(path)} for name, path in _files(folder).items()}
    numbers = {name: float(number) for name, number in metrics.items()}
    manifest = {
        "format": FORMAT,
        "step": step,
        "metrics": {name: number if math.isfinite(number) else None for name, number in numbers.items()},
        "versions": {package: _version(package) for package in PACKAGES},
        "files": files,
    }
    text = json.dumps({**manifest, "sha256": _digest(manifest)}, indent=1)
    (folder / MANIFEST).write_text(text + "\n", "utf-8")


def _outline(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint whose files have the names and sizes that it tells."""
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_bytes())
        digest = manifest.pop("sha256")
        if digest != _digest(manifest):
            raise ValueError("it was changed after it was written")
        form, expected = manifest["format"], manifest["files"]
    except OSError as error:
        raise InputError(f"{str(folder)!r} is no whole checkpoint: {MANIFEST}: {error.strerror}") from error
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise InputError(f"{str(path)!r} is broken: {first_line(error)}") from error
    if form != FORMAT:
        raise NewerFormat(f"{str(path)!r} has format {form!r}, known: {FORMAT}; update hybrid-trainer")
    files = _files(folder)
    for name in sorted(expected.keys() | files.keys()):
        if name not in files:
            raise InputError(f"{str(folder / name)!r} is missing")
        if name not in expected:
            raise InputError(f"{str(folder / name)!r} is not of this checkpoint: its {MANIFEST} does not name it")
        size = files[name].stat().st_size
        if size != expected[name]["size"]:
            raise InputError(f"{str(folder / name)!r} is broken: {size} bytes, {expected[name]['size']} were saved")
    return manifest


def _check_step(folder: Path, manifest: Mapping[str, Any]) -> None:
    found = _NAME.fullmatch(folder.name) or _HIDDEN.fullmatch(folder.name)
    if found and manifest["step"] != int(found[1]):
        raise InputError(f"{str(folder)!r} holds the checkpoint of step {manifest['step']}")


def _files(folder: Path) -> dict[str, Path]:
    """The files of a checkpoint by name, without its manifest and what file managers leave lying about."""
    files = {}
    for path in sorted(folder.rglob("*")):
        if (path.name.startswith(".") and path.name != SHARDED) or path.name in LITTER:
            continue
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise InputError(f"{str(path)!r} is not a plain file: a checkpoint holds no other")
        if path.is_file() and path != folder / MANIFEST:
            files[path.relative_to(folder).as_posix()] = path
    return files


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"cannot read {str(path)!r}: {error.strerror}") from error


def _digest(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
