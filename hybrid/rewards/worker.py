"""A user's function in a process of its own, which is killed when it takes too long."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import weakref
from contextlib import suppress
from threading import Lock
from typing import Any

from hybrid.core import InputError
from hybrid.rewards import user_function
from hybrid.rewards.base import RewardError, RewardTimeout

__all__ = ["Worker"]

START_SECONDS = 120.0  # for starting Python and importing the function's module
MAX_REPLY = 2**24  # bytes: scores are short, so a longer reply is none
BOOT = "import runpy, sys; runpy.run_path(sys.argv[1], run_name='__main__')"


class Worker:
    """Calls `function` ("package.module:name" or "folder/file.py:name") in a process that it starts when needed.

    The two talk JSON, and nothing that the process sends is run or unpickled. The process and all it started in
    its process group are killed when a call takes over `timeout` seconds, with this object, at the end of this
    program, and, by its own doing, when this program dies. It is no sandbox: the function may read files,
    environment variables and the network like any program of the user.

    interpreter: another Python, of another virtual environment, to run it; None: this one, with its sys.path.
    """

    def __init__(
        self, function: str, *, batch: bool | None = None, timeout: float, interpreter: str | None = None
    ) -> None:
        if os.name != "posix":
            raise InputError(f"function {function!r}: a process of its own needs Linux or macOS")
        self.function, self.batch, self.timeout, self.interpreter = function, batch, timeout, interpreter
        self._lock = Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._channel: socket.socket

    def form(self) -> tuple[str, tuple[str, ...]]:
        """Its `Bound.form` and `Bound.columns`. Starts the process; raises InputError if it cannot."""
        with self._lock:
            return self._start()

    def takes_lists(self) -> bool:
        """Whether the function is of a batch form. Starts the process; raises InputError if it cannot."""
        return self.form()[0] != "one"

    def __call__(self, *sample: Any) -> Any:
        """The function's result for response, target, prompt, item, or for lists of them.

        Raises RewardTimeout when it took too long, RewardError when it raised or its process ended.
        """
        try:
            request = json.dumps(sample)
        except (TypeError, ValueError, RecursionError) as error:
            raise RewardError(
                f"a function in its own process gets each item as JSON, which this is not: {error}"
            ) from None
        with self._lock:
            if self._process is None:
                self._start()
            reply = self._reply(request, self.timeout)
        if "error" in reply:
            raise RewardError(_said(reply))
        return reply.get("value")

    def close(self) -> None:
        """Kill the process and all it started. The next call starts another."""
        if self._process is not None:
            self._process = None
            self._kill()

    def _start(self) -> tuple[str, tuple[str, ...]]:
        self.close()
        python = self.interpreter or sys.executable
        ours, theirs = socket.socketpair()
        try:
            process = subprocess.Popen(
                [python, "-c", BOOT, user_function.__file__],
                stdin=theirs.fileno(),
                stdout=2,  # what the function prints is ours to show, and no part of the talk
                start_new_session=True,  # a process group of its own, to be killed whole
            )
        except OSError as error:
            ours.close()
            raise InputError(f"interpreter {python!r} cannot be run: {error.strerror}") from error
        finally:
            theirs.close()
        self._process, self._channel = process, ours
        self._kill = weakref.finalize(self, _kill, process, ours, os.getpid())
        # "": the working directory, where a user's function usually is.
        path = None if self.interpreter else [*map(str, sys.path), ""]
        request = json.dumps({"function": self.function, "batch": self.batch, "path": path})
        try:
            reply = self._reply(request, START_SECONDS)
        except RewardError as error:
            raise InputError(f"function {self.function!r} cannot be loaded: {error}") from error
        if "error" in reply:
            self.close()
            if reply["error"] == user_function.BadFunction.__name__:
                raise InputError(str(reply.get("message")))
            raise InputError(f"function {self.function!r} cannot be loaded: {reply['error']}: {reply.get('message')}")
        value = reply.get("value")
        if isinstance(value, list):
            return "trl", tuple(map(str, value))
        return "many" if value is True else "one", ()

    def _reply(self, request: str, timeout: float) -> dict[str, Any]:
        """What the process answers. Without an answer it is closed: a late one must not be taken for the next."""
        try:
            return _answer(self._channel, request.encode() + b"\n", time.monotonic() + timeout)
        except TimeoutError:
            self.close()
            raise RewardTimeout(f"it took longer than timeout ({timeout:g} s) and was killed") from None
        except OSError:  # its end of the channel is closed
            how = _ending(self._process)
            self.close()
            raise RewardError(f"its process ended {how}") from None
        except BaseException:
            self.close()
            raise


def _answer(channel: socket.socket, request: bytes, deadline: float) -> dict[str, Any]:
    """Raises TimeoutError at the deadline, another OSError where the channel is closed, RewardError for nonsense."""

    def set_time_left() -> None:
        if (left := deadline - time.monotonic()) <= 0:
            raise TimeoutError
        channel.settimeout(left)

    set_time_left()
    channel.sendall(request)
    answer = bytearray()
    while not answer.endswith(b"\n"):
        set_time_left()
        if not (part := channel.recv(2**16)):
            raise ConnectionResetError
        answer += part
        if len(answer) > MAX_REPLY:
            raise RewardError(f"its process sent over {MAX_REPLY} bytes, which are no scores")
    try:
        reply = json.loads(answer)
    except (ValueError, RecursionError):
        reply = None
    if not isinstance(reply, dict):
        raise RewardError(f"its process sent what is no reply: {bytes(answer[:80])!r}")
    return reply


def _said(reply: dict[str, Any]) -> str:
    return f"{reply['error']}: {reply.get('message')}{reply.get('where')}"


def _ending(process: "subprocess.Popen[bytes] | None") -> str:
    """How the process ended, for a message. It stays unreaped, so that its number cannot become another's."""
    assert process is not None
    for _ in range(100):
        ended = os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG)
        if ended is not None:
            code = ended.si_status
            return f"with exit code {code}" if ended.si_code == os.CLD_EXITED else f"by {signal.Signals(code).name}"
        time.sleep(0.01)
    return "without an answer"


def _kill(process: "subprocess.Popen[bytes]", channel: socket.socket, owner: int) -> None:
    channel.close()
    if os.getpid() != owner:  # a fork of us, such as a data loader's worker, has a copy of this object
        return
    with suppress(ProcessLookupError, PermissionError):  # macOS: no permission to kill what has ended
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
