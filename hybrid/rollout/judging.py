"""What candidates are compared by: a reward's word on them, or the value head's."""

from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from hybrid.core import InputError
from hybrid.rollout.asked import Asked
from hybrid.rollout.decoder import Decoder
from hybrid.rollout.responses import Responses

__all__ = ["By", "JudgingDecoder"]

By = Literal["reward", "value"]


@dataclass(frozen=True, kw_only=True)
class JudgingDecoder(Decoder):
    """A decoder that compares candidates.   by: reward, or value for the policy's own value head.

    reward: the spec of a reward of its own; None: the run's.
    """

    by: By = "reward"
    reward: Any = None

    def __post_init__(self) -> None:
        if self.by == "value" and self.reward is not None and not self.needs_reward:
            raise InputError("reward means nothing with by 'value': leave one of them out")

    @property
    def needs_reward(self) -> bool:
        return self.by == "reward"

    def worth(self, asked: Asked, prompts: Tensor, rows: Responses) -> Tensor:
        """What each row is worth, (R,) float64."""
        return asked.score(prompts, rows) if self.by == "reward" else asked.value(prompts, rows).double()
