"""Writing files and folders so that a failure leaves what was there before, and says so."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from hybrid.core import InputError, first_line

__all__ = ["clear_parts", "disk_errors", "filled_folder", "write_file"]

PART = ".part"  # what is not complete yet: hidden, and with this at its end


@contextmanager
def disk_errors(what: str, then: str = "") -> Iterator[None]:
    """Raises what a full, read-only or broken disk raises inside the block as an InputError: cannot WHAT: reason."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else first_line(error)
        raise InputError(f"cannot {what}: {reason}{then}") from error


def write_file(path: Path, data: bytes) -> Path:
    """Write a file that is there as a whole, or as it was. Returns its path. Raises OSError where the disk does."""
    part = path.with_name(f".{path.name}-{os.getpid()}{PART}")
    try:
        part.write_bytes(data)
        _sync(part)
        return part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def clear_parts(folder: Path) -> None:
    """Remove what killed processes have left unfinished in a folder where no other process writes now."""
    for path in folder.glob(f".*{PART}"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


@contextmanager
def filled_folder(folder: str | Path, *, stale: tuple[str, ...] = ()) -> Iterator[Path]:
    """A temporary folder whose files move into `folder` when the block ends well, and vanish when not.

    A folder that is new appears at once. In one that exists each file is replaced at once, in turn, and the
    others stay, except those that match a glob in `stale` and were not written anew (a model's older shards).
    Everything is on the disk before anything moves. Raises InputError where `folder` cannot be written.
    """
    folder = Path(folder)
    if "\0" in str(folder):
        raise InputError(f"cannot save to {str(folder)!r}: a path has no NUL in it")
    if folder.is_file():
        raise InputError(f"cannot save to {str(folder)!r}: it is a file")
    with disk_errors(f"save to {str(folder)!r}"):
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", suffix=PART, dir=folder.parent))
    try:
        yield temporary
        # mkdtemp makes a private folder; a saved model is as readable as any file of the user's.
        temporary.chmod(0o777 & ~_umask())
        written = [path for path in sorted(temporary.rglob("*")) if path.is_file()]
        for path in [*written, temporary]:
            _sync(path)
        if not folder.exists():
            temporary.rename(folder)
        else:
            names = {path.relative_to(temporary) for path in written}
            for name in sorted(names):
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                os.replace(temporary / name, folder / name)
            for path in [path for pattern in stale for path in folder.glob(pattern)]:
                if path.relative_to(folder) not in names:
                    path.unlink()
            _sync(folder)
        _sync(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
