"""What a run gives its reward: opponents that answer the same prompts, random numbers, policy gradients."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor

from hybrid.config import HybridConfig
from hybrid.core import Batch, Encoded, InputError, Rollout, enough_memory
from hybrid.corpus import Corpus
from hybrid.models import Policy
from hybrid.objectives import policy_gram
from hybrid.rollout import Engine, NamedModel, PastPolicy, SamplingConfig, respond, response_texts

__all__ = ["RunHost"]


class Parts(Protocol):
    """What it takes of the Learner that owns it."""

    policy: Policy
    engine: Engine
    corpus: Corpus
    config: HybridConfig
    tokenizer: Any

    def autocast(self) -> AbstractContextManager[Any]:
        """Computation in `model.precision`."""


class RunHost:
    """A Learner as its reward sees it; see `hybrid.rewards.Host`."""

    def __init__(self, parts: Parts):
        self.parts = parts

    @property
    def num_held_out(self) -> int:
        return len(self.parts.corpus.eval)

    @property
    def eval_every(self) -> int:
        return self.parts.config.eval.every

    def opponent(self, name: str | None) -> "RunOpponent":
        parts = self.parts
        if name is None:
            self._check_whole("self_play, whose opponent is the policy as it was,")
            return RunOpponent(parts, PastPolicy(parts.policy, parts.engine))
        model = NamedModel(
            name, parts.tokenizer, device=parts.policy.device, dtype=getattr(torch, parts.config.model.dtype),
            config=parts.config.rollout,
        )  # fmt: skip
        return RunOpponent(parts, model)

    def stream(self, number: int) -> torch.Generator:
        # The run's own streams have its seed, and the one after it.
        return torch.Generator(self.parts.policy.device).manual_seed(self.parts.config.run.seed + 2 + number)

    def gram(self, sides: Sequence[tuple[Rollout | Batch, Tensor]]) -> Tensor:
        self._check_whole("a reward mixture that compares policy gradients")
        with self.parts.autocast(), enough_memory("comparing policy gradients", "Lower the reward mixture's rows"):
            device = self.parts.policy.device
            placed: dict[int, Rollout | Batch] = {id(rows): rows.to(device) for rows, _ in sides}
            return policy_gram(self.parts.policy, [(placed[id(rows)], x.to(device)) for rows, x in sides])

    def _check_whole(self, what: str) -> None:
        """Refuse what one process cannot do with its part of the weights."""
        world = self.parts.engine.world
        if not world.whole:
            raise InputError(
                f"{what} needs all weights in one process, and distributed.engine {world.engine} gives it a part: take "
                "ddp"
            )

    def held_out(self, num_rows: int) -> Batch:
        examples = [example for example in self.parts.corpus.eval if example.has_target][:num_rows]
        if not examples:
            raise InputError("the held-out examples have no target: there is no held-out loss to learn from")
        return self.parts.corpus.batch(examples).to(self.parts.policy.device)


class RunOpponent:
    """One of the run's opponents: it answers as the policy does, with the run's tokenizer and settings."""

    def __init__(self, parts: Parts, model: PastPolicy | NamedModel):
        self.parts, self.model = parts, model

    def take(self) -> None:
        self.model.take()

    def answers(
        self, prompts: Sequence[Encoded | str], *, sampling: Any = None, generator: torch.Generator | None = None
    ) -> list[str]:
        """A response to each prompt, as rewards read it.

        sampling: a `SamplingConfig`; None: the run's.   generator: None: torch's global one.
        """
        parts = self.parts
        settings = sampling or parts.config.sampling
        assert isinstance(settings, SamplingConfig)
        # A search may need the very reward that asks.
        settings = settings if settings.search.is_policy else settings.drawing()
        examples = [parts.corpus.prompt(prompt) if isinstance(prompt, str) else prompt for prompt in prompts]
        advice = "Lower ppo.batch_size or sampling.max_new_tokens"
        with parts.autocast(), enough_memory("sampling the opponent's answers", advice), self.model.engine() as engine:
            *_, responses = respond(
                engine, examples, tokenizer=parts.tokenizer, sampling=settings, generator=generator
            )  # fmt: skip
        hints = [e.prompt_ids[len(e.prompt_ids) - e.num_hint :] for e in examples]
        return response_texts(parts.tokenizer, responses, hints, stop=settings.stop)

    def state_dict(self) -> dict[str, Tensor]:
        return self.model.state_dict()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.model.load_state_dict(state)
