"""A user's function: which of a sample's parts it wants, and the process of its own that `worker` runs it in.

As a script this file is that process, perhaps under another Python: it imports the standard library only, and
is written for Python 3.8 and later.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import json
import os
import queue
import signal
import socket
import sys
import threading
from collections.abc import Callable
from typing import Any

__all__ = ["BadFunction", "bound"]

FORMS = "f(response, target, *, prompt, item) -> float or f(responses, targets, prompts, items) -> list"
ONE = ("response", "target", "prompt", "item")
MANY = ("responses", "targets", "prompts", "items")


class BadFunction(ValueError):
    """No reward can be made of it; the message starts with "function"."""


def bound(function: Any, batch: bool | None) -> tuple[bool, tuple[str, ...], Callable[..., Any]]:
    """Whether `function` takes lists; what it reads of a sample; a call of it with response, target, prompt, item, or
    lists of them.

    Raises BadFunction if its signature does not say what it wants.
    """
    if isinstance(function, type) or not callable(function):
        raise BadFunction(f"function must be a function or another callable object, got {function!r}")
    if inspect.iscoroutinefunction(function):
        raise BadFunction(f"function must return its score, and an async one returns a coroutine: {function!r}")
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError) as error:
        raise BadFunction(f"function {function!r} has no signature to read; wrap it in {FORMS}") from error
    named = [p for p in signature.parameters.values() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    takes_rest = any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())

    position = {name: i for names in (ONE, MANY) for i, name in enumerate(names)}
    wanted = {p.name: position[p.name] for p in named if p.name in position}
    forms = {name in MANY for name in wanted}
    if named and not wanted:
        wanted, forms = {named[0].name: 0}, {False}
    unknown = [p.name for p in named if p.name not in wanted and p.default is p.empty]
    takes_lists = batch if batch is not None else forms == {True}

    refusal = None
    if unknown:
        refusal = f"needs {', '.join(unknown)}, which a reward is not given"
    elif not wanted and not takes_rest:
        refusal = "takes no response"
    elif batch is None and len(forms) != 1:
        refusal = "may be of either form: name its parameters, or set batch"
    if refusal:
        name = getattr(function, "__name__", repr(function))
        raise BadFunction(f"function {name}{signature} {refusal}; the forms are {FORMS}")

    if takes_rest:
        names = MANY if takes_lists else ONE
        wanted.update({name: i for i, name in enumerate(names) if i not in wanted.values()})
    positional = [p.name for p in named if p.kind is p.POSITIONAL_ONLY and p.name in wanted]

    def call(*sample: Any) -> Any:
        arguments = {name: sample[i] for name, i in wanted.items()}
        return function(*[arguments.pop(name) for name in positional], **arguments)

    return takes_lists, tuple(ONE[i] for i in sorted(wanted.values())), call


def loaded(path: str) -> Any:
    """The object that "package.module:name" names, or "folder/file.py:name"."""
    module_name, _, name = path.rpartition(":")
    if not (module_name and name):
        raise BadFunction(f"function must look like 'package.module:name', got {path!r}")
    if module_name.endswith(".py"):
        spec = importlib.util.spec_from_file_location(os.path.basename(module_name)[:-3], module_name)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    else:
        module = importlib.import_module(module_name)
    return getattr(module, name)


def plain(result: Any, takes_lists: bool) -> Any:
    """What a function returned as JSON can hold it: a number, a list of them; a text shows what is neither."""
    if not takes_lists:
        return _number(result)
    try:
        if isinstance(result, (str, bytes, dict, set)) or len(result) < 0:
            return _shown(result)
        return [_number(value) for value in result]
    except TypeError:  # a scalar
        return _shown(result)


def _number(value: Any) -> float | str:
    try:
        return _shown(value) if isinstance(value, (str, bytes)) else float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):  # torch raises RuntimeError
        return _shown(value)


def _shown(value: Any) -> str:
    return repr(value)[:200]


def serve(channel: socket.socket) -> None:
    """Answer the parent's requests, a line of JSON each, until it goes; the first one says what to load."""
    requests: queue.SimpleQueue[Any] = queue.SimpleQueue()
    threading.Thread(target=_receive, args=(channel, requests), daemon=True).start()
    first = requests.get()
    if first["path"] is not None:
        sys.path[:] = first["path"]
    takes_lists, call = False, None
    try:
        takes_lists, _, call = bound(loaded(first["function"]), first["batch"])
        reply: dict[str, Any] = {"value": takes_lists}
    except Exception as error:  # noqa: BLE001 - the parent raises it
        reply = _failed(error)
    _send(channel, reply)
    while call:
        sample = requests.get()
        try:
            reply = {"value": plain(call(*sample), takes_lists)}
        except Exception as error:  # noqa: BLE001 - the parent raises it
            reply = _failed(error)
        _send(channel, reply)


def _receive(channel: socket.socket, requests: queue.SimpleQueue[Any]) -> None:
    # A thread, so that the parent's end is noticed while the function runs, be it for ever.
    with channel.makefile("rb") as lines:
        for line in lines:
            requests.put(json.loads(line))
    os.killpg(os.getpgrp(), signal.SIGKILL)  # we lead this group: see Worker._start


def _send(channel: socket.socket, reply: dict[str, Any]) -> None:
    channel.sendall(json.dumps(reply).encode() + b"\n")


def _failed(error: Exception) -> dict[str, Any]:
    """What the parent is told, with the line that raised."""
    place = error.__traceback__
    while place is not None and place.tb_next is not None:
        place = place.tb_next
    where = f" ({place.tb_frame.f_code.co_filename}, line {place.tb_lineno})" if place else ""
    return {"error": type(error).__name__, "message": str(error)[:1000], "where": where}


def main() -> None:
    # The channel comes as standard input, which the function must not read; standard output is the parent's stderr.
    channel = socket.socket(fileno=os.dup(0))
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    serve(channel)


if __name__ == "__main__":
    main()
