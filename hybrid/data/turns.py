"""From a dialogue to token ids: which of the template's tokens are the assistant's to say."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hybrid.core import IGNORE, Encoded, Example, InputError
from hybrid.data.config import DataConfig
from hybrid.data.template import chat_text
from hybrid.data.tokens import continuation, special_ids, specials_in, tokens

__all__ = ["encode_dialogue"]

Messages = Sequence[Mapping[str, Any]]
Tools = Sequence[Mapping[str, Any]]

# Where a message has its thinking, by the templates that write it.
THOUGHTS = ("reasoning_content", "reasoning", "thinking")
# Whose words the template has to write as they are. Some write a tool's as JSON, in which quotes look otherwise.
ASKING = ("system", "user")


def encode_dialogue(example: Example, tokenizer: Any, config: DataConfig) -> list[Encoded]:
    """The dialogue as one example; or, where its template writes earlier turns anew (it drops their thinking), one for
    each answer, in the context that the model sees when it gives that answer.

    Every assistant turn is trained, with what closes it (that may be the next role's marker), and nothing else.
    Raises InputError for a special token's text in what the user wrote: in the template's text it would be that token.
    And where the template leaves out the tools, a question, or what a trained answer says, thinks or calls.
    """
    messages = list(example.messages) or [{"role": "user", "content": example.prompt}]
    if example.target and not example.messages:
        messages.append({"role": "assistant", "content": example.target})
    first = example.num_prompt_messages
    if config.system is not None and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": config.system})
        first += 1
    _check_specials(tokenizer, [*messages, *example.tools])
    answers = [turn for turn, m in enumerate(messages) if m["role"] == "assistant" and turn >= first]
    whole = _in_one(example, tokenizer, messages, answers)
    if whole is not None:
        return [whole]
    return [_one_answer(example, tokenizer, messages, turn) for turn in answers]


def _in_one(example: Example, tokenizer: Any, messages: Messages, answers: Sequence[int]) -> Encoded | None:
    """All turns in one row; None where the template does not leave them as they were."""
    is_open = messages[-1]["role"] != "assistant"
    whole = chat_text(tokenizer, messages, respond=is_open, tools=example.tools)
    done = ""
    ids: list[int] = []
    labels: list[int] = []
    prompt_ids: list[int] = []
    for turn in answers:
        start = chat_text(tokenizer, messages[:turn], respond=True, tools=example.tools)
        end = _ended(tokenizer, messages[: turn + 1], example.tools)
        if not (whole.startswith(end) and end.startswith(start) and start.startswith(done)):
            return None
        _check_kept(start, end[len(start) :], messages, turn, example.tools)
        between = continuation(tokenizer, ids, done, start)
        prompt_ids = ids + between
        answer = continuation(tokenizer, prompt_ids, start, end)
        labels += _labels_after(tokenizer, labels, between) + answer
        ids, done = prompt_ids + answer, end
    if is_open:
        _check_kept(whole, None, messages, len(messages), example.tools)
        between = continuation(tokenizer, ids, done, whole)
        labels += _labels_after(tokenizer, labels, between)
        ids = prompt_ids = ids + between
    elif ids[-1] != tokenizer.eos_token_id:
        ids, labels = [*ids, tokenizer.eos_token_id], [*labels, tokenizer.eos_token_id]
    return Encoded(tuple(ids), tuple(labels), tuple(prompt_ids), example.prompt, example.target, example.item)


def _labels_after(tokenizer: Any, labels: Sequence[int], between: Sequence[int]) -> list[int]:
    """The labels of what follows an answer: the next role's marker is trained where that is what ends the turn."""
    specials = special_ids(tokenizer)
    ends = bool(labels) and labels[-1] not in specials and bool(between) and between[0] in specials
    return [between[0] if ends and i == 0 else IGNORE for i in range(len(between))]


def _one_answer(example: Example, tokenizer: Any, messages: Messages, turn: int) -> Encoded:
    """One answer behind all that comes before it."""
    start = chat_text(tokenizer, messages[:turn], respond=True, tools=example.tools)
    end = _ended(tokenizer, messages[: turn + 1], example.tools)
    if not end.startswith(start):
        same = next((i for i, (a, b) in enumerate(zip(start, end, strict=False)) if a != b), min(len(start), len(end)))
        raise InputError(
            f"the tokenizer's chat template opens the assistant's turn {turn + 1} with {start[same:]!r}, and writes "
            "that answer without it; give the answer with what it opens (its thinking), or set another "
            "tokenizer.chat_template"
        )
    _check_kept(start, end[len(start) :], messages, turn, example.tools)
    prompt_ids = tokens(tokenizer, start)
    answer = continuation(tokenizer, prompt_ids, start, end)
    if answer[-1:] != [tokenizer.eos_token_id]:
        answer = [*answer, tokenizer.eos_token_id]
    asked = next((m["content"] for m in reversed(messages[:turn]) if m["role"] == "user"), example.prompt)
    labels = [IGNORE] * len(prompt_ids) + answer
    given = messages[turn].get("content") or ""
    return Encoded(tuple(prompt_ids + answer), tuple(labels), tuple(prompt_ids), asked, given, example.item)


def _ended(tokenizer: Any, messages: Messages, tools: Tools) -> str:
    """The dialogue up to the end of its last turn: what a template writes after the token that closes a turn is white
    space, and not the model's to say."""
    return chat_text(tokenizer, messages, tools=tools).rstrip()


def _check_kept(before: str, answer: str | None, messages: Messages, turn: int, tools: Tools) -> None:
    """Raise InputError where the template has not written, white space aside, what the user gave it.

    before: its text up to that turn.   answer: its text of the turn itself, None where there is none yet.
    """
    before = _bare(before)
    given = [(before, f"turn {i + 1}", m.get("content")) for i, m in enumerate(messages[:turn]) if m["role"] in ASKING]
    given += [(before, "the tools", name) for name in _names(tools)]
    if answer is not None:
        said, place = messages[turn], f"turn {turn + 1}, which is to be trained"
        parts = [said.get(key) for key in ("content", *THOUGHTS)] + _names(said.get("tool_calls", ()))
        given += [(_bare(answer), place, part) for part in parts]
    for text, what, part in given:
        if isinstance(part, str) and _bare(part) not in text:
            raise InputError(
                f"the tokenizer's chat template leaves out {part!r:.60} of {what}; set a tokenizer.chat_template that "
                "writes it, or take it out of the data"
            )


def _names(functions: Tools) -> list[Any]:
    """Of tools, or of calls of them: as OpenAI writes them, or flat."""
    inner = [(function, function.get("function")) for function in functions]
    return [(own if isinstance(own, Mapping) else function).get("name") for function, own in inner]


def _bare(text: str) -> str:
    return "".join(text.split())


def _check_specials(tokenizer: Any, given: Sequence[Mapping[str, Any]]) -> None:
    """given: the messages, and the tools behind them."""
    for number, one in enumerate(given, start=1):
        for text in _texts(one):
            if special := next(iter(specials_in(tokenizer, text)), None):
                what = f"message {number} of a dialogue" if "role" in one else "a tool of a dialogue"
                raise InputError(
                    f"{what} holds the text of the special token {special!r}, which would become that token in the "
                    f"chat template's text; take it out, or leave the row out with data.filter: {text!r:.80}"
                )


def _texts(value: Any) -> Iterator[str]:
    """Every text in a message or a tool, however deep."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (Mapping, list, tuple)):
        for inner in value.values() if isinstance(value, Mapping) else value:
            yield from _texts(inner)
