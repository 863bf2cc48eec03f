"""The chat template that a reward model's tokenizer carries: prompt and response as the text it was trained on."""

import logging
from collections.abc import Sequence
from typing import Any

from hybrid.core import Encoded, Example, InputError
from hybrid.data import DataConfig, encode, prompt_text
from hybrid.data.tokens import opening, tokens

__all__ = ["rendered", "template_of"]

logger = logging.getLogger(__name__)

NUM_TRIED = 256  # of the pairs that a template is tried on
# Two beginnings, one with a space, of a prompt and of a text without one. The responses that go on with a space melt
# into no prompt.
PROBES = (("Once upon", " a time"), (" Once upon", " a time"), ("", "Once upon a time"), ("", " Once upon a time"))
ONE_EACH = (
    "a reward model's chat template takes one user turn and one assistant turn: data.template was no chat template"
)


def template_of(config: DataConfig, tokenizer: Any, pairs: Sequence[Encoded] = ()) -> str:
    """A chat template that maps a user's turn (the prompt) and an assistant's (the response) to the text of a row.

        tokenizer.apply_chat_template(turns, chat_template=template_of(config, tokenizer), tokenize=False)

    has, without added special tokens, the tokens that `encode` gives the prompt and the response. The text is

        BOS + data.template with the prompt + response + EOS               (BOS: whatever the tokenizer puts in front)
        the tokenizer's own chat template, no white space at its end, EOS  (data.template = "chat": any dialogue)
        BOS + response + EOS                                               (of an empty prompt)

    Rows that are dialogues by their columns are read by `DataConfig(template="chat")` whatever data.template says.
    No text has the row's tokens where one of the text's tokens would reach across the seam between prompt and
    response, which `encode` keeps (a template that ends in a space; a response that starts with the line break its
    template ends with), or where prompt or response hold a special token's text.
    pairs: of the first of them those with such rows are counted in a warning.
    Raises InputError where the tokenizer writes no such text at all, and what `encode` and the chat template raise.
    Ask before the training, not after it.
    """
    front = _front(tokenizer)
    # A tokenizer that puts a space before a text's first word may put none behind a BOS that stands in the text.
    spaces = ("", "{% if text[:1] != ' ' %}{{ ' ' }}{% endif %}") if front else ("",)
    failed = ""
    for space in spaces:
        template = _template(config, tokenizer, front, space)
        failed = _difference(config, tokenizer, template)
        if not failed:
            if config.template != "chat":
                _warn_of_seams(tokenizer, template, pairs[:NUM_TRIED])
            return template
    raise InputError(
        f"with this tokenizer no text has the tokens of the rows that data.template = {config.template!r} makes: "
        f"{failed}; take another data.template"
    )


def rendered(tokenizer: Any, prompt: str, response: str, template: str | None = None) -> str:
    """A user's turn and the assistant's answer by the template, which is the tokenizer's own unless given."""
    turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
    text: str = tokenizer.apply_chat_template(turns, chat_template=template, tokenize=False)
    return text


def _template(config: DataConfig, tokenizer: Any, front: str, space: str) -> str:
    row = _row(tokenizer, front, space)
    if config.template == "chat":
        return _chat_template(config, tokenizer, row)
    around = " + prompt + ".join(map(_literal, prompt_text("{prompt}", config.template).split("{prompt}")))
    return (
        "{% if messages | length != 2 or messages[0]['role'] != 'user' or messages[1]['role'] != 'assistant' %}"
        f"{{{{ raise_exception({_literal(ONE_EACH)}) }}}}{{% endif %}}"
        "{% set prompt = messages[0]['content'] %}"
        f"{{% set text = ({around} if prompt else '') + messages[1]['content'] %}}{row}"
    )


def _chat_template(config: DataConfig, tokenizer: Any, row: str) -> str:
    """The tokenizer's own, its end as `encode_dialogue` has it."""
    own = tokenizer.chat_template
    if not isinstance(own, str):
        raise InputError(
            "data.template = 'chat' needs a tokenizer with one chat template for the reward model to take along, "
            f"this one's is {type(own).__name__}; set tokenizer.chat_template"
        )
    system = ""
    if config.system is not None:
        turn = f"{{'role': 'system', 'content': {_literal(config.system)}}}"
        system = f"{{% if messages[0]['role'] != 'system' %}}{{% set messages = [{turn}] + messages %}}{{% endif %}}"
    # The line break in front of the tokenizer's template is cut by its tag, as templates are rendered.
    return (
        "{% if messages | length == 2 and messages[0]['role'] == 'user' and not messages[0]['content'] %}"
        f"{{% set text = messages[1]['content'] %}}{row}{{% else %}}{system}"
        f"{{% set text %}}\n{own}{{% endset %}}{{% set text = text.rstrip() %}}{{{{ text }}}}"
        f"{_eos(tokenizer)}{{% endif %}}"
    )


def _row(tokenizer: Any, front: str, space: str) -> str:
    """What stands in front of `text`, the text, and EOS, once each."""
    start = f"{{{{ {_literal(front)} }}}}{space}" if front else ""
    if front and front == tokenizer.bos_token:
        start = f"{{% if text[:{len(front)}] != {_literal(front)} %}}{start}{{% endif %}}"
    return f"{start}{{{{ text }}}}{_eos(tokenizer)}"


def _eos(tokenizer: Any) -> str:
    eos = tokenizer.eos_token
    return f"{{% if text[-{len(eos)}:] != {_literal(eos)} %}}{{{{ {_literal(eos)} }}}}{{% endif %}}"


def _front(tokenizer: Any) -> str:
    """The text of the special tokens that the tokenizer puts in front of a text: BOS, or nothing."""
    alone = tokens(tokenizer, "a")
    ids = opening(tokenizer, "a")
    return "".join(tokenizer.convert_ids_to_tokens(ids[: len(ids) - len(alone)]))


def _literal(text: str) -> str:
    """A text as Jinja reads it: in ASCII, line breaks escaped, so that no rule of white space applies to it."""
    return ascii(text)


def _warn_of_seams(tokenizer: Any, template: str, pairs: Sequence[Encoded]) -> None:
    """Say of how many answers the text has other tokens than the row that is trained."""
    sides = [side for e in pairs for side in (e, e.rejected) if side is not None]
    texts = [rendered(tokenizer, side.prompt, side.target, template) for side in sides]
    other = [
        side.prompt for side, text in zip(sides, texts, strict=True) if tuple(tokens(tokenizer, text)) != side.input_ids
    ]
    if other:
        logger.warning(
            "of the first %d answers %d have other tokens in the text that the saved reward model reads, where it will "
            "give other scores than it is trained to: a token reaches across the seam behind %r. Take off the space "
            "that the prompts, or data.template, end in",
            len(sides), len(other), other[0][-30:],
        )  # fmt: skip


def _difference(config: DataConfig, tokenizer: Any, template: str) -> str:
    """Where the template's text has other tokens than the rows; "" where it has the same."""
    for prompt, response in PROBES:
        row = encode(Example(prompt, response), tokenizer, config).input_ids
        text = rendered(tokenizer, prompt, response, template)
        if (ids := tuple(tokens(tokenizer, text))) != row:
            return f"for prompt {prompt!r} and response {response!r} the row is {list(row)}, {text!r} is {list(ids)}"
    return ""
