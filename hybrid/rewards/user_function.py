"""A user's function: which of a sample's parts it wants, and the process of its own that `worker` runs it in.

As a script this file is that process, perhaps under another Python: it imports the standard library only, and
is written for Python 3.8 and later.
"""

from __future__ import annotations

import asyncio
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
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

__all__ = ["BadFunction", "Bound", "bound"]

FORMS = (
    "f(response, target, *, prompt, item) -> float, f(responses, targets, prompts, items) -> list "
    "or TRL's f(prompts, completions, **columns) -> list"
)
ONE = ("response", "target", "prompt", "item")
MANY = ("responses", "targets", "prompts", "items")
TRL = ("prompts", "completions")
# What TRL's trainer gives beside the columns.
TRL_ALONE = ("completion_ids", "completions_ids", "trainer_state", "log_extra", "log_metric", "environments")


class BadFunction(ValueError):
    """No reward can be made of it; the message starts with "function"."""


class Bound(NamedTuple):
    """A function as a reward calls it."""

    form: str  # "one" sample, "many" in lists, or "trl": many, with the columns of the data
    reads: tuple[str, ...]  # of a sample
    named: tuple[str, ...]  # its parameters
    columns: tuple[str, ...]  # of TRL's form: those that it cannot do without
    call: Callable[..., Any]  # with response, target, prompt, item, or lists of them
    is_async: bool


def bound(function: Any, batch: bool | None) -> Bound:
    """How `function` wants to be called, by its parameters' names.

    batch: whether it takes lists, where they do not say.
    Raises BadFunction if its signature does not say what it wants.
    """
    if isinstance(function, type) or not callable(function):
        raise BadFunction(f"function must be a function or another callable object, got {function!r}")
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError) as error:
        raise BadFunction(f"function {function!r} has no signature to read; wrap it in {FORMS}") from error
    named = [p for p in signature.parameters.values() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    takes_rest = any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())
    names = tuple(p.name for p in named)
    is_async = inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)
    positional = [p.name for p in named if p.kind is p.POSITIONAL_ONLY]

    def called(arguments: dict[str, Any]) -> Any:
        return function(*[arguments.pop(name) for name in positional if name in arguments], **arguments)

    if "completions" in names:
        needed = tuple(p.name for p in named if p.default is p.empty and p.name not in TRL)
        refused = [name for name in needed if name in TRL_ALONE]
        if refused or batch is False:
            what = f"needs {', '.join(refused)}, which only TRL's trainer gives" if refused else "takes lists"
            raise _refused(function, signature, what)

        def call_with_columns(*lists: Any) -> Any:
            given = _columns(*lists)
            return called({name: column for name, column in given.items() if takes_rest or name in names})

        return Bound("trl", ONE, names, needed, call_with_columns, is_async)

    wanted, takes_lists = _wanted(function, signature, named, takes_rest, batch)

    def call(*sample: Any) -> Any:
        return called({name: sample[i] for name, i in wanted.items()})

    reads = tuple(ONE[i] for i in sorted(wanted.values()))
    return Bound("many" if takes_lists else "one", reads, names, (), call, is_async)


def _wanted(
    function: Any, signature: inspect.Signature, named: list[inspect.Parameter], takes_rest: bool, batch: bool | None
) -> tuple[dict[str, int], bool]:
    """Which part of a sample each parameter is, and whether the function takes lists of them."""
    position = {name: i for names in (ONE, MANY) for i, name in enumerate(names)}
    wanted = {p.name: position[p.name] for p in named if p.name in position}
    forms = {name in MANY for name in wanted}
    if named and not wanted:
        wanted, forms = {named[0].name: 0}, {False}
    unknown = [p.name for p in named if p.name not in wanted and p.default is p.empty]
    takes_lists = batch if batch is not None else forms == {True}
    if unknown:
        raise _refused(function, signature, f"needs {', '.join(unknown)}, which a reward is not given")
    if not wanted and not takes_rest:
        raise _refused(function, signature, "takes no response")
    if batch is None and len(forms) != 1:
        raise _refused(function, signature, "may be of either form: name its parameters, or set batch")
    if takes_rest:
        names = MANY if takes_lists else ONE
        wanted.update({name: i for i, name in enumerate(names) if i not in wanted.values()})
    return wanted, takes_lists


def _refused(function: Any, signature: inspect.Signature, what: str) -> BadFunction:
    name = getattr(function, "__name__", repr(function))
    return BadFunction(f"function {name}{signature} {what}; the forms are {FORMS}")


def _columns(responses: list[str], targets: list[Any], prompts: list[str], items: list[Any]) -> dict[str, list[Any]]:
    """What TRL gives a reward function: prompts, completions, and every column of the rows but their prompt.

    Of dialogues they are lists of messages, of other rows texts. A row without a column has None there.
    """
    rows = [item if isinstance(item, Mapping) else {} for item in items]
    given: dict[str, list[Any]] = {"target": targets, "targets": targets}
    for name in dict.fromkeys(str(name) for row in rows for name in row if name not in ("prompt", "completion")):
        given[name] = [row.get(name) for row in rows]
    given["prompts"], given["completions"] = list(prompts), list(responses)
    for i, row in enumerate(rows):
        messages = next((row[name] for name in ("prompt", "messages") if _is_dialogue(row.get(name))), None)
        if messages is not None:
            given["prompts"][i] = messages[:-1] if messages[-1].get("role") == "assistant" else messages
            given["completions"][i] = [{"role": "assistant", "content": responses[i]}]
    return given


def _is_dialogue(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(turn, Mapping) for turn in value)


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


def plain(result: Any, form: str) -> Any:
    """What a function returned as JSON can hold it: a number, a list of them; a text shows what is neither."""
    if form == "one":
        return _number(result)
    try:
        if isinstance(result, (str, bytes, bytearray, dict, set)) or len(result) < 0:
            return _shown(result)
        return [None if value is None and form == "trl" else _number(value) for value in result]
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
    function = None
    try:
        function = bound(loaded(first["function"]), first["batch"])
        # Whether it takes lists; of TRL's form, the columns it needs.
        reply: dict[str, Any] = {"value": function.columns if function.form == "trl" else function.form == "many"}
    except Exception as error:  # noqa: BLE001 - the parent raises it
        reply = _failed(error)
    _send(channel, reply)
    while function:
        sample = requests.get()
        try:
            result = function.call(*sample)
            result = asyncio.run(result) if function.is_async else result
            reply = {"value": plain(result, function.form)}
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
