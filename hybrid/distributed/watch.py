"""Whether all processes of a run are still there, and still move."""

import datetime
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self

import torch.distributed as dist

from hybrid.core import InputError, RunStopped, first_line

__all__ = ["Watch"]

FAILED = "failed"
STATUS = 1  # of a process that another one has ended


class Watch:
    """A thread of each process that tells the others, every second, that it lives and where its main thread stands.

    What ends the run is written once, for all to see: an error that left the block; a process that was not heard of
    for `timeout` seconds; a main thread that stood at one place for so long, while nobody made it wait. Of several
    that stand still the one that did so first is named: the others wait for it in some product of theirs. Where it
    is written, one process says so, and each ends with status 1: what its main thread waits for may never come.
    """

    def __init__(self, rank: int, size: int, timeout: float, *, share: Callable[[int], int]):
        """share: gives the first process's number to all."""
        self.rank, self.size, self.timeout = rank, size, timeout
        self.every = min(1.0, timeout / 10)
        host = os.environ["MASTER_ADDR"]
        self._server = dist.TCPStore(host, 0, None, True, wait_for_workers=False) if rank == 0 else None
        port = share(0 if self._server is None else self._server.port)
        # A connection of its own: one that waits for an answer holds up nobody else.
        patience = datetime.timedelta(seconds=timeout)
        self._store = dist.TCPStore(host, port, None, False, timeout=patience, wait_for_workers=False)
        self._main = threading.main_thread().ident
        self._waits = 0
        self._ends = False  # whether an error of its own is on its way out of the main thread
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if error is not None:
            # A connection that broke is another process's end, which is told by whoever it was, or found out here.
            if isinstance(error, RuntimeError) and "onnection" in str(error):
                self._over.wait(min(self.timeout, 6 * self.every))
            self._ends = True
            self._tell(self.rank, self._said(error), speaker=0)
            self._over.wait(2 * self.every)  # the others are to read it before the first one takes the store away
        self._over.set()
        self._thread.join()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Inside the block the main thread may stand still."""
        self._waits += 1
        try:
            yield
        finally:
            self._waits -= 1

    def _said(self, error: BaseException) -> str:
        if isinstance(error, (InputError, RunStopped)):
            return f"process {self.rank}: {error}"
        return f"process {self.rank} failed:\n{''.join(traceback.format_exception(error)).rstrip()}"

    def _tell(self, rank: int, text: str, *, speaker: int) -> None:
        """What ends the run, by which process, and who is to say so; unless something has ended it before."""
        self._store.compare_set(FAILED, "", json.dumps([rank, text, speaker]))

    def _run(self) -> None:
        place, since, number = None, time.monotonic(), 0
        heard: dict[int, tuple[int, float]] = {}  # the last beat of each, and when it was first seen here
        while not self._over.wait(self.every):
            now, number = time.monotonic(), number + 1
            here = self._place()
            if here != place or self._waits:
                place, since = here, now
            try:
                self._store.set(f"beat/{self.rank}", json.dumps([number, now - since]))
                if self._store.check([FAILED]):
                    rank, text, speaker = json.loads(self._store.get(FAILED))
                    # Its own error it says itself.
                    self._end(text, speaker=None if rank == speaker and self._ends else speaker)
                self._look(now, now - since, heard)
            except RuntimeError as error:  # torch's DistError: the store went with the process that held it
                if not self._over.is_set():
                    self._end(f"process 0 is gone ({first_line(error)})", speaker=1)

    def _look(self, now: float, stood: float, heard: dict[int, tuple[int, float]]) -> None:
        """Tell the end of the run where another process is silent, or this one was the first to stand still."""
        longest = stood
        for rank in range(self.size):
            if rank == self.rank or not self._store.check([f"beat/{rank}"]):
                continue
            number, other = json.loads(self._store.get(f"beat/{rank}"))
            longest = max(longest, other)
            if heard.get(rank, (-1, now))[0] != number:
                heard[rank] = number, now
            elif now - heard[rank][1] > self.timeout:
                said = f"process {rank} has not been heard of for {self.timeout:g} seconds (distributed.timeout)"
                self._tell(rank, said, speaker=int(rank == 0))
        if stood > self.timeout and stood >= longest:
            said = f"process {self.rank} has stood still for {self.timeout:g} seconds (distributed.timeout) at "
            self._tell(self.rank, said + where(self._main), speaker=0)

    def _place(self) -> Any:
        """What the main thread is at, in all its frames: the same twice where it has not moved."""
        frame, place = sys._current_frames().get(self._main or 0), []
        while frame is not None:
            place.append((id(frame.f_code), frame.f_lasti))
            frame = frame.f_back
        return place

    def _end(self, text: str, *, speaker: int | None) -> None:
        if self.rank == speaker:
            print(f"hybrid: {text}", file=sys.stderr, flush=True)
        if self._ends:
            return
        if self.rank == 0:
            time.sleep(2 * self.every)  # the others are to read it before the store goes
        os._exit(STATUS)


def where(thread: int | None) -> str:
    """The line that a thread is at: FILE:LINE in NAME."""
    frame = sys._current_frames().get(thread or 0)
    if frame is None:
        return "its end"
    return f"{frame.f_code.co_filename}:{frame.f_lineno} in {frame.f_code.co_name}"
