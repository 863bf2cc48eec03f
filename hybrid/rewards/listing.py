"""What there is by name, for the command line and docs/rewards.md: one text from the registered types themselves."""

import inspect
import json
from collections.abc import Mapping

from hybrid.core import parameters_of
from hybrid.rewards.base import Handling
from hybrid.rewards.factory import known_rewards, parameters_of_reward
from hybrid.rewards.postprocess import postprocesses

__all__ = ["reward_listing", "reward_markdown"]


def reward_listing() -> list[tuple[str, str, str]]:
    """(type and aliases, parameters with their defaults, summary) of each; first what every reward takes."""
    common = ["name", "weight (1)", *_parameters(parameters_of(Handling))]
    return [
        ("(all rewards)", ", ".join(common), ""),
        *(
            (
                ", ".join([kind.name, *kind.aliases]),
                ", ".join(_parameters(parameters_of_reward(kind.name))),
                kind.summary,
            )
            for kind in known_rewards()
        ),
        *(
            (f"postprocess: {name}", ", ".join(_parameters(parameters_of(postprocesses[name]))), _summary(name))
            for name in postprocesses
        ),
    ]


def reward_markdown() -> str:
    """`reward_listing` as a Markdown table."""
    lines = ["| type | parameters (defaults) | |", "| --- | --- | --- |"]
    return "\n".join(
        [*lines, *("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in reward_listing())]
    )


def _parameters(parameters: Mapping[str, inspect.Parameter]) -> list[str]:
    return [f"{name}{_default(p.default)}" for name, p in parameters.items()]


def _default(value: object) -> str:
    """In brackets behind the name; a parameter without one, or with None, stands alone."""
    if value in (inspect.Parameter.empty, None, ()):
        return ""
    if isinstance(value, str):
        return f" ({value})" if len(value) < 80 and "\n" not in value else " (a text)"
    return f" ({json.dumps(value)})"


def _summary(name: str) -> str:
    return (inspect.getdoc(postprocesses[name]) or "").partition("\n")[0]
