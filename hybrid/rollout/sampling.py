"""How responses are drawn, as a config says it."""

from dataclasses import dataclass, field, replace
from typing import Any

from hybrid.core import InputError
from hybrid.rollout.decoder import Decoder, make_decoder

__all__ = ["SamplingConfig"]


@dataclass(frozen=True)
class SamplingConfig:
    """How responses are drawn.

    PPO's ratios use the softmax at `temperature` over the whole vocabulary. top_k, top_p and min_new_tokens draw
    from less than that, so with them the ratio is no longer that of the sampled distribution: they are off by
    default. `PPOConfig.importance` corrects for them.
    """

    max_new_tokens: int = 32
    min_new_tokens: int = 0  # EOS cannot be drawn before the response has this many tokens
    temperature: float = 1.0  # 0: the likeliest token (for generate; PPO needs > 0)
    top_k: int = 0  # draw from the k likeliest tokens; 0: all
    top_p: float = 1.0  # draw from the smallest set of tokens with this much probability; 1: all
    stop: tuple[str, ...] = ()  # texts that end a response, as EOS does; rewards read what stands before them
    # How a response is searched for: a type and its own keys (docs/decoding.md), or a Decoder.
    decoder: Any = field(default_factory=lambda: {"type": "sample"}, hash=False)

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"SamplingConfig.max_new_tokens must be >= 1, got {self.max_new_tokens}")
        if not 0 <= self.min_new_tokens <= self.max_new_tokens:
            raise ValueError(
                f"SamplingConfig.min_new_tokens must lie in [0, max_new_tokens = {self.max_new_tokens}], "
                f"got {self.min_new_tokens}"
            )
        if not self.temperature >= 0:
            raise ValueError(f"SamplingConfig.temperature must be >= 0, got {self.temperature}")
        if self.top_k < 0:
            raise ValueError(f"SamplingConfig.top_k must be >= 0, got {self.top_k}")
        if isinstance(self.stop, str) or not all(isinstance(text, str) and text for text in self.stop):
            raise ValueError(f"SamplingConfig.stop must be a list of texts that are not empty, got {self.stop!r}")
        object.__setattr__(self, "stop", tuple(self.stop))
        if not 0 < self.top_p <= 1:
            raise ValueError(f"SamplingConfig.top_p must lie in (0, 1], got {self.top_p}")
        made = make_decoder(self.decoder)
        made.check_sampling(self)
        object.__setattr__(self, "_decoder", made)
        object.__setattr__(self, "decoder", dict(self.decoder) if made is not self.decoder else made.spec())

    @property
    def search(self) -> Decoder:
        """The decoder, made."""
        return vars(self)["_decoder"]

    def drawing(self) -> "SamplingConfig":
        """The same, with every token simply drawn."""
        return self if self.search.name == "sample" else replace(self, decoder={"type": "sample"})

    @property
    def is_truncated(self) -> bool:
        """Whether less than the whole distribution is drawn from."""
        return bool(self.top_k or self.top_p < 1 or self.min_new_tokens)

    def check_room(self, num_tokens: int, context: int | None, *, prompt: str = "") -> None:
        """Raise InputError where a prompt of so many tokens leaves no room to answer in the model's context."""
        if context is not None and num_tokens + self.max_new_tokens > context:
            raise InputError(
                f"a prompt of {num_tokens} tokens leaves no room for sampling.max_new_tokens = {self.max_new_tokens} "
                f"in the model's context of {context}; lower max_new_tokens or data.max_length"
                + (f". The prompt: {prompt[:60]!r}" if prompt else "")
            )
