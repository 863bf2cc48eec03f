"""The text around a prompt: our templates, the user's, or the chat template that a tokenizer brings."""

from collections.abc import Mapping, Sequence
from typing import Any

from hybrid.core import InputError

__all__ = ["chat_text", "prompt_text"]

DEFAULT = "### Prompt:\n```\n{prompt}\n```\n\n### Response:\n"


def prompt_text(prompt: str, template: str) -> str:
    """What the model reads before its response.

    template: default, none, or a text with {prompt} in it, which alone is replaced: other braces stay.
    """
    if template == "none":
        return prompt
    return (DEFAULT if template == "default" else template).replace("{prompt}", prompt)


def chat_text(
    tokenizer: Any,
    messages: Sequence[Mapping[str, Any]],
    *,
    respond: bool = False,
    tools: Sequence[Mapping[str, Any]] = (),
) -> str:
    """A dialogue as the tokenizer's chat template writes it; respond: up to where the assistant's next turn starts.

    tools: JSON schemas of what the assistant may call.

    Raises InputError where the tokenizer has no chat template, or where that refuses the dialogue.
    """
    from jinja2.exceptions import TemplateError

    if not getattr(tokenizer, "chat_template", None):
        raise InputError(
            "this tokenizer has no chat template, which data.template = 'chat' and dialogues need; "
            "take the model's instruct version, or set tokenizer.chat_template"
        )
    try:
        return tokenizer.apply_chat_template(
            list(messages), tools=list(tools) or None, tokenize=False, add_generation_prompt=respond
        )
    except (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
        roles = ", ".join(message["role"] for message in messages)
        raise InputError(f"the tokenizer's chat template refuses a dialogue of {roles}: {error}") from error
