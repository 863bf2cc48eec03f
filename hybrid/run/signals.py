"""Stopping a run between two steps: a signal sets a flag, a second one ends the process as usual."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

__all__ = ["StopFlag", "stop_requested"]

# The ordinary effect of each: KeyboardInterrupt, and the end.
_DEFAULTS: dict[signal.Signals, Callable[[int, FrameType | None], Any] | signal.Handlers] = {
    signal.SIGINT: signal.default_int_handler,
    signal.SIGTERM: signal.SIG_DFL,
}


class StopFlag:
    """Whether the process was asked to stop. signal: what asked, None before; its owner is `stop_requested`."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

    @property
    def set(self) -> bool:
        return self.signal is not None


@contextmanager
def stop_requested() -> Iterator[StopFlag]:
    """Inside the block SIGINT and SIGTERM set the flag; the handlers from before come back at its end.

        with stop_requested() as stop:
            for step in steps:
                step()
                if stop.set:
                    break

    A second signal acts as if this were not here: SIGINT raises KeyboardInterrupt, SIGTERM ends the process.
    In a thread that is not the main one Python takes no handlers: there the flag is never set. A signal that
    the process ignores (SIGINT in a script's background job) stays ignored.
    """
    flag = StopFlag()
    if threading.current_thread() is not threading.main_thread():
        yield flag
        return

    def handle(number: int, frame: FrameType | None) -> None:
        if flag.set:
            for each, default in _DEFAULTS.items():
                signal.signal(each, default)
            signal.raise_signal(number)
        else:
            flag.signal = signal.Signals(number)

    # None is a handler that was not set from Python: it could not be put back.
    before = {number: signal.getsignal(number) for number in _DEFAULTS}
    taken = {number: old for number, old in before.items() if old not in (None, signal.SIG_IGN)}
    try:
        for number in taken:
            signal.signal(number, handle)
        yield flag
    finally:
        for number, old in taken.items():
            signal.signal(number, old)
