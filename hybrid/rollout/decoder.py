"""What a decoder is: it says how the response to a prompt is searched for."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from torch import Tensor

from hybrid.core import Batch, InputError, Registry, build, check_settings
from hybrid.models import Policy
from hybrid.rewards import Reward, make_reward

if TYPE_CHECKING:
    from hybrid.rollout.asked import Asked
    from hybrid.rollout.responses import Responses
    from hybrid.rollout.sampling import SamplingConfig

__all__ = ["Decoder", "decoder_class", "decoder_names", "make_decoder", "register_decoder"]


class Decoder(ABC):
    """Answers prompts in its own way, with what an `Asked` offers.

        @register_decoder("longest")
        @dataclass(frozen=True)
        class Longest(Decoder):
            n: int = 4

            def answers(self, asked):
                drawn = asked.drawn(self.n * asked.repeats)
                best = drawn.lengths.view(-1, self.n).argmax(1)
                return drawn.of(best + self.n * torch.arange(len(best)))

    and `sampling.decoder: {type: longest, n: 8}` uses it. It is a frozen dataclass whose fields are its spec; a field
    `reward` is the spec of a reward of its own, in place of the run's.
    """

    name: ClassVar[str] = ""  # the one that it is registered by
    is_policy: ClassVar[bool] = False  # each token is drawn from a distribution that training computes: PPO may learn
    of_one_policy: ClassVar[bool] = False  # what it was made with is of one policy's weights: no run may train them

    @abstractmethod
    def answers(self, asked: "Asked") -> "Responses":
        """`asked.repeats` responses to each prompt, which stand together.

        Their `logprob` counts where it `is_policy`, and is dropped elsewhere.
        Their `metrics` are logged as "decoder/NAME".
        """

    @property
    def needs_reward(self) -> bool:
        """Whether it asks a reward."""
        return False

    @property
    def policy_window(self) -> int | None:
        """The tokens that the policy sees, in training too; None: all."""
        return None

    def check_sampling(self, sampling: "SamplingConfig") -> None:  # noqa: B027 - most go with all
        """Refuse (InputError) settings of the sampling that it does not go with."""

    def check_context(self, context: int | None) -> None:  # noqa: B027 - most go with all
        """Refuse (InputError) to work with a model of so many tokens; None: not known."""

    def check_tokenizer(self, tokenizer: Any) -> None:  # noqa: B027
        """Refuse (InputError) to work with another tokenizer than it was made for."""

    def check_policy(self, policy: Policy) -> None:  # noqa: B027
        """Refuse (InputError) to work with another policy than it was made for."""

    def batch_logprob(self, policy: Policy, batch: Batch) -> tuple[Tensor, Tensor] | None:
        """`Policy.batch_logprob` under what it draws from at temperature 1; None: that is the policy, or not known."""
        return None

    @property
    def own_reward(self) -> Reward | None:
        """The reward of its own, where its spec names one. Made once."""
        spec = getattr(self, "reward", None)
        if spec is None:
            return None
        if "_own_reward" not in vars(self):
            try:
                object.__setattr__(self, "_own_reward", make_reward(spec))
            except InputError as error:
                raise InputError(f"sampling.decoder.reward: {error}") from error
        return vars(self)["_own_reward"]

    def check_reward(self, reward: Any) -> None:
        """Refuse (InputError) to go on without a reward where one is needed. reward: the run's, in any form."""
        if self.needs_reward and reward is None and self.own_reward is None:
            raise InputError(
                f"decoder {self.name!r} needs a reward, and there is none: give one, or one of its own "
                "(sampling.decoder.reward)"
            )

    def spec(self) -> dict[str, Any]:
        """What `make_decoder` makes it from."""
        return {"type": self.name, **{f.name: getattr(self, f.name) for f in fields(self)}}  # type: ignore[arg-type]

    # What the checks of several have in common

    def _at_least(self, least: int, *names: str) -> None:
        for name in names:
            if (count := getattr(self, name)) is not None and count < least:
                raise InputError(f"{name} must be at least {least}, got {count}")

    def _positive(self, *names: str) -> None:
        for name in names:
            if (number := getattr(self, name)) is not None and not 0 < number < float("inf"):
                raise InputError(f"{name} must be > 0 and finite, got {number}")

    def _reward_is_asked(self, name: str, way_out: str) -> None:
        """Refuse a reward of its own where the field `name` says that none is asked."""
        if not self.needs_reward and getattr(self, "reward", None) is not None:
            raise InputError(f"reward means nothing with {name} {getattr(self, name)!r}: {way_out}")

    def _needs_chance(self, sampling: "SamplingConfig") -> None:
        if not sampling.temperature:
            raise InputError(
                f"decoder {self.name!r} needs sampling.temperature > 0: at 0 all responses to a prompt are the same"
            )


D = TypeVar("D", bound=type[Decoder])
_decoders: Registry[type[Decoder]] = Registry("decoder")


def register_decoder(name: str) -> Callable[[D], D]:
    """Decorator: make a Decoder class a type that `sampling.decoder` can name."""

    def add(decoder: D) -> D:
        if not issubclass(decoder, Decoder):
            raise TypeError(f"@register_decoder({name!r}) takes a Decoder class, got {decoder!r}")
        _decoders.register(name)(decoder)
        decoder.name = name
        return decoder

    return add


def make_decoder(spec: Any) -> Decoder:
    """A decoder from a flat spec, its name under `type` ("sample" by default), its fields beside it; or as it is."""
    if isinstance(spec, Decoder):
        return spec
    if not isinstance(spec, Mapping):
        raise InputError(f"sampling.decoder must be a mapping with a type, or a Decoder, got {spec!r:.60}")
    settings = {key: value for key, value in spec.items() if key != "type"}
    name = spec.get("type", "sample")
    what, path = f"decoder {name!r}", "sampling.decoder"
    check_settings(_decoders[name], settings, what=what, path=path, also=["type"])
    decoder: Decoder = build(_decoders[name], settings, what=what, path=path)
    decoder.own_reward  # noqa: B018 - a bad spec is refused here; nothing is loaded before its first score
    return decoder


def decoder_class(name: str) -> type[Decoder]:
    """The class that a name is registered for. Raises InputError with the nearest name."""
    return _decoders[name]


def decoder_names() -> list[str]:
    """The names that `make_decoder` knows."""
    return list(_decoders)
