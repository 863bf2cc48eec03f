"""Dialogues as people write them, to the messages that chat templates read."""

from collections.abc import Mapping, Sequence
from typing import Any

from hybrid.core import InputError, parse_json, unknown_name
from hybrid.data.cells import check_unicode, is_missing

__all__ = ["last_content", "messages_of", "num_untrained", "tools_of"]

Message = Mapping[str, Any]

# What says that an answer is not trained: OpenAI's, and that of others.
WEIGHTS = ("weight", "train", "training", "loss")
ROLES = ("system", "user", "assistant", "tool")
# ShareGPT's files have these names too.
ROLE_OF_AUTHOR = {role: role for role in ROLES} | {"human": "user", "gpt": "assistant", "observation": "tool"}


def messages_of(value: Any, where: str) -> tuple[Message, ...]:
    """The messages of a dialogue: {"role", "content"} with whatever else a turn has, but for what is null.

    value: a list of them or of ShareGPT's {"from", "value"}, or the JSON text of one.
    Raises InputError: no list, a message without role and text (an assistant's with tool_calls needs none).
    """
    listed = _listed(value)
    if not listed:
        raise InputError(f"{where} must hold a list of messages, got {value!r:.60}")
    return tuple(_message(message, f"{where}: message {number}") for number, message in enumerate(listed, start=1))


def tools_of(value: Any, where: str) -> tuple[Mapping[str, Any], ...]:
    """The JSON schemas of tools: a list of them, or its JSON text. None where there are none."""
    if is_missing(value) or (isinstance(value, str) and not value.strip()):
        return ()
    listed = _listed(value)
    tools = None if listed is None else [_parsed(tool) if isinstance(tool, str) else tool for tool in listed]
    if tools is None or not all(isinstance(tool, Mapping) for tool in tools):
        raise InputError(f"{where} must hold a list of JSON schemas, or the JSON text of one, got {value!r:.60}")
    return tuple(tools)


def num_untrained(messages: Sequence[Message], where: str) -> int:
    """How many messages there are up to the last answer that is not trained: one with OpenAI's `weight` of 0, or
    another of WEIGHTS of false.

    Raises InputError for another weight than 0 and 1 (false and true), and where an answer before it is trained, or
    none behind it.
    """
    weights = [
        (i, next((m[name] for name in WEIGHTS if name in m), 1))
        for i, m in enumerate(messages, start=1)
        if m["role"] == "assistant"
    ]
    if wrong := [(i, weight) for i, weight in weights if weight not in (0, 1)]:
        raise InputError(f"{where}: message {wrong[0][0]}: its weight must be 0 or 1, got {wrong[0][1]!r:.60}")
    last = max((i for i, weight in weights if not weight), default=0)
    if trained := [i for i, weight in weights if weight and i < last]:
        raise InputError(
            f"{where}: message {last} has weight 0 behind message {trained[0]}, which is trained; give the trained "
            "answer a row of its own"
        )
    if last == len(messages):
        raise InputError(f"{where} ends with an answer of weight 0, which is not trained; take that answer off")
    return last


def last_content(messages: Sequence[Message], role: str) -> str:
    """What that role said last, "" where nothing."""
    return next((m["content"] for m in reversed(messages) if m["role"] == role and m.get("content")), "")


def _message(value: Any, where: str) -> Message:
    if not isinstance(value, Mapping):
        raise InputError(f"{where} must hold a role and a text as its content, got {value!r:.60}")
    message = {key: inner for key, inner in value.items() if not is_missing(inner)}
    role = message.get("role")
    if "from" in message and role is None:
        author, content = str(message.pop("from")), message.pop("value", None)
        if author not in ROLE_OF_AUTHOR:
            raise InputError(f"{where}: {unknown_name('role', author, ROLE_OF_AUTHOR)}")
        message = {"role": ROLE_OF_AUTHOR[author], "content": content, **message}
    elif role not in ROLES:
        raise InputError(f"{where}: {unknown_name('role', str(role), ROLES)}")
    if "tool_calls" in message:
        message["tool_calls"] = _calls(message["tool_calls"], where)
    content = message.get("content")
    if content is None and message["role"] == "assistant" and message.get("tool_calls"):
        return message
    if not isinstance(content, str):
        raise InputError(f"{where} must hold a role and a text as its content, got {value!r:.60}")
    check_unicode(content, where)
    return message


def _calls(value: Any, where: str) -> Sequence[Any]:
    calls = _listed(value)
    if calls is None or not all(isinstance(call, Mapping) for call in calls):
        raise InputError(f"{where}: its tool_calls must be a list of calls (objects), got {value!r:.60}")
    return calls


def _listed(value: Any) -> Sequence[Any] | None:
    if isinstance(value, str):
        value = _parsed(value)
    if hasattr(value, "tolist"):
        value = value.tolist()
    return value if isinstance(value, (list, tuple)) else None


def _parsed(text: str) -> Any:
    """What JSON says, None where it is none."""
    try:
        return parse_json(text)
    except ValueError:
        return None
