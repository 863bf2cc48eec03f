import gc
import json
import os
import socket
import subprocess
import sys
import time

import pytest

from hybrid.core import InputError
from hybrid.rewards import user_function
from hybrid.rewards.base import RewardError, RewardTimeout
from hybrid.rewards.worker import Worker

FUNCTIONS = """
import ctypes, os, socket, subprocess, sys, time

def length(response):
    return len(response)

def lengths(responses):
    return [len(r) for r in responses]

def does(response):
    if response == "loops":
        while True:
            pass
    if response == "sleeps":
        time.sleep(1e9)
    if response == "exits":
        os._exit(3)
    if response == "crashes":
        ctypes.string_at(0)
    if response == "quits":
        sys.exit(4)
    if response == "prints":
        print("printed")
        os.write(1, b"written\\n")
    if response == "raises":
        raise KeyError("no such key")
    if response == "reads":
        return len(sys.stdin.read())
    if response == "starts another":
        return subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1e9)"]).pid
    if response == "returns":
        return "0.5"
    return os.getpid()

def forges(response):
    os.write(int(response), b"[1]\\n")
    time.sleep(1e9)

def floods(response):
    while True:
        os.write(int(response), b"1" * 2**20)

def hangs_up(response):
    socket.socket(fileno=3).shutdown(socket.SHUT_RDWR)
    time.sleep(1e9)
"""


@pytest.fixture
def worker(tmp_path, monkeypatch):
    """worker(name): a Worker for one of FUNCTIONS."""
    (tmp_path / "functions_of_the_user.py").write_text(FUNCTIONS)
    monkeypatch.chdir(tmp_path)
    workers = []

    def make(name, timeout=30, **settings):
        workers.append(Worker(f"functions_of_the_user:{name}", timeout=timeout, **settings))
        return workers[-1]

    yield make
    for one in workers:
        one.close()


def call(worker, response):
    return worker(response, "", "", None)


def is_alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    # One that nobody has waited for yet is dead all the same.
    with open(f"/proc/{pid}/stat") as stat:
        return stat.read().rpartition(")")[2].split()[0] != "Z"


def wait_until_gone(pid):
    while is_alive(pid):
        time.sleep(0.01)


def test_it_calls_either_form(worker):
    assert call(worker("length"), "four") == 4
    assert worker("lengths")(["a", "bb"], ["", ""], ["", ""], [None, None]) == [1, 2]
    assert not worker("length").takes_lists()
    assert worker("lengths").takes_lists()


@pytest.mark.parametrize("response", ["loops", "sleeps"])
def test_a_call_over_its_time_is_killed_and_the_next_one_is_answered(worker, response):
    does = worker("does", timeout=0.5)
    first = int(call(does, ""))
    with pytest.raises(RewardTimeout, match=r"took longer than timeout \(0.5 s\) and was killed"):
        call(does, response)
    assert not is_alive(first)
    second = int(call(does, ""))
    assert second not in (first, os.getpid())


@pytest.mark.parametrize(
    ("response", "how"), [("exits", "with exit code 3"), ("quits", "with exit code 4"), ("crashes", "by SIG")]
)
def test_a_process_that_ends_is_an_error_that_says_how_and_the_next_call_is_answered(worker, response, how):
    does = worker("does")
    first = int(call(does, ""))
    with pytest.raises(RewardError, match=f"its process ended {how}") as caught:
        call(does, response)
    assert not isinstance(caught.value, RewardTimeout)
    assert not is_alive(first)
    assert call(does, "") > 0


def test_what_the_function_prints_goes_to_stderr_and_is_no_answer(worker, capfd):
    assert call(worker("does"), "prints") > 0
    printed = capfd.readouterr()
    assert printed.out == ""
    assert "written" in printed.err


def test_an_exception_comes_back_with_its_type_its_message_and_its_line(worker):
    does = worker("does")
    with pytest.raises(RewardError, match=r"KeyError: 'no such key' \(.*functions_of_the_user.py, line \d+\)"):
        call(does, "raises")
    assert call(does, "") == call(does, "")  # the same process


def test_standard_input_is_empty(worker):
    assert call(worker("does"), "reads") == 0


def test_what_is_no_number_comes_back_as_a_text_that_shows_it(worker):
    assert call(worker("does"), "returns") == "'0.5'"


def test_what_the_function_started_is_killed_with_it(worker):
    does = worker("does")
    pid = int(call(does, "starts another"))
    assert is_alive(pid)
    does.close()
    wait_until_gone(pid)


def test_two_workers_are_two_processes(worker):
    one, other = worker("does"), worker("does")
    assert call(one, "") != call(other, "")
    assert call(one, "") == call(one, "")


def test_a_worker_that_nobody_holds_leaves_no_process(tmp_path, monkeypatch):
    (tmp_path / "functions_of_the_user.py").write_text(FUNCTIONS)
    monkeypatch.chdir(tmp_path)
    dropped = Worker("functions_of_the_user:does", timeout=30)
    pid = int(call(dropped, ""))
    assert is_alive(pid)
    del dropped
    gc.collect()
    assert not is_alive(pid)


def test_a_child_whose_parent_has_gone_ends_even_inside_an_endless_loop(worker, tmp_path):
    worker("does")  # writes the file
    ours, theirs = socket.socketpair()
    child = subprocess.Popen(
        [sys.executable, user_function.__file__], stdin=theirs.fileno(), stdout=2, start_new_session=True
    )
    theirs.close()
    first = {"function": "functions_of_the_user:does", "batch": None, "path": ["", *sys.path]}
    ours.sendall(json.dumps(first).encode() + b"\n")
    assert json.loads(ours.recv(1000)) == {"value": False}
    ours.sendall(json.dumps(["loops", "", "", None]).encode() + b"\n")
    assert child.poll() is None
    ours.close()
    assert child.wait(timeout=30) == -9


def test_a_fork_of_this_process_does_not_kill_the_worker(worker):
    does = worker("does")
    pid = int(call(does, ""))
    if (child := os.fork()) == 0:
        does.close()
        os._exit(0)
    os.waitpid(child, 0)
    assert call(does, "") == pid


def test_a_forged_answer_is_never_more_than_data(worker):
    # 3 is the first free descriptor: the channel of the child.
    with pytest.raises(RewardError, match=r"what is no reply: b'\[1\]"):
        call(worker("forges"), "3")
    with pytest.raises(RewardError, match="bytes, which are no scores"):
        call(worker("floods"), "3")


def test_a_child_that_hangs_up_but_lives_is_killed(worker):
    hangs_up = worker("hangs_up")
    hangs_up.takes_lists()
    pid = hangs_up._process.pid
    with pytest.raises(RewardError, match="its process ended by SIGKILL"):
        call(hangs_up, "")
    assert not is_alive(pid)


def test_an_item_that_is_no_json_is_refused_before_it_is_sent(worker):
    does = worker("does")
    with pytest.raises(RewardError, match=r"gets each item as JSON, which this is not: .*type object"):
        does("", "", "", object())
    assert call(does, "") > 0


def test_texts_arrive_as_they_are(worker):
    for text in ("", "日本語", "\0", "\ud800", "\u2028\n", "🦊" * 100_000):
        assert call(worker("length"), text) == len(text)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("json", r"^function must look like 'package.module:name', got 'json'$"),
        ("no_such_module:f", "^function 'no_such_module:f' cannot be loaded: ModuleNotFoundError: No module named"),
        ("json:lods", "^function 'json:lods' cannot be loaded: AttributeError: module 'json' has no attribute 'lods'"),
        ("math:pi", "^function must be a function or another callable object, got 3.14"),
        ("operator:add", r"^function add\(a, b, /\) needs b, which a reward is not given; the forms are f\("),
        (
            "exits_when_imported:f",
            "^function 'exits_when_imported:f' cannot be loaded: its process ended with exit code 5",
        ),
    ],
)
def test_a_function_that_cannot_be_loaded_is_bad_input(tmp_path, monkeypatch, function, message):
    (tmp_path / "exits_when_imported.py").write_text("import os\nos._exit(5)\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=message):
        Worker(function, timeout=30).takes_lists()


def test_an_interpreter_that_is_none_is_bad_input(tmp_path):
    with pytest.raises(InputError, match=r"^interpreter '.*/no-python' cannot be run: No such file"):
        Worker("math:sqrt", timeout=30, interpreter=str(tmp_path / "no-python")).takes_lists()


def test_another_interpreter_has_its_own_path_and_not_ours(tmp_path, monkeypatch):
    (tmp_path / "only_ours.py").write_text("def f(response):\n    return 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert not Worker("only_ours:f", timeout=30).takes_lists()
    with pytest.raises(InputError, match="No module named 'only_ours'"):
        Worker("only_ours:f", timeout=30, interpreter=sys.executable).takes_lists()
    assert Worker(f"{tmp_path / 'only_ours.py'}:f", timeout=30, interpreter=sys.executable)("", "", "", None) == 1
