"""Draw every token from the policy."""

from dataclasses import dataclass
from typing import ClassVar

from hybrid.rollout.asked import Asked
from hybrid.rollout.decoder import Decoder, register_decoder
from hybrid.rollout.responses import Responses

__all__ = ["Sample"]


@register_decoder("sample")
@dataclass(frozen=True)
class Sample(Decoder):
    """Every token is drawn from the policy, as `sampling` says."""

    is_policy: ClassVar[bool] = True

    def answers(self, asked: Asked) -> Responses:
        return asked.drawn(asked.repeats)
