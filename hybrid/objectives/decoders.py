"""Which objectives learn from which decoder's responses."""

from collections.abc import Callable, Iterable

from hybrid.core import InputError
from hybrid.objectives.objective import Objective, objective_class, objective_names
from hybrid.rollout import decoder_class

__all__ = ["check_decoder"]

OfObjective = Callable[[type[Objective]], bool]  # type: ignore[type-arg]


def check_decoder(names: Iterable[str], decoder: str, window: int | None = None, *, least: int | None = None) -> None:
    """Refuse (InputError) that these objectives learn from responses that the decoder has found, with this window.

    least: let it pass where so many of them can; None: all of those that roll out.
    """
    rolling = sorted(name for name in names if objective_class(name).rolls_out)
    refused = {name: why for name in rolling if (why := _refusal(name, decoder, window))}
    if refused and len(rolling) - len(refused) < (len(rolling) if least is None else least):
        raise InputError(next(iter(refused.values())))


def _refusal(name: str, decoder: str, window: int | None) -> str:
    """Why the objective cannot learn from the decoder's responses; "" where it can."""
    objective = objective_class(name)
    if not decoder_class(decoder).is_policy and not objective.imitates:
        return (
            f"objective {name!r} cannot learn from the responses of decoder {decoder!r}, which are not drawn token by "
            "token from the policy: train with sampling.decoder.type=sample, and give this one to eval.decoder; or "
            f"take an objective that imitates ({_able(lambda other: other.imitates)})"
        )
    if window is not None and not objective.windowed:
        return (
            f"objective {name!r} sees all tokens, and decoder {decoder!r} draws from a window of {window}: train with "
            f"sampling.decoder.type=sample, or an objective with windows ({_able(lambda other: other.windowed)})"
        )
    return ""


def _able(is_able: OfObjective) -> str:
    return ", ".join(name for name in objective_names() if is_able(objective_class(name)))
