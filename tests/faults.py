"""What tests of faults need: processes that can be killed at any moment, and disks that fill up."""

import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import pytest

WRITING = os.O_WRONLY | os.O_RDWR
TESTS = Path(__file__).resolve().parent
# What a run imports late.
LATER = ("bitsandbytes", "jinja2", "matplotlib.figure", "rich.progress", "transformers.models.llama.modeling_llama")
# What changes files and can be seen from Python. os.fsync is no audit event and is wrapped.
OPERATIONS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod", "os.truncate"}


class Forks:
    """The command line in forks of a server that has imported everything, so that each begins at once.

        with Forks(folder) as forks:
            status, said = forks.run("train", file, kill_after=0.3)

    folder: where the output of each process is kept; only operations on files in it are counted.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    def __enter__(self) -> Self:
        self.server = subprocess.Popen(
            [sys.executable, __file__, self.folder],
            cwd=TESTS.parent,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(map(str, (TESTS.parent, TESTS)))},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._ask({"ready": True})
        return self

    def __exit__(self, *error: object) -> None:
        self.server.communicate()

    def start(self, *argv: object, kill_before: int | None = None, file_limit: int | None = None) -> int:
        """Begin `hybrid ARGV...` in a fork; one at a time. Returns its process id.

        kill_before: the number of the file operation, from 0, before which it kills itself.
        file_limit: the most bytes that a file of it may have.
        """
        return self._ask({"argv": list(map(str, argv)), "kill_before": kill_before, "file_limit": file_limit})

    def wait(self) -> tuple[int, str]:
        """The exit status of the fork (-9 where it was killed) and all that it said."""
        return self._ask({}), (self.folder / "said.txt").read_text(encoding="utf-8", errors="replace")

    def run(self, *argv: object, kill_after: float | None = None, **options: int | None) -> tuple[int, str]:
        """Both. kill_after: the seconds after which it is killed, unless it has ended."""
        process = self.start(*argv, **options)
        if kill_after is not None:
            time.sleep(kill_after)
            # The server collects it only when asked: until then the number is of no other process.
            os.kill(process, signal.SIGKILL)
        return self.wait()

    def _ask(self, request: dict[str, object]) -> int:
        assert self.server.stdin is not None
        assert self.server.stdout is not None
        self.server.stdin.write(json.dumps(request) + "\n")
        self.server.stdin.flush()
        return int(self.server.stdout.readline())


@contextmanager
def small_disk(path: Path, size: str) -> Iterator[Path]:
    """A file system of its own, as root; elsewhere the test is skipped."""
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("no file system can be mounted here")
    try:
        yield path
    finally:
        subprocess.run(["umount", str(path)], check=True)


def remount(path: Path, options: str) -> bool:
    """Change a file system's options; False where they cannot be changed now, as for a file that is being written."""
    command = ["mount", "-o", f"remount,{options}", str(path)]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def serve(folder: Path) -> None:
    """Answer each request on stdin with a number."""
    from hybrid.cli import main

    for name in LATER:
        importlib.import_module(name)

    process = 0
    for line in sys.stdin:
        request = json.loads(line)
        if "ready" in request:
            print(0, flush=True)
        elif not request:
            print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), flush=True)
        elif process := os.fork():
            print(process, flush=True)
        else:
            said = os.open(folder / "said.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(said, 1)
            os.dup2(said, 2)
            if request["kill_before"] is not None:
                _kill_before(request["kill_before"], folder)
            if request["file_limit"] is not None:
                import resource

                resource.setrlimit(resource.RLIMIT_FSIZE, (request["file_limit"], resource.RLIM_INFINITY))
            sys.exit(main(request["argv"]))


def _kill_before(number: int, folder: Path) -> None:
    left = number

    def count() -> None:
        nonlocal left
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def audit(event: str, args: tuple[Any, ...]) -> None:
        if event in OPERATIONS and str(args[0]).startswith(str(folder)) and (event != "open" or args[2] & WRITING):
            count()

    sync = os.fsync

    def fsync(handle: int) -> None:
        count()
        sync(handle)

    os.fsync = fsync
    sys.addaudithook(audit)


if __name__ == "__main__":
    serve(Path(sys.argv[1]))
