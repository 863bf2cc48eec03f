"""A signal as a request to stop. Each test sends it to its own process."""

import os
import signal
import subprocess
import sys
import threading

import pytest

from hybrid.run.signals import stop_requested


@pytest.fixture(autouse=True)
def usual_handlers():
    """What a process starts with; that of pytest may ignore SIGINT where a script put it in the background."""
    before = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in before.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def send(number):
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_sets_the_flag_and_names_itself(number):
    with stop_requested() as stop:
        assert not stop.set
        send(number)
        assert stop.set
        assert stop.signal is number


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_second_interrupt_is_a_keyboard_interrupt(first):
    with pytest.raises(KeyboardInterrupt), stop_requested():
        send(first)
        send(signal.SIGINT)


@pytest.mark.parametrize("first", ["SIGINT", "SIGTERM"])
def test_second_sigterm_ends_the_process(first):
    # The module alone, since torch takes seconds to import.
    code = (
        "import os, runpy, signal, sys; stop_requested = runpy.run_path(sys.argv[1])['stop_requested']\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        f"with stop_requested() as stop:\n os.kill(os.getpid(), signal.{first}); print(stop.set, flush=True)\n"
        " os.kill(os.getpid(), signal.SIGTERM); print('still here')"
    )
    path = sys.modules["hybrid.run.signals"].__file__
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (-signal.SIGTERM, "True\n"), done.stderr


def test_handlers_from_before_come_back():
    def own(number, frame):
        pass

    signal.signal(signal.SIGTERM, own)
    with stop_requested():
        send(signal.SIGTERM)
        assert signal.getsignal(signal.SIGTERM) is not own
    assert signal.getsignal(signal.SIGTERM) is own
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_handlers_come_back_after_an_error_and_after_a_second_signal():
    for error in (ZeroDivisionError, KeyboardInterrupt):
        before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
        with pytest.raises(error), stop_requested():
            if error is ZeroDivisionError:
                raise error
            send(signal.SIGINT)
            send(signal.SIGINT)
        assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_flag_is_new_each_time():
    with stop_requested():
        send(signal.SIGTERM)
    with stop_requested() as stop:
        assert not stop.set


def test_inner_block_takes_the_signal_and_gives_back_the_outer_one():
    with stop_requested() as outer:
        with stop_requested() as inner:
            send(signal.SIGTERM)
        assert inner.set
        assert not outer.set
        send(signal.SIGTERM)
        assert outer.set


def test_signal_that_was_ignored_stays_ignored():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with stop_requested() as stop:
        send(signal.SIGINT)
        assert not stop.set
        send(signal.SIGTERM)
        assert stop.set


def test_another_thread_gets_a_flag_that_is_never_set():
    before = signal.getsignal(signal.SIGTERM)
    seen = []

    def body():
        with stop_requested() as stop:
            seen.append((stop.set, signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert seen == [(False, before)]
